"""Temporal's own server tells our receiver the outcome: unsigned, let in by the callback token alone."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import pytest_asyncio
from aiohttp import web
from google.protobuf.json_format import MessageToJson
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest, StartWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError, TerminatedError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.worker import Worker

from bridge.admin.command import JsonFormatter
from bridge.protocol.headers import CALLBACK_PREFIX, CALLBACK_TOKEN
from bridge.security.signatures import SIGNATURE_INPUT, MessageSigner
from bridge.workflow.targets import Targets
from scripts.environment.server import Server
from tests.support.helpers import HANDLER, assert_eventually, ring
from tests.support.peer import Message, completion, failure_body, send, start
from tests.support.workflows import Ask, CallingWorkflow, CallPlan, ForeignWorkflow, Reply, foreign_target
from tests.support.world import World, events, running_world

LONG = CallPlan(first_lease=600)
"""No renewal comes before the test is over: who tells is the server."""

Calling = WorkflowHandle[CallingWorkflow, Reply]


def takes_unsigned(world: World) -> None:
    """Both sides know that completions come from the handler's Temporal server."""
    world.caller_options = {"handlers": {HANDLER: {"start_keys": world.keys.start, "completions": "server"}}}
    world.peer_options = {"completions": "server", "completion_keys": None}


def told_by_server(world: World) -> None:
    world.targets = [replace(each, delivery="server") for each in Targets(world.targets)]
    takes_unsigned(world)


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_world(server, prepare=told_by_server) as made:
        yield made


async def cause_of(handle: Calling) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


async def callbacks_of(target: WorkflowHandle[Any, Any]) -> list[str]:
    """URLs of the callbacks that the server holds for the current run."""
    return [each.callback.nexus.url for each in (await target.describe()).raw_description.callbacks]


async def assert_told_by_server_only(world: World, target: WorkflowHandle[Any, Any], *, calls: int = 1) -> None:
    """One start and one completion for each call; no delivery, no renewal, and there is no sweep here."""

    async def told() -> None:
        # The outcome may overtake the answer to the start.
        assert world.service.statuses == [201] * calls
        assert world.receiver.statuses == [200] * calls

    await assert_eventually(told)
    assert not any(name.startswith(("ACTIVITY", "START_CHILD")) for name in await events(target))


async def test_a_result_is_told_by_the_server(world: World) -> None:
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.signal("say", "by the server")
    assert await handle.result() == Reply("by the server")
    assert len(await events(handle)) == 11
    await assert_told_by_server_only(world, target)


async def test_a_failure_is_told_by_the_server_with_its_whole_chain(world: World) -> None:
    ask = Ask(world.key(), "fail")
    outer = await cause_of(await world.call(ask, LONG))
    assert isinstance(outer, ApplicationError)
    assert (outer.type, outer.message, outer.non_retryable) == ("Outer", "the outer reason", False)
    assert list(outer.details) == [{"key": ask.key}, "two"]
    inner = outer.cause
    assert isinstance(inner, ApplicationError)
    assert (inner.type, inner.message, inner.non_retryable) == ("Inner", "the inner reason", True)
    await assert_told_by_server_only(world, world.target(ask))


async def test_a_cancellation_is_told_by_the_server(world: World) -> None:
    ask = Ask(world.key(), "cleanup")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.cancel()
    assert isinstance(await cause_of(handle), CancelledError)
    await assert_told_by_server_only(world, target)


async def test_a_terminated_target_is_told_by_the_server_at_once(world: World) -> None:
    """What else only a sweep or a renewal can tell."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.terminate()
    cause = await cause_of(handle)
    assert isinstance(cause, TerminatedError)
    assert cause.message == "operation terminated"
    await assert_told_by_server_only(world, target)


@pytest.mark.parametrize("field", ["workflow_run_timeout", "workflow_execution_timeout"])
async def test_a_target_out_of_time_is_told_by_the_server(
    world: World, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own timeout, and not the caller's."""
    service = world.handler_client.workflow_service
    start = service.start_workflow_execution

    async def with_timeout(request: StartWorkflowExecutionRequest, **options: Any) -> Any:
        getattr(request, field).FromSeconds(1)
        return await start(request, **options)

    monkeypatch.setattr(service, "start_workflow_execution", with_timeout)
    ask = Ask(world.key(), "wait")
    assert isinstance(await cause_of(await world.call(ask, LONG)), TemporalTimeoutError)
    await assert_told_by_server_only(world, world.target(ask))


