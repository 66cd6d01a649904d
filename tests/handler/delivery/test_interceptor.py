"""The interceptor: announces only what is committed, and never changes the target's own ending."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from temporalio import workflow
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle, WorkflowUpdateFailedError
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError
from temporalio.worker import Worker

from scripts.environment.server import Server
from tests.support.helpers import assert_eventually
from tests.support.workflows import TARGETS, Ask, CallPlan, Reply
from tests.support.world import World, events, running_world

LONG = CallPlan(first_lease=600)
BIG = 2 * 1024 * 1024 - 20_000
"""Fits Temporal's limit as a result, but not beside the record of a delivery."""


@workflow.defn(name="Holder", sandboxed=False)
class Holder:
    """Holds a workflow id."""

    @workflow.run
    async def run(self) -> None:
        await workflow.wait_condition(lambda: False)


class Gate:
    """Holds the receiver's requests until it is opened."""

    def __init__(self, world: World) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        world.receiver.before = self

    async def __call__(self, _: web.Request) -> web.StreamResponse | None:
        self.reached.set()
        await self.opened.wait()
        return None


async def deliveries(world: World, target: WorkflowHandle[Any, Any]) -> list[WorkflowExecutionStatus | None]:
    """States of the delivery workflows of *target*, from its own history."""
    children = [
        event.child_workflow_execution_started_event_attributes.workflow_execution
        async for event in target.fetch_history_events()
        if event.HasField("child_workflow_execution_started_event_attributes")
    ]
    return [(await world.handler_client.get_workflow_handle(each.workflow_id).describe()).status for each in children]


async def status(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    return (await handle.describe()).status


async def failure_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


async def answers(world: World, status_code: int) -> None:
    async def before(request: web.Request) -> web.StreamResponse:
        return world.own_word(request, status_code)

    world.receiver.before = before


async def test_the_outcome_is_in_history_before_anyone_is_told(world: World) -> None:
    """When the callback arrives, the delivery with its outcome is committed."""
    gate = Gate(world)
    ask = Ask(key=world.key(), text="committed")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    history = (await world.target(ask).fetch_history()).events
    scheduled = [e for e in history if e.HasField("activity_task_scheduled_event_attributes")]
    assert b"committed" in scheduled[0].activity_task_scheduled_event_attributes.input.payloads[1].data
    gate.opened.set()
    assert await handle.result() == Reply("committed")


async def test_a_cancel_during_delivery_changes_nothing(world: World) -> None:
    """The outcome stands: told as succeeded, closed as completed."""
    gate = Gate(world)
    ask = Ask(key=world.key(), text="stands")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    target = world.target(ask)
    for _ in range(2):
        await target.cancel()

    async def requested() -> None:
        assert "WORKFLOW_EXECUTION_CANCEL_REQUESTED" in await events(target)

    await assert_eventually(requested)
    gate.opened.set()
    assert await handle.result() == Reply("stands")
    assert await target.result() == {"text": "stands", "blob": ""}
    assert await deliveries(world, target) == []


async def test_a_cancel_during_delivery_does_not_turn_a_failure_into_a_cancellation(world: World) -> None:
    """A target that failed by an unasked-for cancellation closes as failed, as it was told."""
    gate = Gate(world)
    ask = Ask(key=world.key(), behaviour="self-canceled failure")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    await world.target(ask).cancel()
    gate.opened.set()
    assert isinstance(await failure_of(handle), CancelledError)
    with pytest.raises(WorkflowFailureError):
        await world.target(ask).result()
    assert await status(world.target(ask)) == WorkflowExecutionStatus.FAILED


async def test_an_update_during_delivery_is_refused(world: World) -> None:
    """The function has ended; nothing can be promised any more."""
    gate = Gate(world)
    ask = Ask(key=world.key())
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    with pytest.raises(WorkflowUpdateFailedError) as raised:
        await world.target(ask).execute_update("change", "too late")
    assert isinstance(raised.value.cause, ApplicationError)
    assert raised.value.cause.type == "bridge.WorkflowEnded"
    gate.opened.set()
    assert await handle.result() == Reply("")


@pytest.mark.parametrize("behaviour", ["cleanup", "swallow cancel"])
async def test_a_cancel_of_the_target_is_told_as_it_ends(world: World, behaviour: str) -> None:
    """Canceled after its cleanup, or completed because it went on all the same."""
    ask = Ask(key=world.key(), behaviour=behaviour)
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)

    async def running() -> None:
        assert "TIMER_STARTED" in await events(target)

    await assert_eventually(running)
    await target.cancel()
    if behaviour == "cleanup":
        assert isinstance(await failure_of(handle), CancelledError)
        with pytest.raises(WorkflowFailureError):
            await target.result()
        assert await status(target) == WorkflowExecutionStatus.CANCELED
    else:
        assert await handle.result() == Reply("went on all the same")


async def test_an_outcome_too_large_is_told_so_and_the_target_keeps_its_result(world: World) -> None:
    """An oversized command would have terminated the target."""
    ask = Ask(key=world.key(), size=BIG)
    error = await failure_of(await world.call(ask, LONG))
    assert isinstance(error, ApplicationError)
    assert error.type == "OutcomeTooLarge"
    assert error.non_retryable
    assert len((await world.target(ask).result())["blob"]) == BIG


@pytest.fixture(name="impatient")
async def impatient_world(server: Server) -> Any:
    """Hands over after a second."""

    def prepare(world: World) -> None:
        world.delivery_budget = timedelta(seconds=1)

    async with running_world(server, prepare=prepare) as world:
        yield world


