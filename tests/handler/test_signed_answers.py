"""What the handler service signs: every answer that depends only on the verified request, and no other answer."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from multidict import CIMultiDict
from temporalio.api.enums.v1 import EventType
from yarl import URL

from bridge.security.signatures import MessageKind
from scripts.environment.server import Server
from tests.support.helpers import CALLER
from tests.support.peer import Answered, Message, Spoil, body, header, method, send, signer, start, twice, url, without
from tests.support.targets import Ask
from tests.support.world import World, running_world


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def quiet(server: Server) -> AsyncIterator[World]:
    async with running_world(server, without=("caller", "handler", "receiver")) as made:
        yield made


def cut(message: Message) -> None:
    message.headers["Nexus-Request-Id"] = message.headers["Nexus-Request-Id"][:-1]


SPOILT = [
    pytest.param(body(b"x" * (4 * 1024 * 1024 + 1)), id="a body over the limit"),
    pytest.param(body(b'{"key": "other"}'), id="another body"),
    pytest.param(body(b""), id="no body"),
    pytest.param(body(b"{"), id="a cut body"),
    pytest.param(url("/probe?", "/nothing?"), id="another operation"),
    pytest.param(url("/probe?", "/absent?"), id="an unknown operation"),
    pytest.param(url("callback=", "callback=https%3A%2F%2Fx.example&callback="), id="another query"),
    pytest.param(url("sig%3Dtoken", "sig%3Dother"), id="another callback"),
    pytest.param(method("GET"), id="GET"),
    pytest.param(method("PUT"), id="PUT"),
    pytest.param(url("/c/", "/d/"), id="an unknown route"),
    pytest.param(url(f"/c/{CALLER}/", "/c/stranger/"), id="another caller"),
    pytest.param(twice("Nexus-Request-Id", "second"), id="a second request id"),
    pytest.param(header("Content-Encoding", "gzip"), id="an added Content-Encoding"),
    pytest.param(header("Nexus-Extra", "more"), id="an added header"),
    pytest.param(header("Nexus-Extra", "\u00e9"), id="an added header that is not ASCII"),
    pytest.param(twice("Content-Type", "application/json"), id="a doubled Content-Type"),
    pytest.param(twice("Operation-Timeout", "60s"), id="a doubled timeout"),
    pytest.param(without("Content-Type"), id="no Content-Type"),
    pytest.param(without("Operation-Timeout"), id="no timeout"),
    pytest.param(cut, id="a truncated request id"),
    pytest.param(header("Bridge-Scheduled-Time", "2001-01-01T00:00:00Z"), id="an older start"),
]


@pytest.mark.parametrize("spoil", SPOILT)
async def test_a_spoilt_copy_of_a_good_start_gets_no_signed_answer(quiet: World, spoil: Spoil) -> None:
    """A signature for the copy would also be valid for the true start, and would end the call."""
    message = start(quiet, {"key": quiet.key()})
    message.after_signing.append(spoil)
    answer = await send(message, signer(quiet))
    assert answer.status in {400, 401, 404}
    assert "Signature" not in answer.headers


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(header("X-Name", "\u00e9"), id="not ASCII"),
        pytest.param(twice("X-Name", "second"), id="twice"),
        pytest.param(header("Traceparent", "x" * 200), id="long"),
    ],
)
async def test_a_header_outside_of_the_signature_changes_nothing(quiet: World, spoil: Spoil) -> None:
    """No answer depends on such a header. A copy therefore gets the true answer."""
    message = start(quiet, {"key": quiet.key()})
    message.headers["X-Name"] = "first"
    message.after_signing.append(spoil)
    answer = await send(message, signer(quiet))
    assert answer.status == 201
    assert answer.is_signed


async def test_the_answers_to_starts_and_cancels_are_bound_to_their_request(quiet: World) -> None:
    """201, a repeat's 201, 202 and 404 are each valid for one request only."""
    key, request_id = quiet.key(), quiet.key("request")
    asked = [start(quiet, {"key": key}, request_id=request_id) for _ in range(2)]
    asked[1].headers["Bridge-Attempt"] = "2"
    answers = [await send(each, signer(quiet)) for each in asked]
    token = json.loads(answers[0].body)["token"]
    for name in (token, "unknown"):
        url = f"{quiet.service.url}/c/{CALLER}/ProbeService/probe/cancel"
        message = Message(url, CIMultiDict({"Nexus-Operation-Token": name}), b"", kind=MessageKind.CANCEL)
        answers.append(await send(message, signer(quiet)))
    assert [answer.status for answer in answers] == [201, 201, 202, 404]
    for answer in answers:
        assert answer.is_signed
        for other in answers:
            assert other is answer or not holds(other, answer)


def holds(request: Answered, answer: Answered) -> bool:
    return Answered(answer.status, answer.headers, answer.body, request.proof).is_signed


async def test_the_headers_of_an_answer_fit_a_proxys_buffer(quiet: World) -> None:
    """A link to a run with a long id is over 6 KiB. It is left out, because the answer is complete without it."""
    message = start(quiet, {"key": "\u00fc" * 470 + quiet.key()})
    reader, writer = await asyncio.open_connection("127.0.0.1", quiet.service.port)
    signer(quiet).sign(message.kind, message.url, message.headers, message.body)
    lines = [f"POST {URL(message.url, encoded=True).raw_path_qs} HTTP/1.1", "Host: handler", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in message.headers.items()]
    writer.write("\r\n".join([*lines, f"Content-Length: {len(message.body)}", "", ""]).encode() + message.body)
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 201")
    assert b"Signature-Input" in head
    assert b"Nexus-Link" not in head
    assert len(head) < 3584
    assert (await _first_event(quiet, json.loads(message.body))) == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED


async def _first_event(world: World, ask: dict[str, str]) -> int:
    async for event in world.target(Ask(key=ask["key"])).fetch_history_events():
        return event.event_type
    raise AssertionError