async def test_a_target_on_any_worker_is_told_by_the_server(server: Server) -> None:
    """Neither plugin nor sweep: the handler runs its service, and no worker of ours at all."""

    def prepare(world: World) -> None:
        takes_unsigned(world)
        world.targets.append(replace(foreign_target(f"foreign-{world.id}"), delivery="server"))

    async with running_world(server, without=("handler",), prepare=prepare) as world:
        ask = Ask(world.key(), text="from afar")
        async with Worker(world.handler_client, task_queue=f"foreign-{world.id}", workflows=[ForeignWorkflow]):
            handle = await world.call(ask, replace(LONG, operation="foreign"))
            assert await handle.result() == Reply("from afar")
        await assert_told_by_server_only(world, world.target(ask))


async def test_continuing_as_new_is_no_ending(world: World) -> None:
    """The last run's outcome, once."""
    ask = Ask(world.key(), "continue once")
    assert await (await world.call(ask, LONG)).result() == Reply("second run")
    await assert_told_by_server_only(world, world.target(ask))


@pytest.mark.parametrize("behaviour", ["fail", "succeed"])
async def test_of_a_retried_target_the_last_attempts_outcome_is_told(world: World, behaviour: str) -> None:
    """At once: the server knows which attempt was the last."""
    ask = Ask(world.key(), behaviour)
    handle = await world.call(ask, replace(LONG, operation="flaky"))
    if behaviour == "succeed":
        assert await handle.result() == Reply("attempt 3")
    else:
        cause = await cause_of(handle)
        assert isinstance(cause, ApplicationError)
        assert (cause.type, cause.message) == ("Flaky", "attempt 3 failed")
    await assert_told_by_server_only(world, world.target(ask))


async def test_a_target_that_is_reset_tells_the_new_runs_outcome_once(world: World) -> None:
    """To the call that started it and to the one that was attached."""
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, LONG)
    target = await world.until_started(ask)
    second = await world.call(ask, LONG)
    await assert_eventually(partial(assert_callbacks, target, 2))
    await world.handler_client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=HANDLER,
            workflow_execution=WorkflowExecution(workflow_id=target.id),
            workflow_task_finish_event_id=4,
            request_id=secrets.token_hex(8),
            reason="by the test",
        )
    )
    await target.signal("say", "the new run")
    assert await first.result() == await second.result() == Reply("the new run")
    await assert_told_by_server_only(world, target, calls=2)


async def assert_callbacks(target: WorkflowHandle[Any, Any], count: int) -> None:
    assert len(await callbacks_of(target)) == count


async def test_two_calls_of_one_run_are_both_told(world: World) -> None:
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, LONG)
    target = await world.until_started(ask)
    second = await world.call(ask, LONG)
    await assert_eventually(partial(assert_callbacks, target, 2))
    await target.signal("say", "both")
    assert await first.result() == await second.result() == Reply("both")
    await assert_told_by_server_only(world, target, calls=2)


async def test_renewals_attach_nothing_more(world: World) -> None:
    """Neither those of the call that started the run nor those of one that was attached: the history stays as it is."""
    ask = Ask(world.key(), "wait")
    plan = CallPlan(first_lease=1, renewal=1)
    first = await world.call(ask, plan)
    target = await world.until_started(ask)
    second = await world.call(ask, plan)
    await assert_eventually(partial(assert_callbacks, target, 2))
    before = await events(target)
    assert before.count("WORKFLOW_EXECUTION_OPTIONS_UPDATED") == 1
    for handle in (first, second):
        await world.until_attempt(handle, 4)
    assert await events(target) == before
    assert len(await callbacks_of(target)) == 2
    await target.signal("say", "both")
    assert await first.result() == await second.result() == Reply("both")


