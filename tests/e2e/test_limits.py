"""The limits of a call: it ends by its outcome or its deadline, also if its workflow or its attempts are limited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.exceptions import (
    TimeoutType,
)
from temporalio.workflow import NexusOperationCancellationType as CancellationType

import bridge
from bridge.workflow.call import MAX_INPUT_BYTES, Transport
from bridge.workflow.client import OperationClient
from scripts.environment.server import Server
from tests.support.callers import CallPlan, ParentOfCaller
from tests.support.calling_workflows import cause_of, replay, scheduled
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, ProbeService, Reply
from tests.support.world import World, events, running_world

HOUR = timedelta(hours=1)


def all_transports(world: World) -> None:
    world.handler_options = {"nexus": True}
    world.endpoint_options = {"poll_interval_s": 3600, "wait_s": 1}


@contextlib.asynccontextmanager
async def native_world(server: Server, **options: Any) -> AsyncIterator[World]:
    async with running_world(server, prepare=all_transports, **options) as world:
        await world.create_nexus_endpoint()
        yield world


@pytest.mark.parametrize(
    ("limit", "transport"),
    [
        ("run_timeout", "callback"),
        ("run_timeout", "wait"),
        ("run_timeout", "poll"),
        ("run_timeout", "nexus"),
        ("execution_timeout", "callback"),
        ("execution_timeout", "poll"),
        ("execution_timeout", "nexus"),
        ("task_timeout", "callback"),
    ],
)
async def test_a_call_waits_as_long_as_its_workflow_may(server: Server, limit: str, transport: Transport) -> None:
    """The next renewal or poll would come after the workflow's timeout: the call waits on, as native Nexus does."""
    async with native_world(server) as world:
        ask = Ask(world.key(), "wait")
        plan = world.plan(transport, first_lease=1, renewal=3600, deadline=86400)
        handle = await world.call(ask, plan, **{limit: timedelta(seconds=40)})
        target = await world.until_started(ask)
        if transport != "nexus":
            await world.until_attempt(handle, 2)
        await target.signal("say", "in time")
        assert await handle.result() == Reply("in time")
        assert len(await scheduled(handle)) == (transport != "nexus")


async def test_a_call_waits_as_long_as_its_child_workflow_may(server: Server) -> None:
    """The parent's timeout limits the child."""
    async with running_world(server) as world:
        ask = Ask(world.key(), "wait")
        handle: WorkflowHandle[Any, Reply] = await world.caller_client.start_workflow(
            ParentOfCaller.run,
            args=[ask, CallPlan(first_lease=1, renewal=3600), 60],
            id=world.key("parent"),
            task_queue=world.order_queue,
        )
        target = await world.until_started(ask)

        async def asked_again() -> None:
            assert len(world.service.statuses) >= 2

        await assert_eventually(asked_again)
        await target.signal("say", "in time")
        assert await handle.result() == Reply("in time")


async def test_a_retry_after_beyond_the_workflows_timeout_ends_no_call(server: Server) -> None:
    """`Retry-After` is half an hour, and the workflow has a minute."""
    refused: list[str] = []

    async def busy(request: web.Request) -> web.StreamResponse | None:
        if refused:
            return None
        refused.append(request.headers["Operation-Timeout"])
        return web.Response(status=503, headers={"Retry-After": "1800"})

    async with running_world(server) as world:
        world.service.before = busy
        handle = await world.call(Ask(world.key(), text="later"), run_timeout=timedelta(seconds=8))
        assert await handle.result() == Reply("later")
        assert len(await scheduled(handle)) == 1
        # The header gives the handler the time that the caller really waits.
        assert float(refused[0].removesuffix("ms")) / (1 if refused[0].endswith("ms") else 0.001) <= 8000


async def test_a_call_whose_workflow_times_out_ends_with_it(server: Server) -> None:
    """The call ends at the workflow's timeout, and not before."""
    async with running_world(server) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=1), run_timeout=timedelta(seconds=4))
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        assert isinstance(raised.value.cause, TemporalTimeoutError)
        assert (await handle.describe()).status is WorkflowExecutionStatus.TIMED_OUT


Limit = Callable[..., HandlerError | None]


