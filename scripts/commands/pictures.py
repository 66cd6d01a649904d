"""Take the pictures of docs/pictures from a real run: both workflows in Temporal's UI, and the console of each side.

Two orders are sent. The second payment ends while the order team's process is down, and an operator stops its
delivery. Then chromium, as Debian packages it, does what a person would do: it clicks from the order to its payment and
back, logs in to the consoles, and has the stopped delivery run again.
"""

import argparse
import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from playwright.async_api import Browser, BrowserContext, Error, Locator, Page, async_playwright, expect
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

from bridge.console.sessions import hash_token
from examples.payments.order import Order, OrderReceipt
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from handler.reports.deliveries import Deliveries, DeliveryError
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.processes import stop_process
from scripts.environment.progress import say
from scripts.environment.server import free_ports
from scripts.environment.stack import (
    CALLER_NAMESPACE,
    HANDLER_NAMESPACE,
    ROOT,
    Stack,
    StackOptions,
    running_stack,
    start_process,
)
from scripts.environment.temporal_cli import NoServerError

FOLDER = ROOT / "docs" / "pictures"
NAMES = ("order", "payment", "receiver-console", "handler-console", "delivery", "phone")
_TOKEN = "only-for-pictures"
_PATIENCE_MS = 60_000
_TRIES = 240
_WINDOW: Any = {"width": 1280, "height": 900}
_PHONE: Any = {"width": 400, "height": 760}


class Consoles:
    """A stack with a console on each side, whose sides know each other's UI."""

    def __init__(self) -> None:
        self._temporal, *ports = free_ports(3)
        self.ports = dict(zip(("caller", "handler"), ports, strict=True))

    def options(self) -> StackOptions:
        """The options of the stack."""
        return StackOptions(
            server=temporal_cli.NEWEST,
            port=self._temporal,
            first_lease=600,
            own_environment=lambda _folder, side, _name: self._environment(side),
        )

    def _environment(self, side: str) -> dict[str, str]:
        peer = "HANDLERS__PAYMENT_PROD" if side == "caller" else "CALLERS__ORDER_PROD"
        return {
            f"BRIDGE_{peer}__UI_URL": f"http://127.0.0.1:{self._temporal + 1000}",
            "BRIDGE_CONSOLE__PORT": str(self.ports[side]),
            "BRIDGE_CONSOLE__TOKENS__ANNA": hash_token(_TOKEN),
        }


def chromium() -> str:
    """The program of the browser.

    Raises:
        NoServerError: It is not on PATH.
    """
    found = shutil.which("chromium")
    if found is None:
        message = "chromium is not on PATH: apt-get install chromium"
        raise NoServerError(message)
    return found


async def take_pictures(folder: Path) -> None:
    """Write the pictures that `NAMES` names into *folder*, which exists.

    Raises:
        AssertionError: A page does not show what it has to show.
    """
    consoles = Consoles()
    options = consoles.options()
    async with running_stack(options) as stack, async_playwright() as playwright:
        # The sandbox of the browser does not start for root. It opens pages of this machine only.
        browser = await playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = await browser.new_context(viewport=_WINDOW)
        context.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        caller = await Client.connect(stack.servers["caller"].address, namespace=CALLER_NAMESPACE)
        paid = await _send(caller, Order(order_id="1001", amount=42.0))
        await paid.result()
        await _click_through_the_ui(context, stack.servers["caller"].ui or "", folder)
        waiting = await _send(caller, Order(order_id="1002", amount=2500.0))
        await _stop_a_delivery(stack, lambda: start_process(stack, options, "orders"))
        await _use_the_consoles(browser, context, consoles.ports, folder)
        assert (await waiting.result()).status == "approved"
        await browser.close()


async def _send(client: Client, order: Order) -> WorkflowHandle[OrderWorkflow, OrderReceipt]:
    """Start the workflow of *order*."""
    return await client.start_workflow(OrderWorkflow.run, order, id=f"order-{order.order_id}", task_queue=ORDER_QUEUE)