async def test_renewals_attach_nothing_more_to_a_later_run(world: World) -> None:
    """What was attached to the first run is carried over with what was there from the start."""
    ask = Ask(world.key(), "continue on signal")
    first = await world.call(ask, LONG)
    target = await world.until_started(ask)
    second = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await assert_eventually(partial(assert_callbacks, target, 2))
    first_run = (await target.describe()).run_id
    await target.signal("say", "and wait")

    async def went_on() -> None:
        assert (await target.describe()).run_id != first_run

    await assert_eventually(went_on)
    await world.until_attempt(second, (await world.pending(second)).attempt + 2)
    assert len(await callbacks_of(target)) == 2
    await target.signal("say", "both")
    assert await first.result() == await second.result() == Reply("both")


async def test_an_outcome_told_by_a_renewal_and_by_the_server_is_one(world: World) -> None:
    """The server cannot get through; the renewal learns the outcome; what the server then repeats is nothing new."""
    is_away = True

    async def away(_: web.Request) -> web.StreamResponse | None:
        return web.Response(status=503) if is_away else None

    world.receiver.before = away
    ask = Ask(world.key(), text="once")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    assert await handle.result() == Reply("once")
    is_away = False

    async def told() -> None:
        assert world.receiver.statuses[-1] == 200

    await assert_eventually(told)
    assert set(world.receiver.statuses) == {503, 200}
    assert (await events(handle)).count("ACTIVITY_TASK_COMPLETED") == 1


async def test_more_calls_than_the_server_tells_still_end(world: World) -> None:
    """A run takes 32 callbacks here; whoever comes later asks again, and is not told of a misconfiguration."""
    ask = Ask(world.key(), "wait")
    handles = [await world.call(ask, LONG)]
    target = await world.until_started(ask)
    handles += [await world.call(ask, LONG) for _ in range(31)]
    await assert_eventually(partial(assert_callbacks, target, 32))
    late = await world.call(ask, LONG)
    await world.until_attempt(late, 2, in_backoff=True)
    assert "more calls wait for this run" in (await world.pending(late)).last_failure.message
    await target.signal("say", "all")
    assert await asyncio.gather(*(each.result() for each in [*handles, late])) == [Reply("all")] * 33


async def test_an_orphan_is_found_where_completions_are_not_signed(server: Server) -> None:
    """The question whether anybody waits carries the token as the completion would."""

    def prepare(world: World) -> None:
        takes_unsigned(world)
        world.handler_options = {"orphan_check_s": 0.5}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key())
        handle = await world.call(ask, replace(LONG, operation="minded"))
        target = world.handler_client.get_workflow_handle(f"minded-{ask.key}")

        async def asked() -> None:
            assert world.receiver.statuses

        await assert_eventually(asked)
        assert world.receiver.statuses[0] == 200
        await handle.terminate()
        with pytest.raises(WorkflowFailureError) as raised:
            await target.result()
        assert isinstance(raised.value.cause, CancelledError)


# Who may complete.


def into_url(message: Message) -> None:
    message.url += f"?sig={message.headers.pop(CALLBACK_TOKEN)}"


def into_both(message: Message) -> None:
    message.url += f"?sig={message.headers[CALLBACK_TOKEN]}"


def twice(message: Message) -> None:
    message.headers.add(CALLBACK_TOKEN, message.headers[CALLBACK_TOKEN])


def out(message: Message) -> None:
    del message.headers[CALLBACK_TOKEN]


def with_signature_input(message: Message) -> None:
    message.headers[SIGNATURE_INPUT] = 'bridge=();tag="bridge-completion"'


def another_id(message: Message) -> None:
    message.url = message.url[:-22] + secrets.token_urlsafe(16)


