"""The echo shows the faults that would keep calls waiting when a worker starts; it starts and completes nothing."""

import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio
from aiohttp import web
from multidict import CIMultiDict

from bridge.security.signatures import MessageKind, MessageSigner, MessageVerifier
from caller import create_app
from caller.settings import Receiver
from caller.startup_check import check_endpoints
from scripts.environment.server import Server, free_ports
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.peer import Message, send
from tests.support.world import Listener, World, running_world


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def services(server: Server) -> AsyncIterator[World]:
    """A world with both services and without workers."""
    async with running_world(server, without=("caller", "handler")) as made:
        yield made


async def checked(world: World, caplog: pytest.LogCaptureFixture, *, ahead: timedelta = timedelta(0), **to: Any) -> str:
    """The log line of the check of the one endpoint."""
    caplog.clear()
    settings = world.caller_settings
    if "callback" in to:
        receiver = Receiver(url=to["callback"], allow_insecure=True) if to["callback"] else None
        settings = settings.model_copy(update={"receiver": receiver})
    with caplog.at_level(logging.INFO, logger="caller.startup_check"):
        await check_endpoints(settings, to.get("namespace", CALLER), clock=lambda: datetime.now(UTC) + ahead)
    [record] = [each for each in caplog.records if each.name == "caller.startup_check"]
    return record.getMessage()


@contextlib.asynccontextmanager
async def proxy_without_upstream(port: int) -> AsyncIterator[None]:
    """A proxy on *port* that answers every request by itself."""

    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="<html>Bad gateway</html>", content_type="text/html")

    app = web.Application()
    app.router.add_post("/{path:.*}", page)
    listener = Listener(port, lambda: app)
    await listener.start()
    try:
        yield
    finally:
        await listener.stop()


async def test_a_ready_endpoint_is_reported_as_ready(services: World, caplog: pytest.LogCaptureFixture) -> None:
    """The endpoint is reached, key and time agree, our callbacks are allowed; also without a receiver."""
    assert await checked(services, caplog) == "bridge.endpoint_ready: endpoint payments is ready"
    assert await checked(services, caplog, callback=None) == "bridge.endpoint_ready: endpoint payments is ready"