@pytest.mark.parametrize("transport", ["callback", "nexus"])
@pytest.mark.parametrize("was_refused", [True, False], ids=["raised", "lowered"])
async def test_a_limit_that_has_changed_changes_no_replay(
    server: Server, monkeypatch: pytest.MonkeyPatch, was_refused: bool, transport: Transport
) -> None:
    """A replay refuses the same inputs and sends the same inputs."""
    async with native_world(server) as world:
        plan = world.plan(transport, max_input_bytes=50 if was_refused else MAX_INPUT_BYTES, catch=True)
        handle = await world.call(Ask(world.key(), text="x" * 100), plan)
        assert (await handle.result()).text == ("HandlerError" if was_refused else "x" * 100)
        refusal = None if was_refused else HandlerError("too large", type=HandlerErrorType.BAD_REQUEST)
        changed: Limit = lambda *_: refusal
        monkeypatch.setattr(OperationClient, "_too_large", changed)
        await replay(handle)


@pytest.mark.parametrize("transport", ["callback", "nexus"])
async def test_the_longest_durations_are_taken(server: Server, transport: Transport) -> None:
    """`timedelta.max` and 9 000 years are accepted, as by native Nexus."""
    async with native_world(server) as world:
        ask = Ask(world.key(), "wait")
        handle: WorkflowHandle[Any, Reply] = await world.caller_client.start_workflow(
            "EndlessCaller",
            args=[ask, world.plan(transport)],
            id=world.key("endless"),
            task_queue=world.order_queue,
            result_type=Reply,
        )
        await (await world.until_started(ask)).signal("say", "long ago")
        assert await handle.result() == Reply("long ago")


@pytest.mark.parametrize(
    "limits",
    [
        pytest.param({"first_lease": timedelta(0)}, id="no lease"),
        pytest.param({"first_lease": -HOUR}, id="negative lease"),
        pytest.param({"max_input_bytes": 0}, id="no input"),
        pytest.param({"max_input_bytes": float("nan")}, id="not a number of bytes"),
        pytest.param({"max_calls_in_flight": 0}, id="no calls"),
        pytest.param({"max_calls_in_flight": float("inf")}, id="calls without end"),
    ],
)
def test_invalid_limits_are_refused_when_the_client_is_made(limits: dict[str, Any]) -> None:
    """No invalid limit fails later, in an activity."""
    (name,) = limits
    with pytest.raises(ValueError, match=name):
        bridge.create_client(service=ProbeService, endpoint="payments", **limits)


@pytest.mark.parametrize(
    "plan", [CallPlan(first_lease=1, renewal=1), CallPlan(first_lease=600, start_to_close=1)], ids=["lease", "close"]
)
async def test_an_attempt_lives_as_long_as_its_request_may(server: Server, plan: CallPlan) -> None:
    """The 201 takes longer than the first lease, or than the operation may run; the attempt still records it."""

    async def slow() -> None:
        await asyncio.sleep(2)

    async with running_world(server) as world:
        world.service.after = slow
        ask = Ask(world.key(), "cleanup")
        handle = await world.call(ask, plan)
        target = await world.until_started(ask)
        if plan.start_to_close:
            cause = await cause_of(handle)
            assert isinstance(cause, TemporalTimeoutError)
            assert cause.type is TimeoutType.START_TO_CLOSE
            await target.terminate()
        else:
            await world.until_attempt(handle, 2, in_backoff=True)
            assert (await world.pending(handle)).heartbeat_details.payloads, "a cancel would not know the operation"
            await target.cancel()
            await cause_of(handle)
        assert world.service.statuses[0] == 201


async def test_a_call_ends_at_its_deadline_and_not_before(server: Server) -> None:
    """As over native Nexus: the same error, after the same time by the server's events."""
    waited = {}
    async with native_world(server) as world:
        for transport in ("callback", "nexus"):
            handle = await world.call(
                Ask(world.key(), "wait"), world.plan(transport, first_lease=1, renewal=1, deadline=6)
            )
            cause = await cause_of(handle)
            assert isinstance(cause, TemporalTimeoutError)
            assert cause.type is TimeoutType.SCHEDULE_TO_CLOSE
            described = await handle.describe()
            assert described.close_time is not None
            waited[transport] = described.close_time - described.start_time
    assert min(waited.values()) >= timedelta(seconds=6)
    assert waited["callback"] < timedelta(seconds=60)