async def waiting(world: World, **token: Any) -> tuple[Calling, Message]:
    """A call that waits, and a completion that would end it."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, LONG)
    await world.until_started(ask)
    described = (await handle.describe()).raw_description
    message = completion(
        world,
        workflow_id=handle.id,
        run_id=described.workflow_execution_info.execution.run_id,
        request_id=described.pending_activities[0].activity_id,
        **token,
    )
    return handle, message


@pytest.mark.parametrize("place", ["header", "url"])
async def test_a_server_token_lets_an_unsigned_completion_in(world: World, place: str) -> None:
    """From either place: our own token travels in the header, but what it proves does not depend on that."""
    handle, message = await waiting(world, auth="server")
    if place == "url":
        into_url(message)
    assert (await send(message, None)).status == 200
    assert await handle.result() == Reply("told")


@pytest.mark.parametrize("state", ["failed", "canceled"])
async def test_a_server_token_lets_any_outcome_in(world: World, state: str) -> None:
    handle, message = await waiting(world, auth="server", state=state, body=failure_body())
    assert (await send(message, None)).status == 200
    assert isinstance(await cause_of(handle), CancelledError if state == "canceled" else ApplicationError)


async def assert_unauthenticated(world: World, handle: Calling, message: Message, signer: MessageSigner | None) -> None:
    """401 with the one body that tells nothing, and the call goes on."""
    answered = await send(message, signer)
    assert (answered.status, answered.type, answered.message) == (401, "UNAUTHENTICATED", "not authenticated")
    assert (await handle.describe()).status is WorkflowExecutionStatus.RUNNING
    assert await world.pending(handle) is not None


@pytest.mark.parametrize(
    ("auth", "spoil", "is_signed"),
    [
        pytest.param("sig", None, False, id="a token that asks for a signature, and none"),
        pytest.param("sig", None, True, id="a signature of a handler whose server completes"),
        pytest.param("server", None, True, id="a signature where none is expected"),
        pytest.param("server", with_signature_input, False, id="a mere Signature-Input"),
        pytest.param("server", into_both, False, id="the token in both places"),
        pytest.param("server", twice, False, id="the token twice"),
        pytest.param("server", out, False, id="no token"),
        pytest.param("server", another_id, False, id="another callback's token"),
    ],
)
async def test_what_a_receiver_of_server_completions_refuses(
    world: World, auth: Literal["sig", "server"], spoil: Callable[[Message], None] | None, is_signed: bool
) -> None:
    handle, message = await waiting(world, auth=auth)
    if spoil is not None:
        spoil(message)
    await assert_unauthenticated(world, handle, message, MessageSigner(world.keys.completion) if is_signed else None)


@pytest.mark.parametrize("is_signed", [False, True])
async def test_a_server_token_is_worth_nothing_for_a_handler_that_signs(server: Server, is_signed: bool) -> None:
    """The settings decide with the token, not the token alone; say, one minted before they were changed."""
    async with running_world(server) as world:
        handle, message = await waiting(world, auth="server")
        await assert_unauthenticated(
            world, handle, message, MessageSigner(world.keys.completion) if is_signed else None
        )


async def test_a_server_token_for_an_unknown_handler_is_refused(server: Server) -> None:
    async with running_world(server, prepare=takes_unsigned) as world:
        handle, message = await waiting(world, auth="server")
        await world.receiver.stop()
        world.caller_options = {
            "handlers": {"another": {"start_keys": ring(), "completions": "server"}},
            "endpoints": {"x": {"url": world.service.url, "handler": "another", "allow_insecure": True}},
        }
        await world.receiver.start()
        await assert_unauthenticated(world, handle, message, None)


async def test_a_server_token_stands_in_no_url_and_no_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It proves alone. Not in the caller's history either; the handler's shows it, to those who may read that."""
    caplog.set_level(logging.DEBUG)
    tokens = []

    async def note(request: web.Request) -> None:
        tokens.append(request.headers[CALLBACK_TOKEN])

    world.receiver.before = note
    ask = Ask(world.key())
    handle = await world.call(ask, LONG)
    assert await handle.result() == Reply("")
    [token] = tokens
    payload = token[:40]
    urls = [path for path, _ in world.receiver.requests + world.service.requests]
    assert len(urls) == 2
    assert not any(payload in url for url in urls)
    logs = "\n".join(JsonFormatter().format(record) for record in caplog.records) + caplog.text
    assert "bridge.http_request" in logs
    assert payload not in logs
    texts = []
    for each in (handle, world.target(ask)):
        described = MessageToJson((await each.describe()).raw_description)
        texts.append(described + "".join(MessageToJson(event) for event in (await each.fetch_history()).events))
    assert payload not in texts[0]
    assert payload in texts[1]