async def _click_through_the_ui(context: BrowserContext, ui: str, folder: Path) -> None:
    """From the order to its payment and back: one link each. The UI opens each link in a new tab of the browser."""
    order = await context.new_page()
    await order.goto(f"{ui}/namespaces/{CALLER_NAMESPACE}/workflows/order-1001")
    link = await _metadata(order, "payment-prod/payment-1001")
    await _save(order, folder, "order")
    async with context.expect_page() as opened:
        await link.click()
    payment = await opened.value
    await expect(payment.get_by_role("heading", name="payment-1001")).to_be_visible()
    link = await _metadata(payment, "order-prod/order-1001")
    await _save(payment, folder, "payment")
    async with context.expect_page() as opened:
        await link.click()
    await expect((await opened.value).get_by_role("heading", name="order-1001")).to_be_visible()


async def _metadata(page: Page, name: str) -> Locator:
    """Open the tab User Metadata, and return the link *name*. The UI renders Markdown in frames; one of them has it."""
    await page.get_by_text("User Metadata", exact=True).click()
    link = page.frame_locator('iframe[src*="%5D(http"]').get_by_role("link", name=name)
    await expect(link).to_be_visible()
    return link


async def _stop_a_delivery(stack: Stack, start_orders: Callable[[], Awaitable[None]]) -> None:
    """End payment 1002 while no receiver listens, and stop its delivery. Then start the order team's process again."""
    handler = await Client.connect(stack.servers["handler"].address, namespace=HANDLER_NAMESPACE, identity="anna")
    payment = handler.get_workflow_handle("payment-1002")
    await _eventually(payment.describe)
    await stop_process(stack.processes.pop("orders"))
    await payment.signal(PaymentWorkflow.approve)
    await payment.result()
    described = await payment.describe()
    call = await described.memo_value("bridge")
    delivery_id = f"bridge-delivery-{call['caller']}:{call['request_id']}-{described.run_id}"

    async def stop() -> None:
        if not (await Deliveries(client=handler).read(delivery_id)).attempts:
            # Only a delivery that a worker has run can run again.
            message = "not attempted yet"
            raise DeliveryError(message)
        await handler.get_workflow_handle(delivery_id).terminate(reason="the receiver is under repair")

    await _eventually(stop)
    await start_orders()


async def _eventually(act: Callable[[], Awaitable[object]]) -> None:
    """Repeat *act* until the workflow or the page exists that it needs."""
    for _ in range(_TRIES):
        try:
            await act()
        except (RPCError, Error, DeliveryError):
            await asyncio.sleep(0.25)
        else:
            return
    await act()


async def _use_the_consoles(browser: Browser, context: BrowserContext, ports: dict[str, int], folder: Path) -> None:
    """Look at the waiting order, then at the delivery that was stopped, and press the button."""
    page = await context.new_page()
    await _log_in(page, ports["caller"])
    await expect(page.get_by_role("link", name="order-1002")).to_be_visible()
    await _save(page, folder, "receiver-console")
    dark = await browser.new_page(viewport=_PHONE, color_scheme="dark")
    await _log_in(dark, ports["handler"])
    await _save(dark, folder, "phone")
    await _log_in(page, ports["handler"])
    await _save(page, folder, "handler-console")
    await page.get_by_role("link", name="bridge-delivery-").click()
    await expect(page.get_by_text("the receiver is under repair")).to_be_visible()
    await _save(page, folder, "delivery")
    # By keyboard: the button is the last element that takes the focus.
    await page.get_by_role("button", name="Deliver again").focus()
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", name="Deliveries that are open or failed")).to_be_visible()


async def _log_in(page: Page, port: int) -> None:
    """Type the token into the field, which has the focus, and press Enter."""
    await _eventually(lambda: page.goto(f"http://127.0.0.1:{port}/"))
    await expect(page.get_by_label("Token")).to_be_focused()
    await page.keyboard.type(_TOKEN)
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Log out")).to_be_visible()


async def _save(page: Page, folder: Path, name: str) -> None:
    path = folder / f"{name}.png"
    await page.screenshot(path=path)
    say(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> NoReturn:
    """Take the pictures."""
    parser = argparse.ArgumentParser(prog="scripts/pictures", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="default: docs/pictures")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)

    async def work() -> int:
        await take_pictures(folder)
        return 0

    end(until_stopped(work))


if __name__ == "__main__":
    main()
