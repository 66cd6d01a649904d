"""The handler service against bad input, strangers and repeats: each answer as documented, and nothing started."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from temporalio.api.common.v1 import Payload
from temporalio.service import RPCError
from yarl import URL

from bridge.protocol.headers import operation_path
from bridge.security import signatures
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner
from scripts.environment.server import Server, running_server
from tests.support.codec import Scrambler
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.peer import Answered, Message, Spoil, send, start
from tests.support.targets import Ask
from tests.support.world import World, running_world, with_codec

UNAUTHENTICATED = (
    b'{"message":"not authenticated","metadata":{"type":"nexus.HandlerError"},'
    b'"details":{"type":"UNAUTHENTICATED","retryableOverride":false}}'
)


@pytest_asyncio.fixture(loop_scope="session", scope="module", params=["", "/bridge"], ids=["alone", "mounted"])
async def quiet(server: Server, request: Any) -> AsyncIterator[World]:
    """A handler without workers, so that started runs make no progress."""
    async with running_world(server, without=("caller", "handler", "receiver"), mount=request.param) as made:
        yield made


def signer(world: World) -> MessageSigner:
    return MessageSigner(world.keys.start)


async def assert_nothing_started(world: World, key: str) -> None:
    with pytest.raises(RPCError):
        await world.target(Ask(key=key)).describe()


def header(name: str, value: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.headers[name] = value

    return spoil


def without(name: str) -> Spoil:
    def spoil(message: Message) -> None:
        del message.headers[name]

    return spoil


def twice(name: str, value: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.headers.add(name, value)

    return spoil


def body(text: bytes) -> Spoil:
    def spoil(message: Message) -> None:
        message.body = text

    return spoil


def url(old: str, new: str) -> Spoil:
    def spoil(message: Message) -> None:
        assert old in message.url
        message.url = message.url.replace(old, new)

    return spoil


def method(name: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.method = name

    return spoil


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


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(without("Signature"), id="no signature"),
        pytest.param(without("Signature-Input"), id="no signature input"),
        pytest.param(without("Repr-Digest"), id="no digest"),
        pytest.param(body(b'{"key": "other"}'), id="another body"),
        pytest.param(header("Nexus-Request-Id", "other"), id="another request id"),
        pytest.param(header("Operation-Timeout", "9999s"), id="another timeout"),
        pytest.param(twice("Nexus-Request-Id", "second"), id="request id twice"),
        pytest.param(header("Nexus-Link", "<temporal:///x>"), id="an added link"),
        pytest.param(url("sig%3Dtoken", "sig%3Dother"), id="another callback"),
        pytest.param(url("/probe?", "/nothing?"), id="another operation"),
        pytest.param(url(f"/c/{CALLER}/", "/c/stranger/"), id="unknown caller"),
        pytest.param(header("Signature", "bridge=:AAAA:"), id="a signature of nothing"),
        pytest.param(header("Signature-Input", "x" * 5000), id="overlong signature input"),
        pytest.param(header("Nexus-Extra", "\u00e9"), id="a header that is not ASCII"),
    ],
)
async def test_every_failed_proof_is_the_same_401(quiet: World, spoil: Spoil) -> None:
    """Status and bytes are the same for every failed check. No run starts."""
    key = quiet.key()
    message = start(quiet, {"key": key})
    message.after_signing.append(spoil)
    answer = await send(message, signer(quiet))
    assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    assert "Signature" not in answer.headers
    await assert_nothing_started(quiet, key)


async def test_a_signature_of_another_key_or_kind_is_a_401(quiet: World) -> None:
    """The key of the other direction, a stranger's key and a cancel's signature are refused."""
    for completion_keys in (quiet.keys.completion, key_set(new_key())):
        answer = await send(start(quiet, {"key": quiet.key()}), MessageSigner(completion_keys))
        assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    message = start(quiet, {"key": quiet.key()})
    message.kind = MessageKind.CANCEL
    assert (await send(message, signer(quiet))).status == 401


async def test_an_unknown_name_or_key_id_costs_as_much_as_a_wrong_key(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of an answer shows neither which callers there are nor how their keys are named."""
    made: list[str] = []
    real = signatures._mac

    def mac(*given: Any) -> str:
        made.append("mac")
        return real(*given)

    monkeypatch.setattr(signatures, "_mac", mac)
    counts = set()
    unknown_id = MessageSigner(KeySet.model_validate({"signing": "k9", "keys": {"k9": new_key()}}))
    for name, own in ((CALLER, MessageSigner(key_set())), ("stranger", MessageSigner(key_set())), (CALLER, unknown_id)):
        message = start(quiet, {"key": quiet.key()})
        url(f"/c/{CALLER}/", f"/c/{name}/")(message)
        made.clear()
        answer = await send(message, own)
        assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
        counts.add(len(made))
    assert len(counts) == 1


async def test_a_body_is_asked_for_only_after_the_headers_are_verified(quiet: World) -> None:
    """A stranger gets the refusal instead of `100 Continue`; a caller with a proof gets the interim answer."""
    message = start(quiet, {"key": quiet.key()})
    for is_signed in (False, True):
        if is_signed:
            signer(quiet).sign(MessageKind.START, message.url, message.headers, message.body)
        lines = [f"POST {URL(message.url, encoded=True).raw_path_qs} HTTP/1.1", "Host: h", "Expect: 100-continue"]
        lines += [f"{name}: {value}" for name, value in message.headers.items()]
        reader, writer = await asyncio.open_connection("127.0.0.1", quiet.service.port)
        writer.write("\r\n".join([*lines, f"Content-Length: {len(message.body)}", "", ""]).encode())
        assert (await reader.readline()).split()[1] == (b"100" if is_signed else b"401")
        if is_signed:
            assert await reader.readline() == b"\r\n"
            writer.write(message.body)
            assert (await reader.readline()).split()[1] == b"201"
        writer.transport.abort()