async def test_a_delivery_is_handed_over_and_the_target_closes(impatient: World) -> None:
    """Nobody's payment stays open because somebody else's receiver is down."""
    world = impatient
    await answers(world, 503)
    ask = Ask(key=world.key(), text="handed over")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    assert await target.result() == {"text": "handed over", "blob": ""}
    assert await deliveries(world, target) == [WorkflowExecutionStatus.RUNNING]
    world.receiver.before = None
    assert await handle.result() == Reply("handed over")

    async def ended() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.COMPLETED]

    await assert_eventually(ended)


async def test_a_delivery_id_that_is_taken_counts_as_handed_over(impatient: World) -> None:
    """Uncaught, "already started" would have failed the target."""
    world = impatient
    gate = Gate(world)
    ask = Ask(key=world.key(), text="taken")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    target = world.target(ask)
    described = await target.describe()
    request_id = (await described.memo())["bridge"]["request_id"]
    async with Worker(world.handler_client, task_queue=f"holders-{world.id}", workflows=[Holder]):
        holder = await world.handler_client.start_workflow(
            Holder.run, id=f"bridge-delivery-{request_id}-{described.run_id}", task_queue=f"holders-{world.id}"
        )
        assert await target.result() == {"text": "taken", "blob": ""}
        assert "START_CHILD_WORKFLOW_EXECUTION_FAILED" in await events(target)
        await holder.terminate()
    gate.opened.set()
    await handle.terminate()


async def test_a_delivery_that_is_refused_stays_listed_as_failed(impatient: World) -> None:
    """The target closes with its own result; the delivery workflow says what the receiver said."""
    world = impatient
    await answers(world, 400)
    ask = Ask(key=world.key(), text="refused")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    assert await target.result() == {"text": "refused", "blob": ""}

    async def failed() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.FAILED]

    await assert_eventually(failed)
    await handle.terminate()


async def test_nothing_is_handed_over_where_nobody_waits(impatient: World) -> None:
    """410: delivered as far as it can be."""
    world = impatient
    await answers(world, 410)
    ask = Ask(key=world.key())
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.result()
    assert await deliveries(world, target) == []
    assert len(world.receiver.requests) == 1
    await handle.terminate()


async def test_everything_holds_without_a_workflow_cache(server: Server) -> None:
    """Every task replays the run from its beginning: success, failure, cancellation and hand-over alike."""

    def prepare(world: World) -> None:
        world.worker_options = {"max_cached_workflows": 0, "max_concurrent_workflow_task_polls": 1}
        world.delivery_budget = timedelta(seconds=1)

    async with running_world(server, prepare=prepare) as world:
        assert await (await world.call(Ask(key=world.key(), text="uncached"))).result() == Reply("uncached")
        assert isinstance(await failure_of(await world.call(Ask(key=world.key(), behaviour="fail"))), ApplicationError)
        ask = Ask(key=world.key(), behaviour="cleanup")
        handle = await world.call(ask)
        await (await world.until_started(ask)).cancel()
        assert isinstance(await failure_of(handle), CancelledError)
        gate = Gate(world)
        ask = Ask(key=world.key(), text="late")
        handle = await world.call(ask)
        await asyncio.wait_for(gate.reached.wait(), 20)
        await world.target(ask).cancel()
        assert await world.target(ask).result() == {"text": "late", "blob": ""}
        gate.opened.set()
        assert await handle.result() == Reply("late")


async def test_a_bug_in_the_target_is_no_ending(world: World) -> None:
    """A failed workflow task is retried by the server; only what comes after the fix is told."""
    handle = await world.call(Ask(key=world.key(), behaviour="bug once"), LONG)
    assert await handle.result() == Reply("mended")
    assert world.receiver.statuses == [200]


@pytest.mark.parametrize("memo", ["", "own memo"])
async def test_continuing_as_new_is_no_ending(world: World, memo: str) -> None:
    """The call is carried over, also where the author passes a memo of his own; the last run's outcome comes once."""
    handle = await world.call(Ask(key=world.key(), behaviour="continue once", text=memo), LONG)
    assert await handle.result() == Reply("second run")
    assert world.receiver.statuses == [200]


async def test_a_run_without_a_call_goes_on_untouched(world: World) -> None:
    """Started by hand, or before its worker had the interceptor: no event more than without it."""
    ask = Ask(key=world.key(), text="alone")
    handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
        "ProbeWorkflow", ask, id=f"probe-{ask.key}", task_queue=world.payment_queue
    )
    assert await handle.result() == {"text": "alone", "blob": ""}
    assert len(await events(handle)) == 5


async def test_a_target_on_a_worker_without_the_interceptor_is_found_by_a_renewal(server: Server) -> None:
    """Nobody tells; the call asks."""
    async with running_world(server, without=("handler",)) as world:
        async with Worker(world.handler_client, task_queue=world.payment_queue, workflows=TARGETS):
            handle = await world.call(Ask(key=world.key(), text="asked"), CallPlan(first_lease=1, renewal=1))
            assert await handle.result() == Reply("asked")
        assert world.receiver.requests == []


async def test_a_foreign_memo_under_our_name_disturbs_no_workflow(world: World) -> None:
    """Somebody's own `bridge` memo is not a call."""
    ask = Ask(key=world.key(), text="own memo")
    handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
        "ProbeWorkflow", ask, id=f"probe-{ask.key}", task_queue=world.payment_queue, memo={"bridge": {"mine": 1}}
    )
    assert (await handle.result())["text"] == "own memo"
