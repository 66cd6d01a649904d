"""Every ending of a target reaches its caller, and every end of a caller stops the sender."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import ResetReapplyExcludeType
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest, ResetWorkflowExecutionRequest
from temporalio.client import Client, WorkflowHandle
from temporalio.exceptions import TerminatedError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError

from scripts.environment.server import Server
from tests.support.callers import CallPlan, LeavingCaller
from tests.support.calling_workflows import failure_of
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

LONG = CallPlan(first_lease=600)


async def reset(client: Client, handle: WorkflowHandle[Any, Any], event_id: int, **options: Any) -> str:
    """Reset to the workflow task that ended with *event_id*; returns the new run's id."""
    described = await handle.describe()
    response = await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=described.run_id),
            reason="test",
            workflow_task_finish_event_id=event_id,
            request_id=str(uuid.uuid4()),
            **options,
        )
    )
    return response.run_id


async def test_a_terminated_target_is_found_by_the_next_renewal(world: World) -> None:
    """No code of the worker ran, and the operator's name and words stay in the handler's namespace."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await (await world.until_started(ask)).terminate(reason="out of paper")
    error = await failure_of(handle)
    assert isinstance(error, TerminatedError)
    assert error.message == "operation terminated"
    assert world.receiver.requests == []
    history = (await handle.fetch_history()).to_json()
    assert "out of paper" not in history


async def test_a_caller_may_be_allowed_to_see_who_terminated_a_target(server: Server) -> None:
    """The setting belongs to the caller's entry."""

    def prepare(world: World) -> None:
        world.peer_options = {"shows_terminations": True}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
        await (await world.until_started(ask)).terminate(reason="out of paper")
        error = await failure_of(handle)
        assert isinstance(error, TerminatedError)
        assert error.message == f"operation terminated by {world.handler_client.identity}: out of paper"


async def test_a_target_that_timed_out_is_found_by_the_next_renewal(world: World) -> None:
    """The caller's deadline bounds the target, and the target's timer ends it."""
    ask = Ask(key=world.key())
    handle = await world.call(
        ask, CallPlan(first_lease=1, renewal=1, operation="shared", start_to_close=2, deadline=60)
    )
    error = await failure_of(handle)
    assert isinstance(error, TemporalTimeoutError)
    assert error.type is TimeoutType.START_TO_CLOSE


async def test_a_reset_target_delivers_the_new_runs_outcome_once(world: World) -> None:
    """The reset keeps the memo; the end of the old run is not delivered."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)

    async def first_task_done() -> None:
        assert "WORKFLOW_TASK_COMPLETED" in await events(target)

    await assert_eventually(first_task_done)
    new_run = await reset(world.handler_client, target, 4)
    await target.signal("say", "after the reset")
    assert await handle.result() == Reply("after the reset")
    assert await world.receiver.answered() == [200]
    closing = (await handle.fetch_history()).events[6].activity_task_completed_event_attributes
    assert new_run in closing.identity


async def test_a_call_that_a_reset_forgets_gets_the_new_runs_outcome(world: World) -> None:
    """The signal that attached the call is not applied to the new run. The old run was terminated and has not ended."""
    ask = Ask(key=world.key(), behaviour="wait")
    await world.call(ask, CallPlan(first_lease=600))
    target = await world.until_started(ask)
    attached = await world.call(ask, CallPlan(first_lease=4, renewal=1))

    async def known() -> None:
        activity = await world.pending(attached)
        assert activity is not None
        assert activity.heartbeat_details.payloads, "the operation is not recorded yet"

    await assert_eventually(known)
    names = await events(target)
    signal = ResetReapplyExcludeType.RESET_REAPPLY_EXCLUDE_TYPE_SIGNAL
    completed = names.index("WORKFLOW_TASK_COMPLETED") + 1
    await reset(world.handler_client, target, completed, reset_reapply_exclude_types=[signal])
    await world.until_attempt(attached, 4)
    await world.target(ask).signal("say", "of the new run")
    assert await attached.result() == Reply("of the new run")


async def test_a_call_whose_deadline_passed_before_the_reset_ends_at_once(world: World) -> None:
    """The activity has its whole time again. The deadline of the call has not moved."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=600, deadline=4, catch=True))
    await world.until_started(ask)
    await handle.signal("a signal makes a workflow task")

    async def two_tasks() -> int:
        completed = [number for number, name in enumerate(await events(handle), 1) if name == "WORKFLOW_TASK_COMPLETED"]
        assert len(completed) == 2
        return completed[1]

    second = await assert_eventually(two_tasks)
    assert await handle.result() == Reply("TimeoutError")
    run_id = await reset(world.caller_client, handle, second)
    again = world.caller_client.get_workflow_handle(handle.id, run_id=run_id, result_type=Reply)
    assert await again.result() == Reply("TimeoutError")
    assert "ACTIVITY_TASK_TIMED_OUT" not in await events(again)


