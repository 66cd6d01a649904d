"""The console of each side on a real call, without scripts: opens, filters, shows a timeline, redelivers, refuses."""

import asyncio
import re
import subprocess

from aiohttp import ClientSession, web

from bridge.console.sessions import hash_token
from bridge.runtime.settings import load
from caller.settings import CallerSettings
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.browsing import browsing, console_settings
from tests.support.callers import CallPlan
from tests.support.commands import BRIDGE
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.settings_files import Configured, caller_tree
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

AGO = r"\d+\w ago"
PAYMENTS_UI = "https://payments-ui.example"


async def test_a_refused_outcome_is_found_shown_and_delivered_again(server: Server) -> None:
    """From the list to the delivery, its run and the button. Afterwards the waiting call has its outcome."""
    console = console_settings()

    def prepare(world: World) -> None:
        world.handler_options = {"console": console}

    async with running_world(server, prepare=prepare) as world, browsing(console["port"]) as browser:

        async def refuse(request: web.Request) -> web.StreamResponse:
            return world.signed_response(request, 400)

        world.receiver.before = refuse
        ask = Ask(key=world.key(), text="by console")
        handle = await world.call(ask, CallPlan(first_lease=600))
        assert await browser.request("GET", "/") == 401
        assert await browser.log_in() == 303

        async def failed() -> str:
            text = await browser.open(state="failed", caller=CALLER)
            [found] = [part for part in text.split("bridge-delivery-") if f"probe-{ask.key}" in part]
            return found

        async def listed() -> str:
            try:
                return await failed()
            except ValueError:
                raise AssertionError from None

        row = await assert_eventually(listed)
        assert f"failed ProbeService/probe probe-{ask.key} {CALLER}" in row
        delivery_id = f"bridge-delivery-{row.split()[0]}"
        for query in ({"state": "delivered"}, {"caller": "another"}):
            assert delivery_id not in await browser.open(**query)
        assert delivery_id in await browser.open(state="a state of a newer release")
        text = await browser.follow(delivery_id)
        assert "last error bridge.CompletionRefused: the receiver refused the completion" in text
        text = await browser.follow("The run that has this outcome, and its caller")
        assert f"called by {CALLER}/{handle.id}" in text
        assert re.search(rf"started {AGO} .* closed {AGO} .* deadline in ", text)
        world.receiver.before = None
        assert await browser.submit("redeliver") == 303
        assert await handle.result() == Reply("by console")

        async def delivered() -> None:
            assert "state delivered" in await browser.open(id=delivery_id)

        await assert_eventually(delivered)
        assert "Deliver again" not in browser.text
        [token] = {each.split('"')[0] for each in browser.page.split('name="csrf" value="')[1:]}
        assert await browser.request("POST", "/redeliver", data={"csrf": token, "id": delivery_id}) == 409
        assert "already delivered" in browser.text
        assert await browser.request("GET", "/?workflow_id=no-such-workflow") == 404
        assert await browser.request("GET", "/?id=no-such-delivery") == 404


async def test_a_waiting_call_and_what_a_stranger_sent_are_seen(server: Server) -> None:
    """The caller's pages show the call and its target. Each side shows its peers: the last good exchange, and why the
    last message in a peer's name was refused.
    """
    consoles = {side: console_settings() for side in ("caller", "handler")}

    def prepare(world: World) -> None:
        keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
        world.caller_options = {
            "console": consoles["caller"],
            "handlers": {HANDLER: {**keys, "ui_url": PAYMENTS_UI}},
        }
        world.handler_options = {"console": consoles["handler"]}

    async with (
        running_world(server, prepare=prepare) as world,
        browsing(consoles["caller"]["port"]) as browser,
        browsing(consoles["handler"]["port"]) as other,
        ClientSession() as stranger,
    ):
        await asyncio.gather(browser.log_in(), other.log_in())

        async def checked() -> None:
            assert re.search(rf"{HANDLER} {AGO} - -", await browser.open())

        # The check at the start of the caller's worker has the handler ask the receiver for an echo.
        await assert_eventually(checked)
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(first_lease=1))
        await world.until_attempt(handle, 2, in_backoff=True)
        query = {"query": f'WorkflowId = "{handle.id}"', "endpoint": "payments"}

        async def listed() -> None:
            assert f"{handle.id} payments ProbeService/probe {HANDLER}/probe-{ask.key}" in await browser.open(**query)

        await assert_eventually(listed)
        assert "Nothing found." in await browser.open(**query | {"endpoint": "another"})
        await browser.open(**query)
        text = await browser.follow(handle.id)
        assert "state waiting" in text
        assert "last error bridge.StillRunning: still running: " in text
        assert f'<a href="{PAYMENTS_UI}/namespaces/{HANDLER}/workflows/probe-{ask.key}/' in browser.page
        assert re.search(rf"{CALLER} {AGO} - -", await other.open())

        await world.target(ask).signal("say", "done")
        await handle.result()
        assert "state succeeded" in await browser.open(workflow_id=handle.id)
        await world.receiver.answered()
        assert re.search(rf"{HANDLER} {AGO} - -", await browser.open())
        for url in (f"{world.service.url}/c/{CALLER}/S/<b>", f"{world.receiver.url}/callbacks/x?sig=<b>"):
            async with stranger.post(url) as response:
                assert response.status == 401
        assert re.search(rf"{CALLER} {AGO} {AGO} 401 Signature-Input missing", await other.open())
        assert re.search(rf"unknown - {AGO} 401 token malformed", await browser.open())
        assert await browser.request("GET", "/", params={"query": "no list filter"}) == 502
        assert "Temporal answered INVALID_ARGUMENT" in browser.text


def test_the_command_makes_a_token_that_its_entry_in_the_settings_accepts(configured: Configured) -> None:
    """The settings hold only the hash."""
    done = subprocess.run(
        [*BRIDGE, "console", "token", "anna"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    first, entry = done.stdout.split("\n\n")
    token = first.rpartition(" ")[2]
    assert len(token) == 43
    path = configured(caller_tree())
    path.write_text(f"{path.read_text()}\n{entry}")
    settings = load(CallerSettings)
    assert settings.console is not None
    assert settings.console.tokens == {"anna": hash_token(token)}
    assert (settings.console.host, settings.console.port) == ("127.0.0.1", 8090)
