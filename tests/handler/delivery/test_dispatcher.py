"""Delivery by the worker: the outcome that closed the target arrives, and the target does not notice the delivery."""

import asyncio
import logging
from datetime import UTC, datetime
from typing import Any

import pytest
from aiohttp import web
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.service import RPCError
from temporalio.worker import (
    ExecuteWorkflowInput,
    Interceptor,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from bridge.http.client import HttpClient
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from handler.delivery import records
from handler.delivery.callback_client import CallbackClient
from handler.delivery.calls import read_memo
from handler.delivery.close_event import read_close_event
from handler.delivery.dispatcher import Dispatcher
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import failure_of
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import TARGETS, Ask, ProbeWorkflow, Reply
from tests.support.world import World, events, running_world

LONG = CallPlan(first_lease=600)
"""Longer than a test, so that no renewal gets the outcome."""
BIG = 2 * 1024 * 1024 - 20_000
"""Bytes of a result just below Temporal's limit."""
PLAIN_HISTORY = [
    "WORKFLOW_EXECUTION_STARTED",
    "WORKFLOW_TASK_SCHEDULED",
    "WORKFLOW_TASK_STARTED",
    "WORKFLOW_TASK_COMPLETED",
    "WORKFLOW_EXECUTION_COMPLETED",
]


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
    """Return the statuses of the delivery workflows of *target*."""
    described = await target.describe()
    prefix = f"bridge-delivery-{CALLER}:{await request_id(target)}"
    query = f"WorkflowType = 'bridge.Delivery' AND WorkflowId STARTS_WITH '{prefix}'"
    found = [each async for each in world.handler_client.list_workflows(query)]
    return [each.status for each in found if described.run_id in each.id]


async def request_id(target: WorkflowHandle[Any, Any]) -> str:
    return (await _memo(target))["request_id"]


async def _memo(target: WorkflowHandle[Any, Any]) -> dict[str, str]:
    memo: dict[str, str] = await (await target.describe()).memo_value("bridge")
    return memo


async def status(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    return (await handle.describe()).status


async def answers(world: World, status_code: int) -> None:
    async def before(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, status_code)

    world.receiver.before = before


async def test_the_target_has_closed_before_its_outcome_is_delivered(world: World) -> None:
    """When the callback arrives, the run is closed. Its history is the same as without the plugin."""
    gate = Gate(world)
    ask = Ask(key=world.key(), text="committed")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    assert await events(world.target(ask)) == PLAIN_HISTORY
    gate.opened.set()
    assert await handle.result() == Reply("committed")
    assert await deliveries(world, world.target(ask)) == []


async def test_a_failed_target_is_delivered_with_its_whole_chain(world: World) -> None:
    """All causes in the close event arrive."""
    failure = await failure_of(await world.call(Ask(key=world.key(), behaviour="fail"), LONG))
    assert isinstance(failure, ApplicationError)
    assert (failure.type, failure.details) == ("Outer", ({"key": failure.details[0]["key"]}, "two"))
    assert isinstance(failure.cause, ApplicationError)
    assert failure.cause.type == "Inner"


@pytest.mark.parametrize("behaviour", ["cleanup", "swallow cancel"])
async def test_a_cancel_of_the_target_is_delivered_as_it_ends(world: World, behaviour: str) -> None:
    """The target closes as canceled after its cleanup, or completes because it ignores the request."""
    ask = Ask(key=world.key(), behaviour=behaviour)
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)

    async def running() -> None:
        assert "TIMER_STARTED" in await events(target)

    await assert_eventually(running)
    await target.cancel()
    if behaviour == "cleanup":
        assert isinstance(await failure_of(handle), CancelledError)
        assert await status(target) == WorkflowExecutionStatus.CANCELED
    else:
        assert await handle.result() == Reply("went on all the same")


async def test_a_cancellation_that_was_not_asked_for_is_delivered_as_the_failure_that_it_is(world: World) -> None:
    """The target closes as failed, and so does the operation."""
    ask = Ask(key=world.key(), behaviour="self-canceled failure")
    assert isinstance(await failure_of(await world.call(ask, LONG)), CancelledError)
    assert await status(world.target(ask)) == WorkflowExecutionStatus.FAILED


async def test_a_result_of_almost_two_mebibytes_arrives(world: World) -> None:
    """No command copies the result. Therefore every result that the target may have can be delivered."""
    reply = await (await world.call(Ask(key=world.key(), size=BIG), LONG)).result()
    assert len(reply.blob) == BIG


async def test_a_delivery_that_fails_goes_on_as_a_workflow(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The target closes while the receiver is unavailable. The workflow's own memo causes no warning."""
    caplog.set_level(logging.WARNING, "temporalio.workflow")
    await answers(world, 503)
    ask = Ask(key=world.key(), text="repeated")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    assert await target.result() == {"text": "repeated", "blob": ""}

    async def is_repeating() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.RUNNING]

    await assert_eventually(is_repeating)
    world.receiver.before = None
    assert await handle.result() == Reply("repeated")

    async def ended() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.COMPLETED]

    await assert_eventually(ended)
    assert await events(target) == PLAIN_HISTORY
    assert "memo_unreadable" not in caplog.text