async def test_a_reset_after_the_limit_for_the_start_does_not_end_the_call_of_a_running_target(world: World) -> None:
    """The activity of the new run does not know that the operation has started."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=600, schedule_to_start=2))
    target = await world.until_started(ask)
    await handle.signal("a signal makes a workflow task")
    limit = (await handle.describe()).start_time + timedelta(seconds=4)

    async def two_tasks_and_over() -> int:
        completed = [number for number, name in enumerate(await events(handle), 1) if name == "WORKFLOW_TASK_COMPLETED"]
        assert len(completed) == 2
        assert datetime.now(UTC) > limit
        return completed[1]

    second = await assert_eventually(two_tasks_and_over)
    asked = len(world.service.requests)
    run_id = await reset(world.caller_client, handle, second)
    again = world.caller_client.get_workflow_handle(handle.id, run_id=run_id, result_type=Reply)

    async def asks_again() -> None:
        assert len(world.service.requests) == asked + 1

    await assert_eventually(asks_again)
    await target.signal("say", "running all the time")
    assert await again.result() == Reply("running all the time")


@pytest.mark.parametrize("moment", ["with its call", "before its call"])
async def test_a_caller_that_is_reset_gets_the_outcome_of_the_same_target(world: World, moment: str) -> None:
    """The same activity continues in the new run, or the new run's call attaches to the target of the first."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await handle.signal("anything")

    async def second_task_done() -> None:
        assert (await events(handle)).count("WORKFLOW_TASK_COMPLETED") == 2

    await assert_eventually(second_task_done)
    names = await events(handle)
    completed = [index + 1 for index, name in enumerate(names) if name == "WORKFLOW_TASK_COMPLETED"]
    new_run = await reset(world.caller_client, handle, completed[1] if moment == "with its call" else completed[0])
    again = world.caller_client.get_workflow_handle(handle.id, run_id=new_run, result_type=Reply)
    if moment == "before its call":

        async def attached() -> None:
            assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

        await assert_eventually(attached)
    await target.signal("say", "the same target")
    assert await again.result() == Reply("the same target")
    runs = [run async for run in world.handler_client.list_workflows(f"WorkflowId = '{target.id}'")]
    assert len(runs) == 1
    assert 200 in await world.receiver.answered()


async def test_a_caller_that_continues_as_new_gives_its_call_up_and_may_call_again(world: World) -> None:
    """The first run's callback is answered 410; the second run's call has attached to the same target."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.caller_client.start_workflow(
        LeavingCaller.run, args=[ask, False], id=f"leaving-{ask.key}", task_queue=world.order_queue
    )
    target = await world.until_started(ask)
    await handle.signal(LeavingCaller.leave)

    async def attached() -> None:
        assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

    await assert_eventually(attached)
    await target.signal("say", "to the second run")
    assert await handle.result() == Reply("to the second run")

    async def both_answered() -> None:
        assert sorted(await world.receiver.answered()) == [200, 410]

    await assert_eventually(both_answered)


@pytest.mark.parametrize("end", ["terminated", pytest.param("deleted", marks=pytest.mark.part("deletion"))])
async def test_the_sender_stops_when_the_caller_is_gone(world: World, end: str) -> None:
    """The answer is 410, or 404 if the caller was deleted. The target closes normally, without a delivery workflow."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await handle.terminate()
    if end == "deleted":
        await world.caller_client.workflow_service.delete_workflow_execution(
            DeleteWorkflowExecutionRequest(
                namespace=world.caller_client.namespace,
                workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=handle.first_execution_run_id or ""),
            )
        )

        async def deleted() -> None:
            try:
                await handle.describe()
            except RPCError:
                return
            message = "still there"
            raise AssertionError(message)

        await assert_eventually(deleted, within=50)
    await target.signal("say", "to no caller")
    assert await target.result() == {"text": "to no caller", "blob": ""}

    async def answered() -> None:
        assert await world.receiver.answered() == [410 if end == "terminated" else 404]

    await assert_eventually(answered)