async def test_a_waiting_activity_that_was_stopped_is_scheduled_again(server: Server) -> None:
    """An operator fails the activity by hand: the call goes on under the same id, and ends by its outcome."""
    async with running_world(server) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=600))
        target = await world.until_started(ask)
        for _ in range(2):
            before = len(await scheduled(handle))
            await world.stop_waiting(handle)

            async def again(before: int = before) -> None:
                assert len(await scheduled(handle)) == before + 1
                assert (await world.pending(handle)).state == 2, "not started yet"  # STARTED

            await assert_eventually(again)
        assert len(set(await scheduled(handle))) == 1
        # Another worker continues from history.
        await world.stop_worker("caller")
        await world.start_worker("caller")
        await target.signal("say", "all the same")
        assert await handle.result() == Reply("all the same")
        await replay(handle)


async def test_a_stopped_activity_whose_deadline_passes_without_a_worker_is_a_timeout(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is down from the pause before the next activity until after the deadline."""
    monkeypatch.setattr("bridge.workflow.pending_call._FIRST_PAUSE", timedelta(seconds=2))
    async with running_world(server) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=600, deadline=5))
        await world.until_started(ask)
        await world.stop_waiting(handle)

        async def pauses() -> None:
            assert "TIMER_STARTED" in await events(handle)

        await assert_eventually(pauses)
        await world.stop_worker("caller")
        deadline = (await handle.describe()).start_time + timedelta(seconds=5)

        async def is_over() -> None:
            assert datetime.now(UTC) > deadline

        await assert_eventually(is_over)
        await world.start_worker("caller")
        cause = await asyncio.wait_for(cause_of(handle), 20)
        assert isinstance(cause, TemporalTimeoutError)
        assert cause.type is TimeoutType.SCHEDULE_TO_CLOSE
        await replay(handle)


@pytest.mark.parametrize("kind", [CancellationType.WAIT_COMPLETED, CancellationType.TRY_CANCEL])
async def test_a_stopped_activity_costs_no_cancel(server: Server, kind: CancellationType) -> None:
    """The call is canceled while no activity is pending. The cancel is sent when the operation is known again."""
    async with running_world(server) as world:
        ask = Ask(world.key(), "cleanup")
        handle = await world.call(ask, CallPlan(first_lease=600, cancellation=int(kind), after=600))
        target = await world.until_started(ask)
        await world.stop_waiting(handle)
        await handle.signal("cancel_call")

        async def canceled() -> None:
            assert (await target.describe()).status is WorkflowExecutionStatus.CANCELED
            assert await handle.query("reported") == "CancelledError"

        await assert_eventually(canceled)
        await handle.terminate()


@pytest.mark.parametrize("canceled", ["call", "task", "workflow", "sleep"])
async def test_a_call_that_is_canceled_at_once_is_canceled_properly(server: Server, canceled: str) -> None:
    """The cancel comes in the task that made the call, before its code has run; the target gets the cancel."""
    async with running_world(server, without=("caller",)) as world:
        ask = Ask(world.key(), "cleanup")
        handle = await world.caller_client.start_workflow(
            "HastyCaller", args=[ask, canceled], id=world.key("hasty"), task_queue=world.order_queue, result_type=str
        )
        if canceled in {"workflow", "sleep"}:
            await handle.cancel()
        await world.start_worker("caller")
        target = await world.until_started(ask)
        assert await handle.result() == "CancelledError"

        async def target_canceled() -> None:
            assert (await target.describe()).status is WorkflowExecutionStatus.CANCELED

        await assert_eventually(target_canceled)


@pytest.mark.parametrize("cached", [True, False], ids=["with a cache", "without a cache"])
async def test_a_canceled_call_does_not_keep_its_run_in_the_worker(server: Server, cached: bool) -> None:
    """The worker stops while a canceled call waits, and another worker continues the run."""

    def prepare(world: World) -> None:
        world.caller_worker_options = {} if cached else {"max_cached_workflows": 0}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), "slow cleanup")
        handle = await world.call(ask, CallPlan(first_lease=600))
        target = await world.until_started(ask)
        await handle.cancel()

        async def asked() -> None:
            assert any(path.endswith("/cancel") for path, _ in world.service.requests)

        await assert_eventually(asked)
        await asyncio.wait_for(world.stop_worker("caller"), 20)
        await world.start_worker("caller")
        await target.terminate()
        await handle.terminate()