async def test_a_delivery_that_is_refused_stays_listed_as_failed(world: World) -> None:
    """The delivery workflow fails with the receiver's refusal."""
    await answers(world, 400)
    ask = Ask(key=world.key(), text="refused")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)

    async def failed() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.FAILED]

    await assert_eventually(failed)
    await handle.terminate()


async def test_a_delivery_that_could_not_go_on_as_a_workflow_is_repeated(server: Server) -> None:
    """Temporal refuses the workflow, here because no task queue has so long a name. A later report delivers."""
    async with running_world(server, without=("handler",)) as world:
        worker = Worker(world.handler_client, task_queue=world.payment_queue, workflows=[ProbeWorkflow])
        settings, client = world.handler_settings, world.handler_client
        metrics, http = Metrics.of(client), HttpClient()
        callbacks = CallbackClient(
            settings, keys=LiveKeys(settings, metrics), http=http, metrics=metrics, clock=lambda: datetime.now(UTC)
        )
        dispatcher = Dispatcher(callbacks=callbacks, task_queue="x" * 2000)
        async with worker:
            dispatcher.start(worker)
            ask = Ask(key=world.key(), text="at last")
            handle = await world.call(ask, LONG)
            target = await world.until_started(ask)
            await target.result()
            described = await target.describe()
            closed = await read_close_event(client, target.id, described.run_id)
            assert closed is not None
            call = await read_memo(client.data_converter, described.raw_info)
            found = records.deliveries([call], target.id, described.run_id, described.start_time)
            await answers(world, 503)
            with pytest.raises(RPCError):
                await dispatcher.deliver(found, closed)
            world.receiver.before = None
            await dispatcher.deliver(found, closed)
            assert await handle.result() == Reply("at last")
        await http.aclose()


# The server deletes a run after up to 40 seconds.
@pytest.mark.part("deletion", short=True)
async def test_a_delivery_ends_with_the_retention_of_its_target(world: World) -> None:
    """The outcome is no longer in history. The delivery workflow fails with this reason."""
    await answers(world, 503)
    ask = Ask(key=world.key())
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    await target.result()
    described = await target.describe()
    delivery = world.handler_client.get_workflow_handle(
        f"bridge-delivery-{CALLER}:{await request_id(target)}-{described.run_id}"
    )

    async def is_repeating() -> None:
        assert await deliveries(world, target) == [WorkflowExecutionStatus.RUNNING]

    await assert_eventually(is_repeating)
    await world.handler_client.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=world.handler_client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=target.id, run_id=described.run_id),
        )
    )
    with pytest.raises(WorkflowFailureError) as raised:
        await delivery.result()
    assert isinstance(raised.value.cause, ActivityError)
    assert isinstance(raised.value.cause.cause, ApplicationError)
    assert raised.value.cause.cause.type == "bridge.OutcomeNotKept"
    await handle.terminate()


async def test_two_refused_signatures_end_no_delivery(world: World) -> None:
    """A key may be in rotation. The delivery is repeated until the deadline, with a fresh signature each time."""
    await answers(world, 401)
    ask = Ask(key=world.key(), text="after the rollout")
    handle = await world.call(ask, LONG)
    await world.until_started(ask)

    async def refused_twice() -> None:
        assert world.receiver.statuses[:3] == [401, 401, 401]

    await assert_eventually(refused_twice)
    world.receiver.before = None
    assert await handle.result() == Reply("after the rollout")


