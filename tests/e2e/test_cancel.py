"""The four cancellation types and three timeouts of a call: same names, same guarantees as native Nexus."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import WorkflowExecutionStatus, WorkflowHandle
from temporalio.exceptions import CancelledError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.workflow import NexusOperationCancellationType as CancellationType

from bridge.security.signatures import MessageKind, MessageSigner
from bridge.workflow.call import Transport
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import cause_of, replay
from tests.support.helpers import CALLER, assert_eventually
from tests.support.peer import Message, send, start
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world


async def started_call(world: World, kind: CancellationType, behaviour: str = "cleanup") -> Any:
    ask = Ask(key=world.key(), behaviour=behaviour)
    handle = await world.call(ask, CallPlan(first_lease=600, cancellation=int(kind)))
    target = await world.until_started(ask)

    async def known() -> None:
        activity = await world.pending(handle)
        assert activity is not None
        assert activity.heartbeat_details.payloads, "the token is not recorded yet"
        assert "TIMER_STARTED" in await events(target)

    await assert_eventually(known)
    return handle, target


async def status(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    return (await handle.describe()).status


def cancels(world: World) -> list[int]:
    return [code for path, code in world.service.requests if path.endswith("/cancel")]


async def until_canceled(target: WorkflowHandle[Any, Any]) -> None:
    async def canceled() -> None:
        assert await status(target) == WorkflowExecutionStatus.CANCELED

    await assert_eventually(canceled)


async def test_wait_completed_waits_for_the_operations_own_end(world: World) -> None:
    """The default: the target cleans up, ends as canceled, and only then the caller hears of it."""
    handle, target = await started_call(world, CancellationType.WAIT_COMPLETED)
    await handle.cancel()
    assert isinstance(await cause_of(handle), CancelledError)
    await until_canceled(target)
    assert cancels(world) == [202]
    assert await world.receiver.answered() == [200]


async def test_wait_completed_takes_a_success_where_the_target_goes_on(world: World) -> None:
    """The target decides whether it ends as canceled."""
    handle, _ = await started_call(world, CancellationType.WAIT_COMPLETED, "swallow cancel")
    await handle.cancel()
    assert (await handle.result()).text == "went on all the same"


async def test_wait_requested_waits_for_the_request_only(world: World) -> None:
    """The caller goes on when the handler has accepted the cancel; the target may still be cleaning up."""
    handle, target = await started_call(world, CancellationType.WAIT_REQUESTED, "slow cleanup")
    await handle.cancel()
    assert isinstance(await cause_of(handle), CancelledError)
    assert cancels(world) == [202]
    assert "WORKFLOW_EXECUTION_CANCEL_REQUESTED" in await events(target)
    assert await status(target) == WorkflowExecutionStatus.RUNNING
    await target.terminate()


async def test_try_cancel_reports_at_once_and_sends_the_request(world: World) -> None:
    """The caller goes on while the request is being sent."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith("/cancel"):
            reached.set()
            await go_on.wait()
        return None

    world.service.before = hold
    ask = Ask(key=world.key(), behaviour="cleanup")
    handle = await world.call(
        ask, CallPlan(first_lease=600, cancellation=int(CancellationType.TRY_CANCEL), after=600, cancel_after=True)
    )
    target = await world.until_started(ask)
    await handle.signal("cancel_call")
    await asyncio.wait_for(reached.wait(), 20)

    async def reported() -> None:
        assert await handle.query("reported") == "CancelledError"

    await assert_eventually(reported)
    go_on.set()
    await until_canceled(target)
    await handle.terminate()


async def test_abandon_sends_nothing(world: World) -> None:
    """The caller gets its cancellation; the target gets no request."""
    handle, target = await started_call(world, CancellationType.ABANDON)
    await handle.cancel()
    assert isinstance(await cause_of(handle), CancelledError)
    assert cancels(world) == []
    assert await status(target) == WorkflowExecutionStatus.RUNNING
    assert "BRIDGE" not in "".join(await events(handle))
    await target.terminate()


