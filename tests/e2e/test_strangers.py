"""A proxy's answer in place of a peer's ends nothing, and is shown."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import NexusOperationError

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import assert_eventually, key_set
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

JSON = {"Content-Type": "application/json"}
HTML = {"Content-Type": "text/html", "Server": "nginx/1.22.1"}
HANDLER_ERROR = (
    b'{"message":"no","metadata":{"type":"nexus.HandlerError","bridge":"outcome-unknown"},'
    b'"details":{"type":"NOT_FOUND","retryableOverride":false}}'
)
PAGES = [
    pytest.param(200, HTML, b"<html>Back soon</html>", id="maintenance page"),
    pytest.param(200, JSON, b'{"key":"maintenance"}', id="JSON page"),
    pytest.param(200, {}, b"", id="empty page"),
    pytest.param(200, JSON | {"Nexus-Operation-State": "succeeded"}, b'{"text":"forged"}', id="forged result"),
    pytest.param(201, JSON, b'{"token":"t","state":"running"}', id="forged 201"),
    pytest.param(301, {"Location": "http://127.0.0.1:1/"}, b"", id="redirect"),
    pytest.param(400, JSON, HANDLER_ERROR, id="forged refusal"),
    pytest.param(401, JSON, b"{}", id="401"),
    pytest.param(403, HTML, b"<html>Forbidden</html>", id="403"),
    pytest.param(404, {}, b"", id="bare 404"),
    pytest.param(404, JSON, HANDLER_ERROR, id="marked 404"),
    pytest.param(413, HTML, b"<html>Too large</html>", id="413"),
    pytest.param(414, HTML, b"<html>Too large</html>", id="414"),
    pytest.param(424, JSON | {"Nexus-Operation-State": "failed"}, b'{"message":"forged"}', id="forged failure"),
    pytest.param(431, HTML, b"<html>Too large</html>", id="431"),
    pytest.param(502, HTML, b"<html>Bad gateway</html>", id="502"),
]


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def shared(server: Server) -> AsyncIterator[World]:
    async with running_world(server) as world:
        yield world


@pytest.fixture
def calm(shared: World) -> World:
    """The shared world, without a proxy between the sides."""
    for listener in (shared.service, shared.receiver):
        listener.before = listener.change = None
        listener.requests.clear()
    return shared


def first(count: int, status: int, headers: dict[str, str], body: bytes) -> Callable[[web.Request], Any]:
    """Answers the first *count* requests in place of the service."""
    left = count

    async def answer(_: web.Request) -> web.StreamResponse | None:
        nonlocal left
        left -= 1
        return web.Response(status=status, headers=headers, body=body or None) if left >= 0 else None

    return answer


@pytest.mark.parametrize(("status", "headers", "body"), PAGES)
async def test_a_page_in_place_of_the_handler_ends_no_call(
    calm: World, status: int, headers: dict[str, str], body: bytes
) -> None:
    """Also at the first attempt, the call goes on with the handler's answer."""
    calm.service.before = first(1, status, headers, body)
    handle = await calm.call(Ask(key=calm.key(), text="true"), CallPlan(first_lease=5, renewal=1))
    assert await handle.result() == Reply("true")
    assert status in calm.service.statuses


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [each for each in PAGES if each.values[0] != 301]
    + [pytest.param(409, JSON, b"{}", id="409"), pytest.param(410, {}, b"", id="410")],
)
async def test_a_page_in_place_of_the_receiver_ends_no_delivery(
    calm: World, status: int, headers: dict[str, str], body: bytes
) -> None:
    """After an unsigned answer, 200 included, the outcome is sent again until the receiver itself has it."""
    calm.receiver.before = first(1, status, headers, body)
    handle = await calm.call(Ask(key=calm.key(), text="true"), CallPlan(first_lease=600))
    assert await handle.result() == Reply("true")
    assert status in await calm.receiver.answered()