async def test_a_bearer_secret_that_is_not_text_is_a_401(server: Server) -> None:
    """No bytes from a stranger cause an internal error."""

    def prepare(world: World) -> None:
        world.peer_options = {"auth": "bearer", "start_keys": None, "bearer_keys": key_set()}

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        head = [f"POST /c/{CALLER}/ProbeService/probe HTTP/1.1", "Host: handler", "Content-Length: 0"]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.service.port)
        writer.write("\r\n".join([*head, "Authorization: Bearer "]).encode() + b"\xff\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()
        await writer.wait_closed()


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
    """A caller is authorised for single operations."""
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


async def test_the_same_start_twice_is_one_run_with_one_token(quiet: World) -> None:
    """An equal repeat gets the same answer, by the request id alone."""
    key, request_id = quiet.key(), quiet.key("request")
    first = await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    second = await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    assert (first.status, second.status) == (201, 201)
    assert json.loads(first.body) == json.loads(second.body)
    assert first.headers["Nexus-Link"] == second.headers["Nexus-Link"]
    assert json.loads(first.body)["state"] == "running"


async def test_the_same_request_id_with_another_input_is_refused(quiet: World) -> None:
    """The status is 400, because Temporal's server 1.29 would retry a 409."""
    key, request_id = quiet.key(), quiet.key("request")
    await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    answer = await send(start(quiet, {"key": key, "text": "other"}, request_id=request_id), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    assert "another input" in answer.message


async def test_a_run_of_another_caller_is_neither_used_nor_revealed(quiet: World) -> None:
    """A run that no call started holds the workflow id."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "ProbeWorkflow", Ask(key=key), id=f"probe-{key}", task_queue=quiet.payment_queue
    )
    answer = await send(start(quiet, {"key": key}), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    assert answer.message == "the workflow id that this input leads to is taken"


async def test_a_start_older_than_retention_never_starts_a_run(quiet: World) -> None:
    """The earlier run may be past retention. The error says that the outcome is unknown, and has the bridge's mark."""
    key = quiet.key()
    message = start(quiet, {"key": key})
    message.headers["Bridge-Scheduled-Time"] = "2020-01-01T00:00:00Z"
    answer = await send(message, signer(quiet))
    assert answer.status == 404
    assert json.loads(answer.body)["metadata"]["bridge"] == "outcome-unknown"
    await assert_nothing_started(quiet, key)

    started = await send(start(quiet, {"key": key}, request_id="r"), signer(quiet))
    message = start(quiet, {"key": key}, request_id="r")
    message.headers["Bridge-Scheduled-Time"] = "2020-01-01T00:00:00Z"
    assert (await send(message, signer(quiet))).body == started.body


async def test_a_start_without_a_callback_runs_and_a_repeat_gets_its_outcome(world: World) -> None:
    """The callback is optional. A repeated start is answered with the outcome."""
    message = start(world, {"key": world.key(), "text": "asked for"}, request_id=world.id)
    message.url = message.url.partition("?")[0]
    assert (await send(message, signer(world))).status == 201

    async def ended() -> Answered:
        again = Message(message.url, message.headers.copy(), message.body)
        answer = await send(again, signer(world))
        assert answer.status == 200
        return answer

    answer = await assert_eventually(ended)
    assert json.loads(answer.body)["text"] == "asked for"
    assert answer.headers["Nexus-Operation-State"] == "succeeded"
    assert world.receiver.requests == []


async def test_health_routes_show_alive_and_ready(quiet: World) -> None:
    """The service is ready if Temporal answers for its namespace."""
    for route in ("/livez", "/readyz"):
        message = Message(f"{quiet.service.url}{route}", start(quiet, {}).headers, b"", method="GET")
        answer = await send(message, None)
        assert answer.status == 200
        assert "aiohttp" not in answer.headers["Server"]


async def test_another_operations_run_under_the_same_id_is_not_the_answer(quiet: World) -> None:
    """Two operations may lead to one workflow id, but a refund must not get the result of a payment."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "AnotherWorkflow", Ask(key=key), id=f"shared-{key}", task_queue=quiet.payment_queue
    )
    answer = await send(start(quiet, {"key": key}, operation="shared"), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")


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


async def test_an_old_start_does_not_reveal_whether_a_run_holds_the_id(quiet: World) -> None:
    """The answer to a start that is too old to start a run must not reveal whether the id is held."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "ProbeWorkflow", Ask(key=key), id=f"probe-{key}", task_queue=quiet.payment_queue
    )
    answers = []
    for each in (key, quiet.key()):
        message = start(quiet, {"key": each})
        message.headers["Bridge-Scheduled-Time"] = "2001-01-01T00:00:00Z"
        answers.append(await send(message, signer(quiet)))
    assert (answers[0].status, answers[0].body) == (answers[1].status, answers[1].body)
    assert answers[0].status == 404
