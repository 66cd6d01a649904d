"""A team's interceptors see our activities and change neither their reports nor their start."""

import asyncio

import pytest
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.enums.v1 import EventType
from temporalio.exceptions import ApplicationError, CancelledError
from temporalio.worker import Interceptor

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import failure_of
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.team_interceptors import CATCHES_ALL, INBOUND, OUTBOUND, MapsEverything, Reports
from tests.support.world import World, events, running_world

Kinds = list[type[Interceptor]]
ALL: Kinds = [*INBOUND, *OUTBOUND]
PATIENT: Kinds = [each for each in ALL if each not in CATCHES_ALL]

SHORT = CallPlan(first_lease=1, renewal=1, deadline=100)


async def assert_calls_end_as_they_should(world: World) -> None:
    """Make calls with a result after renewals, a failure, a refusal, and a cancel."""
    asks = [Ask(world.key(), behaviour) for behaviour in ("wait", "wait", "refused", "swallow cancel")]
    long, declined, refused, canceled = [await world.call(each, SHORT) for each in asks]
    cause = await failure_of(refused)
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.BAD_REQUEST
    await asyncio.gather(*(world.until_attempt(each, 3) for each in (long, declined, canceled)))

    await world.target(asks[0]).signal("say", "after renewals")
    await world.target(asks[1]).signal("say", "fail")
    await canceled.cancel()
    assert await long.result() == Reply("after renewals")
    cause = await failure_of(declined)
    assert isinstance(cause, ApplicationError)
    assert cause.type == "Outer"
    assert await canceled.result() == Reply("went on all the same")
    for handle in (long, declined, canceled):
        scheduled = [
            event.activity_task_scheduled_event_attributes
            async for event in handle.fetch_history_events()
            if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        ]
        assert len(scheduled) == 1, "the waiting activity was ended by something else than an outcome"
        assert scheduled[0].retry_policy.maximum_attempts == 2**31 - 1
        assert scheduled[0].schedule_to_close_timeout.ToSeconds() == 100
    assert [status for path, status in world.service.requests if path.endswith("/cancel")] == [202]
    names = await events(canceled)
    # The cancel was sent at once and by the first local activity, whose result is the marker.
    assert ("TIMER_STARTED" in names, names.count("MARKER_RECORDED")) == (False, 1)


@pytest.mark.parametrize(
    "kinds",
    [
        *(pytest.param([each], id=each.__name__) for each in ALL),
        pytest.param(ALL, id="all"),
        pytest.param(ALL[::-1], id="all, the other way round"),
    ],
)
async def test_interceptors_of_the_worker_change_nothing(server: Server, kinds: Kinds) -> None:
    """The interceptors map, swallow, retry, time out, wrap and refuse; they change options, ids, queues and handles."""

    def prepare(world: World) -> None:
        world.caller_worker_options = {"interceptors": [kind() for kind in kinds]}

    async with running_world(server, prepare=prepare) as world:
        await assert_calls_end_as_they_should(world)


@pytest.mark.parametrize("kinds", [pytest.param(PATIENT, id="in order"), pytest.param(PATIENT[::-1], id="reversed")])
async def test_interceptors_of_the_client_change_nothing(server: Server, kinds: Kinds) -> None:
    """The SDK runs them outside those of the worker: our reports are sent before they see an error."""

    def prepare(world: World) -> None:
        world.caller_client_options = {"interceptors": [kind() for kind in kinds]}

    async with running_world(server, prepare=prepare) as world:
        await assert_calls_end_as_they_should(world)


@pytest.mark.parametrize("kinds", [pytest.param(ALL, id="in order"), pytest.param(ALL[::-1], id="reversed")])
async def test_interceptors_of_the_handlers_worker_change_no_delivery(server: Server, kinds: Kinds) -> None:
    """The receiver is unavailable at first. The delivery is repeated by its own policy until it is accepted."""
    refused: list[int] = []

    async def unavailable(_: web.Request) -> web.StreamResponse | None:
        refused.append(503)
        # One request of the dispatcher, and two attempts, the maximum that an interceptor sets.
        return web.Response(status=503) if len(refused) <= 3 else None

    def prepare(world: World) -> None:
        world.worker_options = {"interceptors": [kind() for kind in kinds]}

    async with running_world(server, prepare=prepare) as world:
        world.receiver.before = unavailable
        handle = await world.call(Ask(world.key(), text="paid"), CallPlan(first_lease=600, deadline=60))
        assert await handle.result() == Reply("paid")


async def test_an_error_reporter_is_not_troubled_by_calls_that_wait(server: Server) -> None:
    """An attempt that ends while its operation runs is not an error, inside or outside our interceptor."""
    inner, outer = Reports(), Reports()

    def prepare(world: World) -> None:
        world.caller_worker_options = {"interceptors": [inner]}
        world.caller_client_options = {"interceptors": [outer]}

    async with running_world(server, prepare=prepare) as world:
        await assert_calls_end_as_they_should(world)
    assert inner.seen == outer.seen == []


async def test_a_call_outlives_interceptors_that_end_its_activity(server: Server) -> None:
    """Interceptors of the client swallow the end of every attempt; the activity is scheduled again."""

    def prepare(world: World) -> None:
        world.caller_client_options = {"interceptors": [MapsEverything()]}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), "cleanup")
        handle = await world.call(ask, CallPlan(first_lease=600))
        target = await world.until_started(ask)

        async def scheduled_again() -> None:
            ids = [
                event.activity_task_scheduled_event_attributes.activity_id
                async for event in handle.fetch_history_events()
                if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
            ]
            assert len(ids) >= 2
            assert len(set(ids)) == 1

        await assert_eventually(scheduled_again)
        await target.cancel()
        assert isinstance(await failure_of(handle), CancelledError)