# Where the server cannot, or may not, tell.


async def test_a_call_whose_callback_has_no_proof_of_its_own_is_told_by_the_worker(server: Server) -> None:
    """The operation would have the server tell; this caller takes only what is signed."""

    def prepare(world: World) -> None:
        world.targets = [replace(each, delivery="server") for each in Targets(world.targets)]

    async with running_world(server, prepare=prepare) as world:
        signed = []

        async def note(request: web.Request) -> None:
            signed.append(SIGNATURE_INPUT in request.headers)

        world.receiver.before = note
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, LONG)
        target = await world.until_started(ask)
        assert await callbacks_of(target) == []
        await target.signal("say", "signed")
        assert await handle.result() == Reply("signed")
        assert signed == [True]
        assert world.receiver.statuses == [200]


async def test_a_caller_that_expects_signatures_is_told_by_the_worker_whatever_proof_it_sends(server: Server) -> None:
    """The handler's settings decide: an outcome for a caller with completion keys is signed."""

    def prepare(world: World) -> None:
        world.targets = [replace(each, delivery="server") for each in Targets(world.targets)]

    async with running_world(server, without=("caller",), prepare=prepare) as world:
        signed = []

        async def note(request: web.Request) -> web.StreamResponse:
            signed.append(SIGNATURE_INPUT in request.headers)
            return world.own_word(request, 200)

        world.receiver.before = note
        ask = Ask(world.key(), "wait")
        message = start(world, {"key": ask.key, "behaviour": ask.behaviour})
        message.headers[CALLBACK_PREFIX + CALLBACK_TOKEN] = "a proof of its own"
        assert (await send(message, MessageSigner(world.keys.start))).status == 201
        target = world.target(ask)
        assert await callbacks_of(target) == []
        await target.signal("say", "signed")
        await target.result()
        assert signed == [True]


async def test_an_operation_told_by_its_worker_is_told_unsigned_to_whom_takes_only_that(server: Server) -> None:
    """With the token in its header, as the server would send it."""
    async with running_world(server, prepare=takes_unsigned) as world:
        ask = Ask(world.key(), text="by the worker")
        handle = await world.call(ask, LONG)
        assert await handle.result() == Reply("by the worker")
        assert await callbacks_of(world.target(ask)) == []
        assert "ACTIVITY_TASK_SCHEDULED" in await events(world.target(ask))
        assert world.receiver.statuses == [200]


async def test_a_server_that_may_not_send_to_the_receiver_is_said_and_the_call_goes_on_when_it_may(
    server: Server,
) -> None:
    """The pending call names the setting; nothing was started. This server allows 127.0.0.1, and not localhost."""

    def prepare(world: World) -> None:
        told_by_server(world)
        world.peer_options["callbacks"] = [
            {"url": f"http://{host}:{world.receiver.port}", "networks": ["127.0.0.0/8"], "allow_insecure": True}
            for host in ("localhost", "127.0.0.1")
        ]
        world.receiver.url = f"http://localhost:{world.receiver.port}"

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), text="at last")
        handle = await world.call(ask, LONG)
        await world.until_attempt(handle, 2, in_backoff=True)
        message = (await world.pending(handle)).last_failure.message
        assert f"refuses to send completions to localhost:{world.receiver.port}" in message
        assert "component.callbacks.allowedAddresses" in message
        assert not [
            each async for each in world.handler_client.list_workflows(f"WorkflowId = '{world.target(ask).id}'")
        ]

        await world.stop_worker("caller")
        world.receiver.url = f"http://127.0.0.1:{world.receiver.port}"
        await world.start_worker("caller")
        assert await handle.result() == Reply("at last")

        async def answered() -> None:
            assert world.service.statuses[-1] == 201

        await assert_eventually(answered)
        assert set(world.service.statuses[:-1]) == {503}
