"""The receiver against bad input, forgeries and repeats: each answer as documented, nothing completed, nothing lost."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError
from temporalio.workflow import NexusOperationCancellationType

from bridge.http import in_flight
from bridge.protocol.payload import MAX_PAYLOAD_BYTES
from bridge.security.callback_tokens import CallbackTokens
from bridge.security.keys import new_key
from bridge.security.signatures import MessageKind, MessageSigner
from scripts.environment.server import DEV_SERVER, Server, running_server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.helpers import CALLER, assert_eventually, key_set, paused
from tests.support.peer import (
    UNAUTHENTICATED,
    Message,
    Spoil,
    body,
    completion,
    failure_body,
    header,
    method,
    send,
    twice,
    without,
)
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

LONG = CallPlan(first_lease=600, deadline=3600)


@dataclass
class Waiting:
    """A call whose target never ends, so that a test may end it."""

    world: World
    handle: WorkflowHandle[Any, Reply]
    ids: dict[str, str]

    def message(self, **changes: Any) -> Message:
        return completion(self.world, **{**self.ids, **changes})

    def signer(self) -> MessageSigner:
        return MessageSigner(self.world.keys.completion)

    async def assert_pending(self) -> None:
        assert await self.world.pending(self.handle) is not None


async def waiting_call(world: World, plan: CallPlan = LONG) -> Waiting:
    ask = Ask(key=world.key())
    handle = await world.call(ask, plan)
    await world.until_started(ask)

    async def pending() -> str:
        activity = await world.pending(handle)
        assert activity is not None
        return str(activity.activity_id)

    request_id = await assert_eventually(pending)
    run_id = handle.first_execution_run_id or ""
    return Waiting(world, handle, {"workflow_id": handle.id, "run_id": run_id, "request_id": request_id})


@pytest_asyncio.fixture(loop_scope="session", scope="module", params=["", "/bridge"], ids=["alone", "mounted"])
async def stalled(server: Server, request: Any) -> AsyncIterator[World]:
    """Both sides without a worker for the targets, so that calls wait."""
    async with running_world(server, without=("handler",), mount=request.param) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def shared(stalled: World) -> AsyncIterator[Waiting]:
    """One waiting call. No bad message may end it."""
    waiting = await waiting_call(stalled)
    yield waiting
    await waiting.handle.terminate()


def state(text: str) -> Spoil:
    return header("Nexus-Operation-State", text)


@pytest.mark.parametrize(
    ("spoil", "status", "kind", "says"),
    [
        pytest.param(without("Nexus-Operation-State"), 400, "BAD_REQUEST", "Operation-State", id="no state"),
        pytest.param(state("Succeeded"), 400, "BAD_REQUEST", "Operation-State", id="unknown state"),
        pytest.param(state("failed"), 400, "BAD_REQUEST", "not a temporal failure", id="a result as a failure"),
        pytest.param(header("Content-Encoding", "gzip"), 400, "BAD_REQUEST", "Content-Encoding", id="compressed"),
        pytest.param(
            header("Content-Type", "application/x-temporal-payload"), 400, "BAD_REQUEST", "payload", id="no payload"
        ),
        pytest.param(
            body(b"x" * (MAX_PAYLOAD_BYTES + 1)), 400, "BAD_REQUEST", "too large", id="result over Temporal's limit"
        ),
        pytest.param(body(b"x" * (4 * 1024 * 1024 + 1)), 400, "BAD_REQUEST", "over", id="oversized body"),
        pytest.param(method("PUT"), 404, "NOT_FOUND", "no such route", id="wrong method"),
    ],
)
async def test_a_bad_completion_is_answered_as_documented(
    shared: Waiting, spoil: Spoil, status: int, kind: str, says: str
) -> None:
    """The handler signed the completion, but it is not usable: the answer is final and completes nothing."""
    message = shared.message()
    message.before_signing.append(spoil)
    if says == "not a temporal failure":
        message.body = b'{"metadata": {"type": "temporal.api.failure.v1.Failure"}, "details": {"cause": 1}}'
    answer = await send(message, shared.signer())
    assert (answer.status, answer.type) == (status, kind)
    assert says in answer.message
    await shared.assert_pending()


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"{", id="malformed JSON"),
        pytest.param(b"[]", id="not an object"),
        pytest.param(b'{"message": 1}', id="wrong type"),
        pytest.param(b'{"cause":' * 5000 + b"1" + b"}" * 5000, id="nesting bomb"),
        pytest.param(b"\xff", id="not UTF-8"),
        pytest.param(b'{"metadata": {"type": 1}}', id="metadata that is no text"),
        pytest.param(b"", id="empty"),
    ],
)
async def test_an_unreadable_failure_is_a_bad_request(shared: Waiting, text: bytes) -> None:
    """A failed outcome needs a Failure. The receiver accepts no other content."""
    answer = await send(shared.message(state="failed", body=text), shared.signer())
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    await shared.assert_pending()


def token(change: Any) -> Spoil:
    def spoil(message: Message) -> None:
        base, _, text = message.url.partition("?sig=")
        message.url = f"{base}?sig={change(text)}"

    return spoil


def path(message: Message) -> None:
    base, _, query = message.url.partition("/callbacks/")
    message.url = f"{base}/callbacks/{'A' * 22}?{query.partition('?')[2]}"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(token(lambda _: ""), id="empty token"),
        pytest.param(token(lambda text: text[:-1]), id="token cut short"),
        pytest.param(token(lambda text: text + "="), id="token respelled"),
        pytest.param(token(lambda text: text + "A" * 1024), id="overlong token"),
        pytest.param(token(lambda text: f"{text}&sig={text}"), id="two tokens"),
        pytest.param(token(lambda text: "e30." + text.partition(".")[2]), id="other claims"),
        pytest.param(path, id="another callback id"),
        pytest.param(lambda m: setattr(m, "url", m.url.partition("?")[0]), id="no token"),
    ],
)
async def test_every_bad_token_is_the_same_401(shared: Waiting, spoil: Spoil) -> None:
    """The handler signed each message, but the receiver checks the token first."""
    message = shared.message()
    message.before_signing.append(spoil)
    answer = await send(message, shared.signer())
    assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    await shared.assert_pending()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(without("Signature"), id="no signature"),
        pytest.param(without("Signature-Input"), id="no signature input"),
        pytest.param(state("failed"), id="state flipped"),
        pytest.param(body(b'{"text": "forged", "blob": ""}'), id="another body"),
        pytest.param(header("Content-Type", "text/plain"), id="another media type"),
        pytest.param(header("Nexus-Operation-Token", "added"), id="header added"),
        pytest.param(twice("Nexus-Operation-State", "succeeded"), id="state twice"),
        pytest.param(header("Nexus-Link", "<temporal:///elsewhere>"), id="another target"),
    ],
)
async def test_every_bad_signature_is_the_same_401(shared: Waiting, spoil: Spoil) -> None:
    """A leaked URL completes nothing, and no part of a message can be changed."""
    message = shared.message()
    message.after_signing.append(spoil)
    answer = await send(message, shared.signer())
    assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    await shared.assert_pending()


async def test_an_unsigned_message_with_a_good_url_is_a_401(shared: Waiting) -> None:
    """The URL alone proves nothing."""
    answer = await send(shared.message(), None)
    assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    await shared.assert_pending()


async def test_other_keys_kinds_and_receivers_are_a_401(shared: Waiting) -> None:
    """The start's key, a stranger's key, a start's signature, another receiver's or an expired token are refused."""
    world = shared.world
    for other in (world.keys.start, key_set(new_key())):
        assert (await send(shared.message(), MessageSigner(other))).body == UNAUTHENTICATED
    message = shared.message()
    message.kind = MessageKind.START
    assert (await send(message, shared.signer())).body == UNAUTHENTICATED
    for keys, namespace in ((world.keys.callback, "other"), (key_set(new_key()), CALLER)):
        tokens = CallbackTokens(keys, namespace=namespace)
        assert (await send(shared.message(tokens=tokens), shared.signer())).body == UNAUTHENTICATED
    future = shared.message(now=datetime.now(UTC) + timedelta(minutes=10))
    assert (await send(future, shared.signer())).body == UNAUTHENTICATED
    await shared.assert_pending()


async def test_a_late_completion_is_distinguished_from_a_repeat(stalled: World) -> None:
    """The answer is 410 if the wait is over, and 200 if the same outcome is recorded. It completes nothing."""
    late = {"now": datetime.now(UTC) - timedelta(hours=2)}
    call = await waiting_call(stalled)
    answer = await send(call.message(**late), call.signer())
    assert (answer.status, answer.type) == (503, "UNAVAILABLE")
    await call.assert_pending()
    assert (await send(call.message(), call.signer())).status == 200
    assert (await send(call.message(**late), call.signer())).status == 200
    answer = await send(call.message(state="failed", body=failure_body(), **late), call.signer())
    assert (answer.status, answer.type) == (409, "CONFLICT")
    ended = await waiting_call(stalled)
    await ended.handle.terminate()
    answer = await send(ended.message(**late), ended.signer())
    assert (answer.status, answer.type) == (410, "NOT_FOUND")


async def test_another_result_of_a_peer_without_links_is_a_conflict(stalled: World) -> None:
    """Such a peer names no run. Therefore only equal content counts as a repeat."""
    call = await waiting_call(stalled)
    for text, status in ((b'{"text": "posted", "blob": ""}', 200), (b'{"text": "other", "blob": ""}', 409)):
        for _ in range(2):
            message = call.message(body=text)
            del message.headers["Nexus-Link"]
            assert (await send(message, call.signer())).status == status


async def test_the_answers_to_completions_and_questions_are_signed(stalled: World) -> None:
    """The receiver signs 200, 409, 410, 400 and 503, because the handler stops only for a signed answer."""
    call = await waiting_call(stalled)
    question = {"state": "running", "body": b""}
    messages = [
        (call.message(**question), 200),
        (call.message(state="unknown"), 400),
        (call.message(), 200),
        (call.message(state="failed", body=failure_body()), 409),
    ]
    for message, status in messages:
        answer = await send(message, call.signer())
        assert answer.status == status
        assert answer.is_signed
    ended = await waiting_call(stalled)
    await ended.handle.terminate()
    answer = await send(ended.message(), ended.signer())
    assert (answer.status, answer.is_signed) == (410, True)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(body(b"x" * (4 * 1024 * 1024 + 1)), id="a body over the limit"),
        pytest.param(body(b'{"text": "forged", "blob": ""}'), id="another body"),
        pytest.param(method("PUT"), id="another method"),
        pytest.param(twice("Nexus-Operation-State", "succeeded"), id="a doubled state"),
        pytest.param(header("Content-Encoding", "gzip"), id="an added Content-Encoding"),
        pytest.param(without("Content-Type"), id="no Content-Type"),
    ],
)
async def test_a_spoilt_copy_of_a_good_completion_gets_no_signed_answer(shared: Waiting, spoil: Spoil) -> None:
    """A signed refusal of the copy would end the delivery of the true completion."""
    message = shared.message()
    message.after_signing.append(spoil)
    answer = await send(message, shared.signer())
    assert answer.status in {400, 401, 404}
    assert "Signature" not in answer.headers
    await shared.assert_pending()


async def test_a_handler_with_slow_bodies_does_not_take_all_connections(
    shared: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a good callback token for each of its calls. The one request more is a signed 429."""
    monkeypatch.setattr(in_flight, "connection_limit", lambda: 4)
    slow = []
    for _ in range(2):
        made = shared.message()
        shared.signer().sign(made.kind, made.url, made.headers, made.body)
        _, writer = await asyncio.open_connection("127.0.0.1", shared.world.receiver.port)
        lines = [f"{name}: {value}" for name, value in made.headers.items()]
        target = made.url.removeprefix(f"http://127.0.0.1:{shared.world.receiver.port}")
        head = [f"POST {target} HTTP/1.1", "Host: h", f"Content-Length: {len(made.body)}", *lines]
        writer.write("\r\n".join([*head, "", ""]).encode() + made.body[:-1])
        slow.append(writer)

    async def is_full() -> None:
        refused = await send(shared.message(state="running", body=b""), shared.signer())
        assert (refused.status, refused.is_signed) == (429, True)

    await assert_eventually(is_full)
    for writer in slow:
        writer.transport.abort()

    async def is_free() -> None:
        assert (await send(shared.message(state="running", body=b""), shared.signer())).status == 200

    await assert_eventually(is_free)


