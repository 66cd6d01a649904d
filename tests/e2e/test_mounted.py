"""Receiver and handler service as parts of a team's existing applications."""

import logging
from types import ModuleType
from typing import Any

import pytest
from aiohttp import ClientSession, web
from pytest_aiohttp import AiohttpClient

import caller
import handler
from bridge.http.application import AccessLogger
from bridge.runtime.settings import SettingsError
from scripts.environment.server import Server
from tests.support import services, targets
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, Keys, assert_eventually, caller_settings, handler_settings
from tests.support.targets import Ask, Reply
from tests.support.world import running_world

MOUNT = "/bridge"


async def test_a_call_crosses_two_mounted_services(server: Server) -> None:
    """The public URL has the prefix for start, cancel, renewal, and an outcome over the parent's body limit."""
    async with running_world(server, mount=MOUNT) as world:
        big = Ask(key=world.key(), size=1_500_000)
        assert await (await world.call(big, CallPlan(first_lease=600))).result() == Reply("", "b" * 1_500_000)
        assert (await world.service.answered(), await world.receiver.answered()) == ([201], [200])

        waiting = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(waiting, CallPlan(first_lease=1, renewal=1))
        await world.until_attempt(handle, 2)
        await handle.cancel()

        async def canceled() -> None:
            assert 202 in world.service.statuses

        await assert_eventually(canceled)


@pytest.mark.parametrize("side", ["caller", "handler"])
async def test_an_application_connects_by_itself_and_closes_with_its_parent(
    server: Server, side: str, aiohttp_client: AiohttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The application is below two prefixes; TEMPORAL_ADDRESS and TEMPORAL_NAMESPACE configure the connection."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.setenv("TEMPORAL_NAMESPACE", CALLER if side == "caller" else HANDLER)
    keys, url = Keys(), "http://127.0.0.1:1/team/bridge"
    if side == "caller":
        app = caller.create_app(caller_settings(keys, receiver_url=url, endpoint_url=url))
    else:
        settings = handler_settings(keys, receiver_url=url, service_url=url, task_queue="mounted", sweep=False)
        app = handler.create_app(settings, services)
    parent, team = web.Application(), web.Application()
    team.add_subapp("/bridge", app)
    parent.add_subapp("/team", team)
    client = await aiohttp_client(parent)
    for path, status in (("/livez", 200), ("/readyz", 200), ("/c/order-prod/S/o", 404)):
        answer = await client.get(f"/team/bridge{path}")
        assert answer.status == status, path
        assert answer.headers["Server"] == "bridge"
    route = "/callbacks/1" if side == "caller" else "/c/order-prod/S/o"
    assert (await client.post(f"/team/bridge{route}")).status == 401
    assert (await client.get("/team/elsewhere")).content_type == "text/plain"
    await client.close()


async def test_a_parent_that_has_read_the_body_does_no_harm(server: Server) -> None:
    """A middleware that logs bodies reads them first."""

    async def read(request: web.Request) -> None:
        await request.read()

    async with running_world(server, mount=MOUNT) as world:
        for each in (world.service, world.receiver):
            each.before = read
        ask = Ask(key=world.key(), text="read twice")
        assert await (await world.call(ask)).result() == Reply("read twice")


async def test_our_access_logger_writes_no_token_for_a_mounted_receiver(
    server: Server, aiohttp_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp's own access logger logs the query, which holds the callback token."""
    keys = Keys()
    async with running_world(server, without=("caller", "handler", "receiver", "service")) as world:
        app = caller.create_app(
            caller_settings(keys, receiver_url="http://127.0.0.1:1", endpoint_url="http://127.0.0.1:1"),
            client=world.caller_client,
        )
        parent = web.Application()
        parent.add_subapp(MOUNT, app)
        with caplog.at_level(logging.INFO):
            running = await aiohttp_server(parent, access_log_class=AccessLogger)
            async with ClientSession() as session:
                url = running.make_url(f"{MOUNT}/callbacks/x?sig=secret-token")
                async with session.post(url) as answer:
                    assert answer.status == 401
    assert "secret-token" not in caplog.text
    [record] = [each for each in caplog.records if each.getMessage().startswith("bridge.http_request")]
    assert vars(record)["bridge.route"] == "/bridge/callbacks/{callback_id}"


def test_a_module_that_offers_nothing_is_refused_when_the_application_is_made() -> None:
    """The error names the module and its file."""
    settings = handler_settings(Keys(), receiver_url="http://127.0.0.1:1", service_url="http://127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"empty \(None\) has no workflow decorated"):
        handler.create_app(settings, ModuleType("empty"))


def test_the_receiver_needs_its_settings() -> None:
    """Settings without a receiver are for callers that poll."""
    settings = caller_settings(
        Keys(),
        receiver_url="http://127.0.0.1:1",
        endpoint_url="http://127.0.0.1:1",
        endpoint={"transport": "poll"},
        receiver=None,
        callback_keys=None,
    )
    with pytest.raises(SettingsError, match="no receiver in the settings"):
        caller.create_app(settings)


def test_a_module_of_workflows_is_served_whole() -> None:
    """The decorated workflows and the service handlers of the module are served."""
    settings = handler_settings(Keys(), receiver_url="http://127.0.0.1:1", service_url="http://127.0.0.1:1")
    assert handler.create_app(settings, targets) is not None
