"""The limits of a cluster: attempts and pending activities of a workflow, and the size of values."""

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import (
    NexusOperationError,
    ServerError,
    TerminatedError,
)

from bridge.workflow.client import OperationClient
from handler.delivery import workflow as delivery
from scripts.environment.server import Server, running_server
from scripts.environment.temporal_cli import NEWEST
from tests.support.callers import CallPlan, ManyCalls
from tests.support.calling_workflows import cause_of, replay, scheduled
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask, ProbeWorkflow, Reply
from tests.support.world import World, events, running_world


@pytest_asyncio.fixture(loop_scope="session", scope="session")
async def small_server() -> AsyncIterator[Server]:
    """A cluster that gives activities three attempts by default, and a workflow twenty pending activities."""
    config = ['history.defaultActivityRetryPolicy={"MaximumAttempts":3}', "limit.numPendingActivities.error=20"]
    async with running_server(namespaces=[CALLER, HANDLER], dynamic_config=config) as running:
        yield running


async def test_a_clusters_default_number_of_attempts_ends_no_call(small_server: Server) -> None:
    """The default is three attempts. A long call has more, and an unavailable handler gets more."""
    async with running_world(small_server, without=("service",)) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
        await world.until_attempt(handle, 4)
        await world.service.start()
        target = await world.until_started(ask)
        await world.until_attempt(handle, 5)
        await target.signal("say", "after five")
        assert await handle.result() == Reply("after five")
        assert len(await scheduled(handle)) == 1


@pytest.mark.parametrize("calls", [pytest.param(15, id="below the limit"), pytest.param(20, id="at the limit")])
async def test_cancels_need_no_place_among_the_pending_activities(small_server: Server, calls: int) -> None:
    """Twenty activities may be pending. All calls are canceled at once, and every target gets its cancel."""
    async with running_world(small_server) as world:
        asks = [Ask(world.key(), "cleanup") for _ in range(calls)]
        handle = await many_calls(world, asks, CallPlan(first_lease=600))
        await asyncio.gather(*map(world.until_started, asks))
        await handle.cancel()
        assert await handle.result() == {"CancelledError": calls}
        cancels = [status for path, status in world.service.requests if path.endswith("/cancel")]
        assert cancels == [202] * calls
        assert (await events(handle)).count("MARKER_RECORDED") <= 4, "not in batches"
        await replay(handle)


async def test_deliveries_and_the_sweep_go_on_beyond_the_attempts_that_the_cluster_gives(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler's own activities name their maximum, because 0 means the cluster's default of three."""
    monkeypatch.setattr(delivery, "_MAX_STEP", timedelta(milliseconds=50))

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.1}
        world.targets = [ProbeWorkflow]

    async def unavailable(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    async with running_world(small_server, prepare=prepare) as world:
        await world.start_sweep()
        world.receiver.before = unavailable
        handle = await world.call(Ask(world.key(), text="at last"), CallPlan(first_lease=600))

        async def repeated() -> None:
            assert len(world.receiver.statuses) > 6
            assert (await world.pending(world.sweep)).attempt > 6

        await assert_eventually(repeated)
        world.receiver.before = None
        assert await handle.result() == Reply("at last")
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=600))
        await (await world.until_started(ask)).terminate()
        assert isinstance(await cause_of(handle), TerminatedError)
        await world.sweep.terminate()


async def test_calls_beyond_the_limit_of_a_workflow_are_refused(small_server: Server) -> None:
    """The refused calls get a clear error; the other calls and the workflow go on."""
    async with running_world(small_server) as world:
        asks = [Ask(world.key(), "wait") for _ in range(5)]
        handle = await many_calls(world, asks, CallPlan(first_lease=600, max_calls_in_flight=3))
        for target in await asyncio.gather(*map(world.until_started, asks[:3])):
            await target.signal("say", "paid")
        assert await handle.result() == {"RESOURCE_EXHAUSTED": 2, "result": 3}


async def many_calls(world: World, asks: list[Ask], plan: CallPlan) -> WorkflowHandle[Any, dict[str, int]]:
    return await world.caller_client.start_workflow(
        ManyCalls.run, args=[asks, plan], id=world.key("many"), task_queue=world.order_queue
    )


async def test_a_number_of_calls_that_has_changed_changes_no_replay(
    small_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused calls stay refused, and calls that were made stay made."""
    async with running_world(small_server) as world:
        asks = [Ask(world.key(), text="paid") for _ in range(5)]
        handle = await many_calls(world, asks, CallPlan(first_lease=600, max_calls_in_flight=3))
        assert await handle.result() == {"RESOURCE_EXHAUSTED": 2, "result": 3}
        for refusal in (None, HandlerError("too many", type=HandlerErrorType.RESOURCE_EXHAUSTED)):
            changed: Callable[..., HandlerError | None] = lambda *_, refusal=refusal: refusal
            monkeypatch.setattr(OperationClient, "_too_many", changed)
            await replay(handle)


async def test_an_outcome_over_the_limit_of_the_callers_namespace_ends_the_call(server: Server) -> None:
    """The caller's server fails the activity in place of the outcome. Another try would fail in the same way."""

    def apart(world: World) -> None:
        world.handler_server = server

    async with (
        running_server(namespaces=[CALLER], dynamic_config=["limit.blobSize.error=262144"]) as small,
        running_world(small, prepare=apart) as world,
    ):
        handle = await world.call(Ask(world.key(), size=600_000))
        cause = await cause_of(handle)
        assert isinstance(cause, ServerError)
        assert "size limit" in cause.message
        assert len(await scheduled(handle)) == 1


async def test_an_input_over_the_limit_that_the_server_names_is_refused_in_the_workflow() -> None:
    """The namespace's limit is below the default. Without the refusal the workflow task would fail again and again."""
    limited = running_server(namespaces=[CALLER, HANDLER], choice=NEWEST, dynamic_config=["limit.blobSize.error=50000"])
    async with limited as server, running_world(server) as world:
        small, large = (Ask(world.key(), text="x" * size) for size in (48_000, 49_000))
        assert await (await world.call(small)).result() == Reply("x" * 48_000)
        handle = await world.call(large)
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        assert isinstance(raised.value.cause, NexusOperationError)
        assert "is over the limit of 48437" in str(raised.value.cause.cause)
        await replay(handle)