async def test_everything_is_delivered_without_a_workflow_cache(server: Server) -> None:
    """Every task replays the run from its beginning, and every eviction has the reason CACHE_FULL."""

    def prepare(world: World) -> None:
        world.worker_options = {"max_cached_workflows": 0, "max_concurrent_workflow_task_polls": 1}

    async with running_world(server, prepare=prepare) as world:
        assert await (await world.call(Ask(key=world.key(), text="uncached"), LONG)).result() == Reply("uncached")
        failing = await world.call(Ask(key=world.key(), behaviour="fail"), LONG)
        assert isinstance(await failure_of(failing), ApplicationError)
        ask = Ask(key=world.key(), behaviour="cleanup")
        handle = await world.call(ask, LONG)
        await (await world.until_started(ask)).cancel()
        assert isinstance(await failure_of(handle), CancelledError)


async def test_a_worker_without_safe_eviction_delivers(server: Server) -> None:
    """Such a worker reports no eviction. The closing is reported when its eviction is overdue."""

    def prepare(world: World) -> None:
        world.worker_options = {"disable_safe_workflow_eviction": True}

    async with running_world(server, prepare=prepare) as world:
        assert await (await world.call(Ask(key=world.key(), text="overdue"), LONG)).result() == Reply("overdue")


async def test_a_worker_that_stops_delivers_what_it_has_closed(world: World) -> None:
    """The plugin waits until the deliveries in progress have ended."""
    gate = Gate(world)
    handle = await world.call(Ask(key=world.key(), text="last"), LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    stopping = asyncio.create_task(world.stop_worker("handler"))
    # The worker cannot end before the gate is open. A worker that does not wait would end within this time.
    ended, _ = await asyncio.wait({stopping}, timeout=2)
    assert not ended
    gate.opened.set()
    await stopping
    assert await world.receiver.answered() == [200]
    assert await handle.result() == Reply("last")


async def test_a_bug_in_the_target_is_not_an_ending(world: World) -> None:
    """The server retries a failed workflow task. Only the outcome after the fix is delivered."""
    handle = await world.call(Ask(key=world.key(), behaviour="bug once"), LONG)
    assert await handle.result() == Reply("mended")
    assert await world.receiver.answered() == [200]


@pytest.mark.parametrize("memo", ["", "own memo"])
async def test_continuing_as_new_is_not_an_ending(world: World, memo: str) -> None:
    """The next run keeps the call, even if the author passes another memo. The last run's outcome arrives once."""
    handle = await world.call(Ask(key=world.key(), behaviour="continue once", text=memo), LONG)
    assert await handle.result() == Reply("second run")
    assert await world.receiver.answered() == [200]


async def test_the_outcome_of_a_child_is_not_delivered_although_the_target_passed_its_memo_on(world: World) -> None:
    """The child is a target too, and ends first. Only the workflow that carries out the call has the call's outcome."""
    handle = await world.call(Ask(key=world.key(), behaviour="pass its memo to a child"), LONG)
    assert await handle.result() == Reply("of the parent")
    # A worker that stops finishes its deliveries.
    await world.stop_worker("handler")
    assert await world.receiver.answered() == [200]


@pytest.mark.parametrize("behaviour", ["return", "fail"])
async def test_of_a_retried_target_the_last_run_is_delivered(world: World, behaviour: str) -> None:
    """The last run is delivered at once, and once. The failed runs before it name the next run."""
    handle = await world.call(Ask(key=world.key(), behaviour=behaviour), CallPlan(first_lease=600, operation="flaky"))
    if behaviour == "return":
        assert await handle.result() == Reply("attempt 3")
    else:
        failure = await failure_of(handle)
        assert isinstance(failure, ApplicationError)
        assert failure.message == "attempt 3 failed"
    assert await world.receiver.answered() == [200]


async def test_a_query_of_a_closed_target_delivers_nothing_again(world: World) -> None:
    """The query replays the run, and its eviction has the reason of an ending."""
    ask = Ask(key=world.key(), text="asked")
    assert await (await world.call(ask, LONG)).result() == Reply("asked")
    await world.stop_worker("handler")
    await world.start_worker("handler")
    for _ in range(3):
        assert await world.target(ask).query("said") == []
    await world.stop_worker("handler")
    assert await world.receiver.answered() == [200]


async def test_a_run_without_a_call_goes_on_untouched(world: World) -> None:
    """If no call started a run, nothing is read and nothing is delivered."""
    ask = Ask(key=world.key(), text="alone")
    handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
        "ProbeWorkflow", ask, id=f"probe-{ask.key}", task_queue=world.payment_queue
    )
    assert await handle.result() == {"text": "alone", "blob": ""}
    assert await events(handle) == PLAIN_HISTORY