async def test_an_unknown_route_is_a_404_before_any_token_is_looked_at(shared: Waiting) -> None:
    """The answer has the documented form."""
    message = shared.message()
    message.url = message.url.replace("/callbacks/", "/elsewhere/")
    answer = await send(message, shared.signer())
    assert (answer.status, answer.type) == (404, "NOT_FOUND")


async def test_a_repeat_is_200_and_another_outcome_409(stalled: World) -> None:
    """The receiver keeps no state. It reads the receipt in the caller's history."""
    call = await waiting_call(stalled, CallPlan(first_lease=600, after=600))
    assert (await send(call.message(), call.signer())).status == 200
    assert (await send(call.message(), call.signer())).status == 200
    failed = call.message(state="failed", body=failure_body())
    answer = await send(failed, call.signer())
    assert (answer.status, answer.type) == (409, "CONFLICT")
    answer = await send(call.message(target_run_id="another-run"), call.signer())
    assert (answer.status, answer.type) == (409, "CONFLICT")
    await call.handle.terminate()
    assert (await send(call.message(), call.signer())).status == 200


async def test_a_repeat_after_the_workflow_has_ended_is_200(stalled: World) -> None:
    """The result arrived and the workflow closed, but the sender never saw the answer."""
    call = await waiting_call(stalled)
    assert (await send(call.message(), call.signer())).status == 200
    assert await call.handle.result() == Reply("posted")
    assert (await send(call.message(), call.signer())).status == 200