@pytest.mark.parametrize("kind", list(CancellationType))
async def test_an_outcome_that_came_before_the_cancel_is_not_replaced_by_it(
    world: World, kind: CancellationType
) -> None:
    """One workflow task brings both, because the worker was down. No cancel is sent for an operation that has ended."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=600, cancellation=int(kind)))
    target = await world.until_started(ask)
    await world.stop_worker("caller")
    await target.signal("say", "paid")

    async def has_outcome() -> None:
        assert "ACTIVITY_TASK_COMPLETED" in await events(handle)

    await assert_eventually(has_outcome)
    await handle.cancel()
    await world.start_worker("caller")
    assert await handle.result() == Reply("paid")
    assert cancels(world) == []
    assert "MARKER_RECORDED" not in await events(handle)
    await replay(handle)


async def test_a_cancel_before_the_start_is_known_waits_for_it(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The handler is unavailable when both are requested. The start is sent before the cancel."""
    await world.service.stop()
    ask = Ask(key=world.key(), behaviour="cleanup")
    handle = await world.call(ask)
    await world.until_attempt(handle, 2)
    await handle.cancel()

    async def tried_twice() -> None:
        assert (await events(handle)).count("MARKER_RECORDED") >= 2

    await assert_eventually(tried_twice)
    await world.service.start()
    assert isinstance(await cause_of(handle), CancelledError)
    assert cancels(world) == [202]
    await until_canceled(world.target(ask))
    reasons = {vars(each).get("bridge.reason") for each in caplog.records if "cancel_not_sent" in each.getMessage()}
    assert reasons == {"the operation is not known to have started yet"}


async def test_a_cancel_while_the_handler_is_unavailable_is_repeated(world: World) -> None:
    """The cancel is repeated until the deadline; here the handler returns before."""
    handle, target = await started_call(world, CancellationType.WAIT_COMPLETED)
    await world.service.stop()
    await handle.cancel()

    async def tried_twice() -> None:
        assert (await events(handle)).count("MARKER_RECORDED") >= 2

    await assert_eventually(tried_twice)
    await world.service.start()
    assert isinstance(await cause_of(handle), CancelledError)
    await until_canceled(target)


async def test_a_cancel_is_repeated_until_the_settings_have_the_endpoint_again(world: World) -> None:
    """A worker whose settings have lost the endpoint sends nothing. That is no refusal by the handler."""
    handle, target = await started_call(world, CancellationType.WAIT_COMPLETED)
    await world.stop_worker("caller")
    world.caller_options = {"endpoints": {"others": world.caller_settings.endpoints["payments"]}}
    await world.start_worker("caller")
    await handle.cancel()

    async def tried() -> None:
        assert "MARKER_RECORDED" in await events(handle)

    await assert_eventually(tried)
    await world.stop_worker("caller")
    world.caller_options = {}
    await world.start_worker("caller")
    assert isinstance(await asyncio.wait_for(cause_of(handle), 30), CancelledError)
    await until_canceled(target)


async def test_a_workflow_canceled_twice_sends_one_cancel(world: World) -> None:
    """A second cancellation of the workflow sends no second request."""
    handle, target = await started_call(world, CancellationType.WAIT_COMPLETED, "slow cleanup")
    await handle.cancel()

    async def asked() -> None:
        assert cancels(world) == [202]

    await assert_eventually(asked)
    await handle.cancel()
    assert cancels(world) == [202]
    assert (await events(target)).count("WORKFLOW_EXECUTION_CANCEL_REQUESTED") == 1
    await target.terminate()
    await handle.terminate()