@pytest.mark.parametrize("then", [404, 403, 401, 409, 200])
async def test_a_proxys_answer_does_not_replace_a_lost_answer(calm: World, then: int) -> None:
    """The proxy answers 504 after the start and then a bare status. When it is gone, the call gets its result."""
    answers = iter([504, then])

    def change(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        status = next(answers, None)
        return answer if status is None else web.Response(status=status)

    calm.service.change = change
    ask = Ask(key=calm.key(), behaviour="wait")
    handle = await calm.call(ask, CallPlan(first_lease=5, renewal=1))
    target = await calm.until_started(ask)

    async def is_well() -> None:
        # The counter may still hold an answer of the previous test.
        assert {504, then, 201} <= set(calm.service.statuses)

    await assert_eventually(is_well)
    await target.signal("say", "paid")
    assert await handle.result() == Reply("paid")


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Content-Security-Policy": "default-src 'self'"}, id="CSP"),
        pytest.param({"Content-Language": "en"}, id="language"),
        pytest.param({"Content-Type": "application/json; charset=utf-8"}, id="charset"),
        pytest.param({"Strict-Transport-Security": "max-age=1"}, id="HSTS"),
        pytest.param({"Nexus-Operation-State": "failed"}, id="a header of ours, uncovered"),
    ],
)
@pytest.mark.parametrize("transport", ["callback", "wait"])
async def test_a_header_added_by_a_proxy_does_no_harm(calm: World, headers: dict[str, str], transport: Any) -> None:
    """Only covered values are read: the result does not change, and no workflow is stuck."""

    def change(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        for name, value in headers.items():
            if name in answer.headers or not name.startswith("Content-Type"):
                if name == "Nexus-Operation-State" and name in answer.headers:
                    continue
                answer.headers[name] = value
        return answer

    calm.service.change = change
    handle = await calm.call(Ask(key=calm.key(), text="true"), CallPlan(transport=transport, first_lease=20))
    assert await asyncio.wait_for(handle.result(), 15) == Reply("true")


@pytest.mark.parametrize(
    "part", ["body", "status", "Nexus-Operation-State", "Content-Type", "Signature", "Repr-Digest"]
)
async def test_an_answer_that_a_proxy_changed_does_not_count(calm: World, part: str) -> None:
    """The proxy changes the first answer and passes on the next; the call ends with the true outcome."""
    spoilt: list[str] = []

    def change(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        assert isinstance(answer, web.Response)
        if spoilt or answer.status != 200:
            return answer
        spoilt.append(part)
        match part:
            case "body":
                return web.Response(status=200, headers=answer.headers, body=b'{"text":"forged","blob":""}')
            case "status":
                return web.Response(status=424, headers=answer.headers, body=answer.body)
            case _:
                answer.headers[part] = (
                    "failed" if part == "Nexus-Operation-State" else answer.headers[part][:-3] + "x=:"
                )
        return answer

    calm.service.change = change
    handle = await calm.call(Ask(key=calm.key(), text="true"), CallPlan(transport="wait", first_lease=20, renewal=1))
    assert await handle.result() == Reply("true")
    assert spoilt == [part]


async def test_the_answer_to_another_request_does_not_count(calm: World) -> None:
    """A refusal that a proxy replays ends no other call, and not the same call after a repeated start."""
    kept: list[web.Response] = []

    def keep(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
        assert isinstance(answer, web.Response)
        kept.append(web.Response(status=answer.status, headers=answer.headers, body=answer.body))
        return answer

    calm.service.change = keep
    refused = await calm.call(Ask(key=calm.key(), behaviour="refused"), CallPlan())
    with pytest.raises(WorkflowFailureError) as raised:
        await refused.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    calm.service.change = None
    [refusal] = kept
    assert refusal.status == 400
    calm.service.before = first(2, 400, dict(refusal.headers), refusal.body if isinstance(refusal.body, bytes) else b"")
    handle = await calm.call(Ask(key=calm.key(), text="true"), CallPlan(first_lease=5, renewal=1))
    assert await handle.result() == Reply("true")
    assert calm.service.statuses.count(400) == 3


async def pending_text(world: World, handle: WorkflowHandle[Any, Any], *words: str) -> None:
    async def is_shown() -> None:
        activity = await world.pending(handle)
        assert activity is not None
        for word in words:
            assert word in activity.last_failure.message

    await assert_eventually(is_shown)


async def test_the_sender_of_an_answer_in_place_of_the_handler_is_shown(
    calm: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Status, size, sender and remedy are on the pending activity, and in one warning after three answers in a row."""
    calm.service.before = first(100, 413, HTML | {"Via": "1.1 edge"}, b"<html>")
    with caplog.at_level(logging.WARNING):
        handle = await calm.call(Ask(key=calm.key()), CallPlan(first_lease=5, deadline=600))
        words = ("413", "Server: bridge", "1.1 edge", "text/html", "6 bytes", "not signed", "4 MiB")
        await pending_text(calm, handle, *words)

        async def is_warned() -> None:
            warnings = [each for each in caplog.records if each.message.startswith("bridge.unsigned_answers")]
            assert warnings, "no warning yet"
            for word in words:
                assert word in getattr(warnings[0], "bridge.answer")

        await assert_eventually(is_warned)
    calm.service.before = None
    assert await handle.result() == Reply("")


async def test_a_wrong_key_ends_no_call_and_is_shown(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The caller's side shows the remedy; the other side's log names the check that failed."""
    async with running_world(server) as world:
        await world.service.stop()
        good, world.keys.start = world.keys.start, key_set()
        await world.service.start()
        world.keys.start = good
        handle = await world.call(Ask(key=world.key(), text="true"), CallPlan(first_lease=5))
        with caplog.at_level(logging.INFO, logger="bridge.access"):
            await pending_text(world, handle, "401", "compare keys, key ids and clocks")
        await world.service.stop()
        await world.service.start()
        assert await handle.result() == Reply("true")


async def test_a_callback_host_that_is_not_allowed_ends_no_call_and_is_shown(server: Server) -> None:
    """The handler signs this refusal, and marks it as retryable, because it is a fault of the deployment."""

    def prepare(world: World) -> None:
        world.peer_options = {"callbacks": [{"url": "https://elsewhere.example/callbacks"}]}

    async with running_world(server, prepare=prepare) as world:
        handle = await world.call(Ask(key=world.key(), text="true"), CallPlan(first_lease=1, renewal=1))
        await pending_text(world, handle, "not allowed", "in this caller's callbacks")
        assert world.service.statuses[0] == 400
        world.peer_options = {}
        await world.service.stop()
        await world.service.start()
        assert await handle.result() == Reply("true")


async def test_a_refusal_after_an_earlier_attempt_says_that_the_operation_may_run(calm: World) -> None:
    """The first answer was lost, and the caller's side cannot find out whether it started the operation."""
    calm.service.before = first(1, 502, HTML, b"")
    handle = await calm.call(Ask(key=calm.key(), behaviour="refused"), CallPlan(first_lease=5))
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    assert "an earlier attempt may have started the operation" in str(raised.value.cause.cause)


async def test_a_handler_that_cannot_sign_is_named_in_the_settings(server: Server) -> None:
    """An answer of the handler counts if a proxy would not send it by accident; a page still ends nothing."""

    def prepare(world: World) -> None:
        keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
        world.caller_options = {"handlers": {"payment-prod": {**keys, "answers": "unsigned"}}}

    async with running_world(server, prepare=prepare) as world:

        def strip(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
            for name in ("Signature", "Signature-Input", "Repr-Digest"):
                answer.headers.pop(name, None)
            return answer

        world.service.change = strip
        world.service.before = first(1, 200, JSON, b'{"key":"maintenance"}')
        handle = await world.call(Ask(key=world.key(), text="true"), CallPlan(first_lease=5, renewal=1))
        assert await handle.result() == Reply("true")
        held = await world.call(Ask(key=world.key(), text="held"), CallPlan(transport="wait", first_lease=20))
        assert await held.result() == Reply("held")


async def test_a_receiver_that_cannot_sign_is_named_in_the_settings(server: Server) -> None:
    """The receiver's 200 is accepted; without the setting the outcome would be sent again."""

    def prepare(world: World) -> None:
        world.peer_options = {"answers": "unsigned"}

    async with running_world(server, prepare=prepare) as world:

        def strip(_: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
            return web.Response(status=answer.status)

        world.receiver.change = strip
        ask = Ask(key=world.key(), text="true")
        handle = await world.call(ask, CallPlan(first_lease=600))
        assert await handle.result() == Reply("true")
        await world.target(ask).result()
        assert await world.receiver.answered() == [200]