@pytest.mark.parametrize("way", ["terminated", "timed out", "canceled", "stopped and terminated"])
async def test_a_wait_that_is_over_is_410(stalled: World, way: str) -> None:
    """Old servers stop because of the status, new servers because of the body's type."""
    abandoning = CallPlan(first_lease=600, deadline=3600, cancellation=int(NexusOperationCancellationType.ABANDON))
    call = await waiting_call(stalled, CallPlan(first_lease=600, deadline=2) if way == "timed out" else abandoning)
    match way:
        case "terminated":
            await call.handle.terminate()
        case "canceled":
            await call.handle.cancel()
        case "stopped and terminated":
            # Only a workflow that goes on would schedule the activity again.
            await stalled.stop_waiting(call.handle)
            await call.handle.terminate()
        case _:
            pass
    with pytest.raises(WorkflowFailureError):
        await call.handle.result()
    answer = await send(call.message(), call.signer())
    assert (answer.status, answer.type) == (410, "NOT_FOUND")


async def test_a_question_is_answered_and_completes_nothing(stalled: World) -> None:
    """State "running" asks whether the call waits: 200 while it does, 410 afterwards. Both proofs are checked."""
    call = await waiting_call(stalled)
    question = {"state": "running", "body": b""}
    assert (await send(call.message(**question), call.signer())).status == 200
    await call.assert_pending()
    assert (await send(call.message(**question), MessageSigner(stalled.keys.start))).status == 401
    await call.handle.terminate()
    answer = await send(call.message(**question), call.signer())
    assert (answer.status, answer.type) == (410, "NOT_FOUND")