async def test_a_worker_that_shuts_down_cancels_nothing(world: World) -> None:
    """The eviction of a run is not a cancel: the target goes on, and the call goes on with the next worker."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=600))
    target = await world.until_started(ask)
    await world.stop_worker("caller")
    await world.start_worker("caller")
    assert cancels(world) == []
    await target.signal("say", "still here")
    assert (await handle.result()).text == "still here"
    assert len(await events(handle)) == 11


@pytest.mark.parametrize("form", ["header", "query", "path"])
async def test_the_cancel_route_takes_the_token_in_every_form(world: World, form: str) -> None:
    """The spec has two forms and server 1.29 a third. A repeated cancel, or one after the end, is 202 as well."""
    key = world.key()
    signer = MessageSigner(world.keys.start)
    message = start(world, {"key": key, "behaviour": "cleanup"})
    token = json.loads((await send(message, signer)).body)["token"]

    async def cancel(text: str = token) -> Any:
        base = message.url.partition("?")[0]
        url = {"header": f"{base}/cancel", "query": f"{base}/cancel?token={text}", "path": f"{base}/{text}/cancel"}[
            form
        ]
        canceling = Message(url, message.headers.copy(), b"", kind=MessageKind.CANCEL)
        canceling.headers.clear()
        if form == "header":
            canceling.headers["Nexus-Operation-Token"] = text
        return await send(canceling, signer)

    assert (await cancel()).status == 202
    assert (await cancel()).status == 202
    target = world.handler_client.get_workflow_handle(f"probe-{key}")
    await until_canceled(target)
    assert (await events(target)).count("WORKFLOW_EXECUTION_CANCEL_REQUESTED") == 1
    assert (await cancel()).status == 202
    forged = await cancel(token[:-3] + "AAA")
    assert (forged.status, forged.type) == (404, "NOT_FOUND")


async def test_a_cancel_without_a_token_or_a_proof_is_refused(world: World) -> None:
    """A missing token is a 400, the signature of a start is a 401."""
    url = f"{world.service.url}/c/{CALLER}/ProbeService/probe/cancel"
    signer = MessageSigner(world.keys.start)
    empty = start(world, {}).headers.copy()
    empty.clear()
    assert (await send(Message(url, empty.copy(), b"", kind=MessageKind.CANCEL), signer)).status == 400
    assert (await send(Message(url, empty.copy(), b"", kind=MessageKind.START), signer)).status == 401


async def test_start_to_close_bounds_the_operation(world: World) -> None:
    """The time counts from the 201, and the error names this timeout."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(start_to_close=2, renewal=1))
    error = await cause_of(handle)
    assert isinstance(error, TemporalTimeoutError)
    assert error.type is TimeoutType.START_TO_CLOSE
    await world.target(ask).terminate()


async def test_schedule_to_start_bounds_the_wait_for_the_handler(server: Server) -> None:
    """The handler cannot be reached in time."""
    async with running_world(server, without=("service",)) as world:
        handle = await world.call(Ask(key=world.key()), CallPlan(schedule_to_start=2))
        error = await cause_of(handle)
        assert isinstance(error, TemporalTimeoutError)
        assert error.type is TimeoutType.SCHEDULE_TO_START
        assert "handler not reached" in str(error.cause)


@pytest.mark.parametrize("transport", ["callback", "poll"])
async def test_an_operation_does_not_start_after_the_limit_for_its_start(server: Server, transport: Transport) -> None:
    """No worker had a place for the activity before the limit. Nothing is sent afterwards."""

    def prepare(world: World) -> None:
        world.caller_worker_options = {"no_remote_activities": True}

    async with running_world(server, prepare=prepare) as world:
        handle = await world.call(Ask(key=world.key()), CallPlan(schedule_to_start=1, transport=transport))
        limit = (await handle.describe()).start_time + timedelta(seconds=2)

        async def is_over() -> None:
            assert await world.pending(handle) is not None
            assert datetime.now(UTC) > limit

        await assert_eventually(is_over)
        await world.stop_worker("caller")
        world.caller_worker_options = {}
        await world.start_worker("caller")
        error = await cause_of(handle)
        assert isinstance(error, TemporalTimeoutError)
        assert error.type is TimeoutType.SCHEDULE_TO_START
        assert world.service.requests == []


async def test_schedule_to_start_is_over_once_the_operation_has_started(world: World) -> None:
    """This timeout does not end a call whose operation runs."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1, schedule_to_start=2))
    await world.until_attempt(handle, 4)
    await world.target(ask).signal("say", "long since started")
    assert (await handle.result()).text == "long since started"


@pytest.mark.parametrize("code", [401, 404])
async def test_a_proxys_refusal_does_not_lose_a_cancel(world: World, code: int) -> None:
    """The operation is known to run: only an answer signed by the handler ends the repeats."""
    refused: list[int] = []

    async def refuse_once(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith("/cancel") and not refused:
            refused.append(code)
            return web.Response(status=code, text="default backend")
        return None

    handle, target = await started_call(world, CancellationType.WAIT_COMPLETED)
    world.service.before = refuse_once
    await handle.cancel()
    assert isinstance(await cause_of(handle), CancelledError)
    await until_canceled(target)
    assert refused == [code]


async def test_start_to_close_is_kept_while_the_handler_is_unavailable(world: World) -> None:
    """The time counts from the 201, also if the handler cannot be reached afterwards."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=2, start_to_close=4, renewal=1))
    await world.until_started(ask)

    async def known() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads, "the 201 is not recorded yet"

    await assert_eventually(known)
    await world.service.stop()
    error = await cause_of(handle)
    assert isinstance(error, TemporalTimeoutError)
    assert error.type is TimeoutType.START_TO_CLOSE
    await world.target(ask).terminate()
