"""The handler service against bad input, strangers and repeats: each answer as documented, and nothing started."""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from yarl import URL

from bridge.protocol.headers import operation_path
from bridge.security.signatures import MessageKind, MessageSigner
from scripts.environment.server import Server, running_server
from tests.support.codec import Scrambler
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.peer import (
    UNAUTHENTICATED,
    Message,
    Spoil,
    assert_nothing_started,
    body,
    header,
    method,
    send,
    signer,
    start,
    url,
    without,
)
from tests.support.world import World, running_world, with_codec


@pytest.mark.parametrize(
    ("spoil", "status", "kind", "says"),
    [
        pytest.param(body(b"{"), 400, "BAD_REQUEST", "not a Ask", id="malformed JSON"),
        pytest.param(body(b'{"key": 1}'), 400, "BAD_REQUEST", "not a Ask", id="wrong type of a field"),
        pytest.param(body(b'{"behaviour": "return"}'), 400, "BAD_REQUEST", "not a Ask", id="missing field"),
        pytest.param(body(b"[" * 100_000), 400, "BAD_REQUEST", "not a Ask", id="nesting bomb"),
        pytest.param(body(b"\xff\xfe"), 400, "BAD_REQUEST", "not a Ask", id="not UTF-8"),
        pytest.param(body(b""), 400, "BAD_REQUEST", "not a Ask", id="empty body"),
        pytest.param(body(b"null"), 400, "BAD_REQUEST", "not a Ask", id="null"),
        pytest.param(
            header("Content-Type", "application/octet-stream"), 400, "BAD_REQUEST", "it is bytes", id="bytes as input"
        ),
        pytest.param(body(b'{"key": "\\ud800"}'), 400, "BAD_REQUEST", "key (not valid Unicode)", id="a lone surrogate"),
        pytest.param(header("Content-Type", "text/html"), 400, "BAD_REQUEST", "not a Ask", id="wrong content type"),
        pytest.param(
            header("Content-Type", "application/x-temporal-payload"), 400, "BAD_REQUEST", "payload", id="no payload"
        ),
        pytest.param(header("Content-Encoding", "gzip"), 400, "BAD_REQUEST", "Content-Encoding", id="compressed"),
        pytest.param(body(b"x" * (4 * 1024 * 1024 + 1)), 400, "BAD_REQUEST", "over", id="oversized body"),
        pytest.param(
            body(b'"' + b"x" * (2 * 1024 * 1024) + b'"'), 400, "BAD_REQUEST", "over the limit", id="oversized payload"
        ),
        pytest.param(without("Nexus-Request-Id"), 400, "BAD_REQUEST", "Nexus-Request-Id", id="no request id"),
        pytest.param(header("Nexus-Request-Id", "x" * 256), 400, "BAD_REQUEST", "255", id="long request id"),
        pytest.param(header("Request-Timeout", "soon"), 400, "BAD_REQUEST", "Request-Timeout", id="bad timeout"),
        pytest.param(
            header("Bridge-Scheduled-Time", "noon"), 400, "BAD_REQUEST", "Bridge-Scheduled-Time", id="bad time"
        ),
        pytest.param(url("/probe?", "/absent?"), 404, "NOT_FOUND", "no such operation", id="unknown operation"),
        pytest.param(url("/ProbeService/", "/Absent/"), 404, "NOT_FOUND", "no such service", id="unknown service"),
        pytest.param(url("/c/", "/d/"), 404, "NOT_FOUND", "no such route", id="unknown route"),
        pytest.param(method("PUT"), 404, "NOT_FOUND", "no such route", id="wrong method"),
        pytest.param(url("%2Fcallbacks", "%2Felsewhere"), 400, "BAD_REQUEST", "not allowed", id="callback path"),
        pytest.param(url("http%3A%2F%2F127", "http%3A%2F%2F10"), 400, "BAD_REQUEST", "not allowed", id="callback host"),
        pytest.param(url("callback=http", "callback=ftp"), 400, "BAD_REQUEST", "not allowed", id="callback scheme"),
        pytest.param(
            lambda m: setattr(m, "url", m.url + "&callback=http%3A%2F%2Fx"),
            *(400, "BAD_REQUEST", "more than one"),
            id="two callbacks",
        ),
    ],
)
async def test_a_bad_start_is_answered_as_documented(
    quiet: World, spoil: Spoil, status: int, kind: str, says: str
) -> None:
    """An authenticated caller gets the reason. No run starts, and no answer is a 500."""
    key = quiet.key()
    message = start(quiet, {"key": key})
    message.before_signing.append(spoil)
    answer = await send(message, signer(quiet))

    assert (answer.status, answer.type) == (status, kind)
    assert says in answer.message
    assert key not in answer.message
    # Before the proof holds, and while a body is read, anyone on the network path can provoke the answer.
    assert answer.is_signed == (says not in {"no such route", "over"})
    await assert_nothing_started(quiet, key)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        pytest.param({"behaviour": "refused"}, "the check says no", id="refused by the check"),
        pytest.param({"behaviour": "long id"}, "workflow id", id="workflow id too long"),
    ],
)
async def test_an_input_that_the_operation_refuses_is_a_bad_request(
    quiet: World, ask: dict[str, Any], says: str
) -> None:
    """The caller gets the text of the check's error."""
    key = quiet.key()
    answer = await send(start(quiet, {"key": key, **ask}), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    assert says in answer.message
    await assert_nothing_started(quiet, key)


async def test_a_bug_in_the_teams_own_code_reveals_nothing_to_the_caller(
    quiet: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A broken check gives an internal error without text. It is final, because the check would break again."""
    key = quiet.key()
    answer = await send(start(quiet, {"key": key, "behaviour": "buggy check"}), signer(quiet))
    assert (answer.status, answer.type) == (500, "INTERNAL")
    assert answer.message == "the operation's check raised KeyError"
    assert answer.failure["details"]["retryableOverride"] is False
    assert key not in caplog.text
    await assert_nothing_started(quiet, key)


@pytest.mark.parametrize("name", ["{a}", "[b];c(d)!*'", "+=:@&$", "a/b", "c d,e", "%2F", "\u00e9", "..", "~"])
async def test_a_name_of_any_characters_is_one_segment_of_a_route(quiet: World, name: str) -> None:
    """The signature holds and the route is found: the signed answer is that there is no such operation."""
    message = start(quiet, {"key": quiet.key()})
    message.url = message.url.replace("/ProbeService/probe", operation_path("ProbeService", name))
    answer = await send(message, signer(quiet))
    assert (answer.status, answer.message) == (404, "no such operation")
    assert answer.is_signed


async def test_the_reason_of_a_refusal_is_one_line_in_the_log_of_the_side_that_refuses(
    quiet: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Bad input and bad proofs. The peer sees no more of a failed proof than that it failed."""
    if quiet.service.mount:
        return  # There the parent chooses the access log.
    for spoil, key, reason in (
        (body(b"["), quiet.keys.start, "not a Ask"),
        (without("Nexus-Request-Id"), quiet.keys.start, "Nexus-Request-Id"),
        (url("/probe?", "/absent?"), quiet.keys.start, "no such operation"),
        (method("PUT"), quiet.keys.start, "Method Not Allowed"),
        (body(b"{}"), key_set(), "signature does not hold: another key 'k1'"),
    ):
        message = start(quiet, {"key": quiet.key()})
        message.before_signing.append(spoil)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            answer = await send(message, MessageSigner(key))
            [record] = [each for each in caplog.records if hasattr(each, "bridge.refused")]
        assert reason in getattr(record, "bridge.refused")
        assert getattr(record, "bridge.status") == answer.status
        assert answer.status != 401 or answer.body == UNAUTHENTICATED


async def test_an_operation_that_the_caller_may_not_start_is_a_403(server: Server) -> None:
    """A caller is authorized for single operations."""
    async with running_world(server, without=("caller", "handler", "receiver")) as world:
        settings = world.handler_settings
        peer = settings.callers[CALLER].model_copy(update={"operations": ("ProbeService/nothing",)})
        narrowed = settings.model_copy(update={"callers": {CALLER: peer}})
        world.override_handler_settings(narrowed)
        await world.service.stop()
        await world.service.start()
        key = world.key()
        answer = await send(start(world, {"key": key}), signer(world))
        assert (answer.status, answer.type) == (403, "UNAUTHORIZED")
        await assert_nothing_started(world, key)


async def test_the_log_names_the_operations_that_the_module_offers(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """An operation that the line lacks was not found in the module: its handler class may have no instance."""
    with caplog.at_level("INFO", logger="handler.service"):
        async with running_world(server, without=("caller", "handler", "receiver")):
            pass
    [line] = [each.getMessage() for each in caplog.records if each.getMessage().startswith("bridge.serves: ")]
    assert "ProbeService/probe" in line.removeprefix("bridge.serves: serves ").split(", ")


async def test_health_routes_show_alive_and_ready(quiet: World) -> None:
    """The service is ready if Temporal answers for its namespace."""
    for route in ("/livez", "/readyz"):
        message = Message(f"{quiet.service.url}{route}", start(quiet, {}).headers, b"", method="GET")
        answer = await send(message, None)
        assert answer.status == 200
        assert "aiohttp" not in answer.headers["Server"]


async def test_a_start_with_a_request_target_in_absolute_form_is_a_start(quiet: World) -> None:
    """Some clients and proxies send this form (RFC 9112 section 3.2.2)."""
    message = start(quiet, {"key": quiet.key()})
    MessageSigner(quiet.keys.start).sign(MessageKind.START, message.url, message.headers, message.body)
    lines = [f"POST https://elsewhere.example{URL(message.url, encoded=True).raw_path_qs} HTTP/1.1", "Host: handler"]
    lines += [f"{name}: {value}" for name, value in message.headers.items()]
    head = "\r\n".join([*lines, f"Content-Length: {len(message.body)}", "", ""])
    reader, writer = await asyncio.open_connection("127.0.0.1", quiet.service.port)
    writer.write(head.encode() + message.body)
    assert (await reader.readline()).split()[1] == b"201"
    writer.close()
    await writer.wait_closed()


async def test_an_input_over_the_limit_of_the_handlers_namespace_is_a_bad_request() -> None:
    """The server's limit applies, even if it is smaller than the usual 2 MiB."""
    limit = 512 * 1024
    async with (
        running_server(namespaces=[CALLER, HANDLER], dynamic_config=[f"limit.blobSize.error={limit}"]) as small,
        running_world(small, without=("caller", "handler", "receiver")) as world,
    ):
        key = world.key()
        answer = await send(start(world, {"key": key, "text": "x" * limit}), signer(world))
        assert (answer.status, answer.type) == (400, "BAD_REQUEST")
        assert "larger than the handler's namespace allows" in answer.message
        await assert_nothing_started(world, key)
        assert (await send(start(world, {"key": key, "text": "x" * (limit // 2)}), signer(world))).status == 201


class _UnavailableCodec(Scrambler):
    """Cannot get its keys at the moment."""

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        message = "the key store is unavailable"
        raise OSError(message)


async def test_an_unavailable_codec_is_not_the_callers_fault(server: Server) -> None:
    """The status is 503, so that the call is retried. A final 400 would fail the call."""
    async with running_world(
        server,
        without=("caller", "handler", "receiver"),
        converters=(with_codec(Scrambler()), with_codec(_UnavailableCodec())),
    ) as world:
        answer = await send(start(world, {"key": world.key()}), signer(world))
        assert (answer.status, answer.type) == (503, "UNAVAILABLE")
        assert "key store" not in answer.message


async def test_a_caller_that_hangs_up_in_its_body_is_not_our_fault(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy hangs up when its own client has disconnected. No run starts, and the log has no error."""
    message = start(world, {"key": world.key()})
    MessageSigner(world.keys.start).sign(MessageKind.START, message.url, message.headers, message.body)
    lines = [f"POST {URL(message.url, encoded=True).raw_path_qs} HTTP/1.1", "Host: handler"]
    lines += [f"{name}: {value}" for name, value in message.headers.items()]
    head = "\r\n".join([*lines, f"Content-Length: {len(message.body)}", "", ""])
    _, writer = await asyncio.open_connection("127.0.0.1", world.service.port)
    writer.write(head.encode() + message.body[:-5])
    await writer.drain()
    writer.transport.abort()

    async def answered() -> None:
        assert world.service.statuses == [400]

    await assert_eventually(answered)
    assert "bridge.internal_error" not in caplog.text


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"POST /c/x/y/z HTTP/1.1\r\nHost: h\r\nX-Long: " + b"s3cret" * 4000, id="header too long"),
        pytest.param(b"POST /c/" + b"s3cret" * 4000 + b" HTTP/1.1\r\nHost: h", id="request line too long"),
        pytest.param(b"POST /c/x/y/z HTTP/1.1\r\nHost: h\r\ns3cret", id="no header"),
        pytest.param(b"s3cret /c/x/y/z\xff HTTP/9.9\r\nHost: h", id="no request line"),
        pytest.param(
            b"POST /c/x/y/z HTTP/1.1\r\nHost: h\r\nContent-Type: s3cret\r\nContent-Type: s3cret", id="double header"
        ),
        pytest.param(b"POST /c/x/y/z HTTP/1.1\r\nHost: h\r\nContent-Length: s3cret", id="no length"),
    ],
)
async def test_a_request_that_cannot_be_parsed_is_answered_in_the_documented_form(quiet: World, head: bytes) -> None:
    """The answer is JSON. It quotes neither a version nor the input."""
    reader, writer = await asyncio.open_connection("127.0.0.1", quiet.service.port)
    writer.write(head + b"\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, text = answer.partition(b"\r\n\r\n")
    if quiet.service.mount:
        # The listener is the parent's, and so is what it answers.
        assert head.split()[1] == b"400"
        return
    assert head.split()[1] in {b"400", b"401"}
    assert json.loads(text)["metadata"]["type"] == "nexus.HandlerError"
    assert b"application/json" in head
    assert b"s3cret" not in answer
    assert b"aiohttp" not in answer