async def test_a_fault_that_would_keep_calls_waiting_is_named(
    services: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong clock, key or URL and a stopped service are each reported with a remedy."""
    skewed = await checked(services, caplog, ahead=timedelta(minutes=3))
    assert f"the clock of {HANDLER} differs from ours by -180 s" in skewed
    good, services.keys.start = services.keys.start, key_set()
    try:
        assert "compare keys, key ids and clocks" in await checked(services, caplog)
    finally:
        services.keys.start = good
    services.endpoint_url = services.receiver.url
    try:
        assert "payments: signed answer: answered 404" in await checked(services, caplog)
    finally:
        services.endpoint_url = services.service.url
    await services.service.stop()
    try:
        refused = await checked(services, caplog)
        assert "payments: connection: cannot connect: ConnectionRefusedError: is the peer up" in refused
    finally:
        await services.service.start()


async def test_no_word_of_a_handler_begins_a_line_of_the_log(services: World, caplog: pytest.LogCaptureFixture) -> None:
    """The log of a worker is its team's, which may print messages as they are."""

    async def says(request: web.Request) -> web.StreamResponse:
        problem = {"name": HANDLER, "callback_problem": "down\nERROR:root:paid twice"}
        verified = MessageVerifier(services.keys.start, public_base=services.service.url).verify(
            MessageKind.ECHO, method="POST", raw_path=request.raw_path, headers=request.headers
        )
        headers, body = CIMultiDict({"Content-Type": "application/json"}), json.dumps(problem).encode()
        verified.proof.sign_answer(200, headers, body)
        return web.Response(headers=headers, body=body)

    app = web.Application()
    app.router.add_post("/{path:.*}", says)
    [port] = free_ports(1)
    handler = Listener(port, lambda: app)
    await handler.start()
    good, services.endpoint_url = services.endpoint_url, handler.url
    try:
        line = await checked(services, caplog)
    finally:
        services.endpoint_url = good
        await handler.stop()
    assert "could not reach the receiver: down ERROR:root:paid twice" in line
    assert "\n" not in line


async def test_a_fault_on_the_way_back_is_named(services: World, caplog: pytest.LogCaptureFixture) -> None:
    """The handler service tries the receiver before it answers, and reports what failed with a remedy.

    The receiver compares its namespace with that of the calls.
    """
    way = "bridge.endpoint_not_ready: payments: way back: the handler service could not reach the receiver: "
    elsewhere = await checked(services, caplog, callback="https://elsewhere.example")
    assert elsewhere.startswith(way)
    assert "not allowed: the handler's settings need its address in this caller's callbacks" in elsewhere
    other = await checked(services, caplog, namespace="order-test")
    assert other == way + "the receiver serves namespace order-prod, but the calls are in order-test: move one of them"
    await services.receiver.stop()
    try:
        assert await checked(services, caplog) == way + "cannot connect: ConnectionRefusedError"
        async with proxy_without_upstream(services.receiver.port):
            replaced = await checked(services, caplog)
            assert replaced.startswith(way)
            assert "answered 502" in replaced
            assert "text/html" in replaced
            assert "Probably a proxy's own answer" in replaced
        good, services.keys.completion = services.keys.completion, key_set()
        await services.receiver.start()
        services.keys.completion = good
        wrong_key = await checked(services, caplog)
        assert wrong_key.startswith(way)
        assert "compare keys, key ids and clocks" in wrong_key
    finally:
        await services.receiver.stop()
        await services.receiver.start()
    assert await checked(services, caplog) == "bridge.endpoint_ready: endpoint payments is ready"


async def test_a_receiver_whose_clock_differs_is_named(services: World, caplog: pytest.LogCaptureFixture) -> None:
    """The handler compares its clock with the time in the receiver's echo."""
    settings, later = services.caller_settings, lambda: datetime.now(UTC) + timedelta(minutes=3)
    await services.receiver.stop()
    other = Listener(services.receiver.port, lambda: create_app(settings, client=services.caller_client, clock=later))
    await other.start()
    try:
        assert f"the clock of {CALLER} differs from ours by +180 s" in await checked(services, caplog)
    finally:
        await other.stop()
        await services.receiver.start()


async def test_the_receiver_is_tried_only_for_a_caller_with_a_valid_signature(services: World) -> None:
    """Neither a wrong key nor another callback host makes the service send a request; a valid echo makes one."""
    tried: list[str] = []

    async def note(request: web.Request) -> web.StreamResponse:
        tried.append(request.query_string)
        return web.Response(status=502)

    app = web.Application()
    app.router.add_post("/{path:.*}", note)
    await services.receiver.stop()
    other = Listener(services.receiver.port, lambda: app)
    await other.start()
    base = f"{services.service.url}/c/{CALLER}?callback="
    ours = quote(f"{services.receiver.url}/callbacks", safe="")
    try:
        for target, key, status in (
            (base + ours, key_set(), 401),
            (base + quote(f"http://127.0.0.1:{services.receiver.port}/elsewhere", safe=""), services.keys.start, 200),
            (base + ours, services.keys.start, 200),
        ):
            message = Message(target, CIMultiDict(), b"", kind=MessageKind.ECHO)
            assert (await send(message, MessageSigner(key))).status == status
        assert tried == [f"handler={HANDLER}"]
    finally:
        await other.stop()
        await services.receiver.start()


async def test_a_receiver_that_hangs_does_not_hold_the_echo(services: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer says that the receiver gave none in time."""
    monkeypatch.setattr("handler.delivery.callback_client._ECHO_TIMEOUT", timedelta(milliseconds=300))
    await services.receiver.stop()
    silent = socket.create_server(("127.0.0.1", services.receiver.port))
    callback = quote(f"{services.receiver.url}/callbacks", safe="")
    message = Message(f"{services.service.url}/c/{CALLER}?callback={callback}", CIMultiDict(), b"")
    message.kind = MessageKind.ECHO
    try:
        answer = await send(message, MessageSigner(services.keys.start))
        assert answer.is_signed
        assert json.loads(answer.body)["callback_problem"] == "no answer in time"
    finally:
        silent.close()
        await services.receiver.start()


async def test_a_receiver_that_cannot_sign_is_not_tried(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """It may have no echo. Only the list of allowed callbacks is compared."""

    def prepare(world: World) -> None:
        world.peer_options = {"answers": "unsigned"}

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        assert await checked(world, caplog) == "bridge.endpoint_ready: endpoint payments is ready"
        assert "not allowed" in await checked(world, caplog, callback="https://elsewhere.example")


async def test_a_worker_checks_its_endpoints_when_it_starts(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The worker checks once, and does not wait for the answer."""
    with caplog.at_level(logging.INFO, logger="caller.startup_check"):
        async with running_world(server, without=("handler",)):

            async def is_said() -> None:
                assert [each.getMessage() for each in caplog.records if each.name == "caller.startup_check"] == [
                    "bridge.endpoint_ready: endpoint payments is ready"
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