async def test_a_wait_that_never_was_is_404(stalled: World) -> None:
    """The token is valid, but names a workflow that does not exist."""
    message = completion(stalled, workflow_id=f"none-{stalled.id}", run_id="", request_id="none")
    answer = await send(message, MessageSigner(stalled.keys.completion))
    assert (answer.status, answer.type) == (404, "NOT_FOUND")


async def test_a_failure_and_a_cancellation_complete_the_wait(stalled: World) -> None:
    """The error of the operation has them, with their type, as its cause."""
    for name, kind in (("failed", ApplicationError), ("canceled", CancelledError)):
        call = await waiting_call(stalled)
        assert (await send(call.message(state=name, body=failure_body()), call.signer())).status == 200
        with pytest.raises(WorkflowFailureError) as raised:
            await call.handle.result()
        assert isinstance(raised.value.cause, NexusOperationError)
        assert isinstance(raised.value.cause.cause, kind)
        assert "ACTIVITY_TASK_FAILED" in await events(call.handle)


async def test_a_completion_that_comes_before_the_start_is_answered_is_accepted(stalled: World) -> None:
    """The outcome may overtake the 201."""
    answered: list[int] = []

    async def complete_first() -> None:
        stalled.service.after = None
        handle = stalled.caller_client.get_workflow_handle(workflow_id)
        run_id = (await handle.describe()).run_id
        activity = await stalled.pending(handle)
        message = completion(stalled, workflow_id=workflow_id, run_id=run_id, request_id=activity.activity_id)
        answered.append((await send(message, MessageSigner(stalled.keys.completion))).status)

    stalled.service.after = complete_first
    ask = Ask(key=stalled.key())
    workflow_id = f"early-{ask.key}"
    handle = await stalled.caller_client.start_workflow(
        CallingWorkflow.run, args=[ask, LONG], id=workflow_id, task_queue=stalled.order_queue
    )
    assert await handle.result() == Reply("posted")

    async def accepted() -> None:
        # The workflow may end before the receiver's answer arrives.
        assert answered == [200]

    await assert_eventually(accepted)


async def test_a_receiver_without_temporal_answers_503_and_loses_nothing() -> None:
    """The answer has Retry-After, and the readiness route answers 503."""
    async with (
        running_server(namespaces=["order-prod", "payment-prod"]) as own,
        running_world(own, without=("handler",)) as world,
    ):
        call = await waiting_call(world)
        message, key = call.message(), call.signer()
        async with paused(own.parts[DEV_SERVER].pid):
            answer = await send(message, key)
            ready = await send(Message(f"{world.receiver.url}/readyz", message.headers, b"", method="GET"), None)
        assert (answer.status, answer.type) == (503, "UNAVAILABLE")
        assert answer.headers["Retry-After"] == "1"
        assert ready.status == 503
        assert (await send(call.message(), key)).status == 200
        assert await call.handle.result() == Reply("posted")
