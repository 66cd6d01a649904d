"""Makes every exchange that docs/protocol.md shows, on a real server.

`python -m tests.support.record_protocol` writes them into the document anew; `tests/e2e/test_protocol.py` compares.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

from multidict import CIMultiDict
from temporalio import workflow
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.worker import Worker

import bridge
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner
from bridge.workflow.call import Transport
from caller import CallerPlugin
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
from handler.settings import CallerPeer
from scripts.environment.server import Server, running_server
from scripts.environment.stack import ROOT
from tests.conftest import ALLOW_CALLBACKS_TO_LOOPBACK
from tests.support import peer
from tests.support.callers import CallPlan
from tests.support.exchanges import Exchange, Page, Recorder, Stable
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask
from tests.support.world import World, running_world

SHOP, SECRET = "shop", new_key()
DOCUMENT = ROOT / "docs" / "protocol.md"
START, CANCEL, OLD_CANCEL, COMPLETION = (
    *("/c/{caller}/{service}/{operation}", "/c/{caller}/{service}/{operation}/cancel"),
    *("/c/{caller}/{service}/{operation}/{token}/cancel", "/callbacks/{callback_id}"),
)


@workflow.defn(name="OrderWorkflow", sandboxed=False)
class QuickOrder:
    """A plan that renews once, after a second."""

    @workflow.run
    async def run(self, request: PaymentRequest, transport: Transport) -> PaymentResponse:
        payments = bridge.create_client(
            service=PaymentService,
            endpoint="payments",
            transport=transport,
            first_lease=timedelta(seconds=10 if transport == "wait" else 1.5),
            renewals=bridge.Renewals(initial=timedelta(hours=1)),
        )
        return await payments.execute_operation(
            PaymentService.process, request, schedule_to_close_timeout=timedelta(days=7)
        )


class Scenes:
    """Makes the exchanges, and names those that the document shows."""

    def __init__(self, world: World, recorder: Recorder, shown: dict[str, Exchange]) -> None:
        self._world = world
        self._recorder = recorder
        self.shown = shown

    async def take(
        self, name: str, route: str, status: int, *, state: str | None = None, order: int | None = None
    ) -> Exchange:
        """Wait for an exchange without a name, and name it; *order* is the order that it should belong to."""
        about = "" if order is None else f"{self._world.id}-{order}"

        async def found() -> Exchange:
            for each in self._recorder.exchanges:
                is_it = each.route == route and each.status == status and about in each.text()
                # Only a start that the caller knows to run has a token. A late completion may cause one more of them.
                is_renewal = route == START and each.request.header("Nexus-Operation-Token") != ""
                is_it = is_it and is_renewal == (name == "renewal")
                if is_it and each not in self.shown.values() and state in {None, _state(each)}:
                    return each
            raise AssertionError(name, [(each.route, each.status) for each in self._recorder.exchanges])

        self.shown[name] = await assert_eventually(found)
        return self.shown[name]

    async def order(self, number: int, amount: float, transport: Transport = "callback") -> WorkflowHandle[Any, Any]:
        order_id = f"{self._world.id}-{number}"
        return await self._world.caller_client.start_workflow(
            QuickOrder.run,
            args=[PaymentRequest(order_id, amount), transport],
            id=f"order-{order_id}",
            task_queue=f"{self._world.order_queue}-quick",
        )

    async def play(self) -> None:
        for scene in (
            *(self._approved, self._declined, self._canceled, self._otherwise, self._rejected),
            *(self._refused, self._asked),
        ):
            await scene()

    async def _approved(self) -> None:
        order = await self.order(7, 5000)
        await self.take("start", START, 201)
        await self.take("renewal", START, 201)
        await self._payment(7).signal("approve")
        await self.take("completion succeeded", COMPLETION, 200, state="succeeded")
        await order.result()
        await self._ended(self._payment(7))
        again = await self.order(7, 5000)
        await self.take("start of what is done", START, 200)
        await again.result()

    async def _declined(self) -> None:
        order = await self.order(8, 42_000)
        await self.take("completion failed", COMPLETION, 200, state="failed")
        await self._ended(order)
        await self._ended(self._payment(8))
        await self._ended(await self.order(8, 42_000))
        await self.take("start of what has failed", START, 424, order=8)

    async def _canceled(self) -> None:
        order = await self.order(9, 5000)

        async def is_known() -> None:
            activity = await self._world.pending(order)
            assert activity is not None
            assert activity.heartbeat_details.payloads, "no token yet"

        await assert_eventually(is_known)
        await order.cancel()
        cancel = await self.take("cancel", CANCEL, 202)
        await self.take("completion canceled", COMPLETION, 200, state="canceled")
        await self._ended(order)
        token = cancel.request.header("Nexus-Operation-Token")
        path = cancel.request.first_line.split()[1].replace("/cancel", f"/{token}/cancel")
        await self._send(MessageKind.CANCEL, f"{self._world.service.url}{path}", {"Request-Timeout": "9999ms"}, b"")
        await self.take("cancel in the path", OLD_CANCEL, 202)

    async def _otherwise(self) -> None:
        await (await self.order(10, 42, transport="wait")).result()
        await self.take("start held", START, 200, order=10)
        polled = await self.order(11, 5000, transport="poll")
        await self.take("start polled", START, 201, order=11)
        await polled.terminate()
        url = f"{self._world.service.url}/c/{SHOP}/PaymentService/process"
        headers = {
            "Authorization": f"Bearer {SECRET}",
            "Content-Type": "application/json",
            "Nexus-Request-Id": "order-12",
        }
        order = f'{{"order_id": "{self._world.id}-12", "amount": 5000}}'
        await self._send(None, url, headers, order.encode())
        await self.take("start with a secret", START, 201, order=12)

    async def _rejected(self) -> None:
        order = await self.order(13, 5000)
        await self._world.until_attempt(order, 3, in_backoff=True)
        await self._payment(13).signal("reject")
        await self.take("completion too early", COMPLETION, 503, state="failed", order=13)
        await self._ended(order)

    async def _refused(self) -> None:
        await self._ended(await self.order(14, -1))
        await self.take("start refused", START, 400, order=14)
        start = self.shown["start"].request
        url = self._world.service.url + start.first_line.split()[1]
        await self._send(MessageKind.START, url.replace("process", "proces"), {"Nexus-Request-Id": "1"}, b"{}")
        await self.take("start of nothing", START, 404)
        await self._send(None, url, {"Nexus-Request-Id": "1"}, b"{}")
        await self.take("start not authenticated", START, 401)
        # The first completion again, and then with another state.
        first = self.shown["completion succeeded"].request
        url = self._world.receiver.url + first.first_line.split()[1]
        kept = {name: value for name, value in first.headers if name in {"Content-Type", "Nexus-Link"}}
        await self._send(MessageKind.COMPLETION, url, {**kept, "Nexus-Operation-State": "succeeded"}, first.body)
        await self.take("completion repeated", COMPLETION, 200, state="succeeded")
        failure = b'{"message":"card declined"}'
        await self._send(MessageKind.COMPLETION, url, {**kept, "Nexus-Operation-State": "failed"}, failure)
        await self.take("completion contradicted", COMPLETION, 409, state="failed")
        await self._send(None, url, {**kept, "Nexus-Operation-State": "succeeded"}, first.body)
        await self.take("completion not authenticated", COMPLETION, 401)

    async def _asked(self) -> None:
        handle = await self._world.call(Ask(key=self._world.key("7")), CallPlan(first_lease=600, operation="minded"))
        await self.take("question", COMPLETION, 200, state="running")
        await handle.terminate()
        await self.take("question too late", COMPLETION, 410, state="running")

    def _payment(self, number: int) -> WorkflowHandle[Any, Any]:
        return self._world.handler_client.get_workflow_handle(f"payment-{self._world.id}-{number}")

    async def _ended(self, order: WorkflowHandle[Any, Any]) -> None:
        with suppress(WorkflowFailureError):
            await order.result()

    async def _send(self, kind: MessageKind | None, url: str, headers: dict[str, str], body: bytes) -> None:
        key_set = self._world.keys.completion if kind is MessageKind.COMPLETION else self._world.keys.start
        message = peer.Message(url=url, headers=CIMultiDict(headers), body=body, kind=kind or MessageKind.START)
        await peer.send(message, None if kind is None else MessageSigner(key_set))


def _state(exchange: Exchange) -> str:
    return exchange.request.header("Nexus-Operation-State")


async def record(server: Server) -> tuple[dict[str, Exchange], dict[str, Exchange]]:
    """Every exchange by name: as sent, and as the document shows it."""
    recorder, taken = Recorder(), dict[str, Exchange]()
    async with _running_scenes(server, recorder, taken, prepare=_with_a_shop) as (world, scenes):
        await scenes.play()
    stable = Stable([world])
    return taken, {name: stable.exchange(each) for name, each in taken.items()}


def _with_a_shop(world: World) -> None:
    settings, key_set = world.handler_settings, KeySet.model_validate({"signing": "k1", "keys": {"k1": SECRET}})
    shop = CallerPeer(auth="bearer", bearer_keys=key_set, operations=("PaymentService/*",))
    changes = {"abandoned_check_s": 0.5, "callers": {**settings.callers, SHOP: shop}}
    world.override_handler_settings(settings.model_copy(update=changes))


@asynccontextmanager
async def _running_scenes(
    server: Server, recorder: Recorder, taken: dict[str, Exchange], *, prepare: Callable[[World], None]
) -> AsyncIterator[tuple[World, Scenes]]:
    def prepare_and_record(world: World) -> None:
        prepare(world)
        recorder.attach(world.service)
        recorder.attach(world.receiver)

    async with running_world(server, prepare=prepare_and_record) as world:
        worker = Worker(
            world.caller_client,
            task_queue=f"{world.order_queue}-quick",
            workflows=[QuickOrder],
            plugins=[CallerPlugin(world.caller_settings)],
        )
        async with worker:
            yield world, Scenes(world, recorder, taken)


async def _main() -> None:
    logging.getLogger("temporalio").setLevel(logging.ERROR)
    async with running_server(namespaces=[CALLER, HANDLER], dynamic_config=[ALLOW_CALLBACKS_TO_LOOPBACK]) as server:
        _, shown = await record(server)
    page = Page(DOCUMENT.read_text())
    DOCUMENT.write_text(page.with_exchanges({name: each.text() for name, each in shown.items()}))


if __name__ == "__main__":
    asyncio.run(_main())