async def test_a_target_on_a_worker_without_the_plugin_is_found_by_a_renewal(server: Server) -> None:
    """No message is sent. The caller's renewal gets the outcome."""
    async with running_world(server, without=("handler",)) as world:
        async with Worker(world.handler_client, task_queue=world.payment_queue, workflows=TARGETS):
            handle = await world.call(Ask(key=world.key(), text="asked"), CallPlan(first_lease=1, renewal=1))
            assert await handle.result() == Reply("asked")
        assert world.receiver.requests == []


@pytest.mark.parametrize("is_canceled", [False, True], ids=["closes", "canceled"])
async def test_renewals_and_a_cancel_find_the_run_that_has_lost_the_memo(server: Server, is_canceled: bool) -> None:
    """A worker without the plugin continues the target as new with another memo. The new run runs, and then closes."""
    async with (
        running_world(server, without=("handler",)) as world,
        Worker(world.handler_client, task_queue=world.payment_queue, workflows=TARGETS),
    ):
        ask = Ask(key=world.key(), behaviour="continue on signal", text="own memo")
        handle = await world.call(ask, CallPlan(first_lease=2, renewal=1))
        target = await world.until_started(ask)
        await world.until_attempt(handle, 2, in_backoff=True)
        await target.signal("say", "and wait")
        await world.until_attempt(handle, 4)
        if is_canceled:
            await handle.cancel()
            with pytest.raises(WorkflowFailureError) as raised:
                await handle.result()
            assert isinstance(raised.value.cause, CancelledError)
            assert (await world.target(ask).describe()).status is WorkflowExecutionStatus.CANCELED
        else:
            await target.signal("say", "after a renewal")
            assert await handle.result() == Reply("after a renewal")


@pytest.mark.parametrize("memo", [{"mine": 1}, 7, {"caller": "half a call"}])
async def test_a_foreign_memo_under_our_name_disturbs_no_workflow(
    world: World, memo: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line names the run."""
    ask = Ask(key=world.key(), text="own memo")
    handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
        "ProbeWorkflow", ask, id=f"probe-{ask.key}", task_queue=world.payment_queue, memo={"bridge": memo}
    )
    assert (await handle.result())["text"] == "own memo"

    async def logged() -> None:
        assert [each.__dict__["bridge.target"] for each in caplog.records if "memo_unreadable" in each.message] == [
            handle.id
        ]

    await assert_eventually(logged)


async def test_a_foreign_signal_under_our_name_disturbs_neither_the_run_nor_its_calls(world: World) -> None:
    """Every client of the namespace may send such a signal."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    bad: list[list[Any]] = [[7], [{"caller": "half a call"}], [None], [], [{}, {}], [[1]]]
    for foreign in bad:
        await target.signal("bridge.attach", args=foreign)
    await target.signal("say", "all the same")
    assert await handle.result() == Reply("all the same")
    assert await world.receiver.answered() == [200]


class Mapping(Interceptor):
    """A team's own interceptor, which changes results and failures."""

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:  # noqa: A002 - theirs
        return _Mapped


class _Mapped(WorkflowInboundInterceptor):
    async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:  # noqa: A002 - theirs
        try:
            result = await super().execute_workflow(input)
        except ApplicationError as error:
            if error.type == "Outer":
                return Reply("fallback")
            raise
        return Reply(f"wrapped {result.text}")


async def test_another_interceptor_decides_what_arrives_as_it_decides_what_closes(server: Server) -> None:
    """The other interceptor is outermost. Its result closes the target, and the same result arrives at once."""

    def prepare(world: World) -> None:
        world.worker_options = {"interceptors": [Mapping()]}

    async with running_world(server, prepare=prepare) as world:
        for ask, expected in (
            (Ask(key=world.key(), text="plain"), "wrapped plain"),
            (Ask(key=world.key(), behaviour="fail"), "fallback"),
        ):
            assert (await (await world.call(ask, LONG)).result()).text == expected
            assert (await world.target(ask).result())["text"] == expected
