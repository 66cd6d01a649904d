"""The echo shows the faults that would keep calls waiting when a worker starts; it starts and completes nothing."""

import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from multidict import CIMultiDict

from bridge.runtime.http_client import HttpClient
from bridge.security.signatures import MessageKind, MessageSigner
from caller.endpoints import Endpoints
from caller.startup_check import check_endpoints
from scripts.environment.server import Server
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.peer import Message, send
from tests.support.world import World, running_world


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def services(server: Server) -> AsyncIterator[World]:
    """A world with both services and without workers."""
    async with running_world(server, without=("caller", "handler")) as made:
        yield made


async def checked(world: World, caplog: pytest.LogCaptureFixture, *, ahead: timedelta = timedelta(0), **to: Any) -> str:
    """The log line of the check of the one endpoint."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="caller.startup_check"):
        async with HttpClient(user_agent="test") as http:
            clock = lambda: datetime.now(UTC) + ahead
            endpoints = Endpoints(world.caller_settings, http=http, clock=clock)
            callback = to.get("callback", f"{world.receiver.url}/callbacks")
            await check_endpoints(endpoints, callback=callback, clock=clock)
    [record] = [each for each in caplog.records if each.name == "caller.startup_check"]
    return record.getMessage()


async def test_a_ready_endpoint_is_reported_as_ready(services: World, caplog: pytest.LogCaptureFixture) -> None:
    """The endpoint is reached, key and time agree, our callbacks are allowed; also without a receiver."""
    assert await checked(services, caplog) == "bridge.endpoint_ready: payments"
    assert await checked(services, caplog, callback=None) == "bridge.endpoint_ready: payments"


async def test_a_fault_that_would_keep_calls_waiting_is_named(
    services: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong callback host, clock, key or URL and a stopped service are each reported with a remedy."""
    elsewhere = await checked(services, caplog, callback="https://elsewhere.example/callbacks")
    assert "do not allow callbacks to https://elsewhere.example/callbacks" in elsewhere
    assert "differs from the handler's by +180 s" in await checked(services, caplog, ahead=timedelta(minutes=3))
    good, services.keys.start = services.keys.start, key_set()
    try:
        assert "compare keys, key ids and clocks" in await checked(services, caplog)
    finally:
        services.keys.start = good
    services.endpoint_url = services.receiver.url
    try:
        assert "answered 404" in await checked(services, caplog)
    finally:
        services.endpoint_url = services.service.url
    await services.service.stop()
    try:
        assert "cannot connect" in await checked(services, caplog)
    finally:
        await services.service.start()


async def test_a_worker_checks_its_endpoints_when_it_starts(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The worker checks once, and does not wait for the answer."""
    with caplog.at_level(logging.INFO, logger="caller.startup_check"):
        async with running_world(server, without=("handler",)):

            async def is_said() -> None:
                assert [each.getMessage() for each in caplog.records if each.name == "caller.startup_check"] == [
                    "bridge.endpoint_ready: payments"
                ]

            await assert_eventually(is_said)


async def test_the_receiver_answers_an_echo_of_its_handlers(services: World) -> None:
    """The answer is signed and holds the time. Another key, handler or kind is a 401, and nothing is completed."""
    url = f"{services.receiver.url}/callbacks?handler={HANDLER}"
    signer = MessageSigner(services.keys.completion)
    answer = await send(Message(url, CIMultiDict(), b"", kind=MessageKind.ECHO), signer)
    assert answer.status == 200
    assert answer.is_signed
    echo = json.loads(answer.body)
    assert (echo["name"], echo["version"]) == (CALLER, 1)
    assert abs(datetime.fromisoformat(echo["time"]) - datetime.now(UTC)) < timedelta(minutes=1)
    for target, key, kind in (
        (url, services.keys.start, MessageKind.ECHO),
        (url.replace(HANDLER, "stranger"), services.keys.completion, MessageKind.ECHO),
        (url, services.keys.completion, MessageKind.COMPLETION),
    ):
        refused = await send(Message(target, CIMultiDict(), b"", kind=kind), MessageSigner(key))
        assert refused.status == 401
        assert "Signature" not in refused.headers
