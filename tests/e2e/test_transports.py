"""One contract, one workflow, four ways to travel: the same assertions on each."""

from collections.abc import AsyncIterator
from functools import partial
from typing import get_args

import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from bridge.calls import Transport
from scripts.temporal_server import Server
from tests.helpers import assert_eventually
from tests.workflows import Ask, CallingWorkflow, CallPlan, Reply
from tests.world import World, events, running_world


def _all_transports(world: World) -> None:
    world.handler_options = {"nexus": True}
    world.endpoint_options = {"poll_interval_s": 0.5, "wait_s": 5}


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_world(server, prepare=_all_transports) as made:
        await made.create_nexus_endpoint()
        yield made


@pytest.fixture(params=get_args(Transport))
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    return chosen


async def _error(handle: WorkflowHandle[CallingWorkflow, Reply]) -> NexusOperationError:
    """What the calling workflow caught."""
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    error = caught.value.cause
    assert isinstance(error, NexusOperationError)
    assert error.message == "nexus operation completed unsuccessfully"
    assert (error.service, error.operation) == ("ProbeService", "probe")
    return error


async def test_a_short_operation_gives_its_result(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), text="hello")
    handle = await world.call(ask, world.plan(transport))
    assert await handle.result() == Reply("hello")
    answered = world.service.statuses, world.receiver.statuses
    match transport:
        case "callback":
            assert answered == ([201], [200])
        case "wait":
            assert answered == ([200], []), "one request in all"
        case "poll":
            assert answered[0][0] == 201
            assert answered[0][-1] == 200
            assert answered[1] == []
        case "nexus":
            assert answered == ([], [])


async def test_a_long_operation_gives_its_result(world: World, transport: Transport) -> None:
    """Longer than the handler holds a start: the waiting call falls over to its callback, without a second start."""
    world.endpoint_options["wait_s"] = 1
    await world.stop_worker("caller")
    await world.start_worker("caller")
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, world.plan(transport))
    target = await world.until_started(ask)
    if transport == "wait":
        await assert_eventually(partial(_answered, world, 201))
    await target.signal("say", "at last")
    assert await handle.result() == Reply("at last")
    if transport in {"callback", "wait"}:
        assert world.service.statuses == [201]
        assert world.receiver.statuses == [200]


async def _answered(world: World, status: int) -> None:
    assert status in world.service.statuses


async def test_a_failure_arrives_with_its_cause_chain(world: World, transport: Transport) -> None:
    handle = await world.call(Ask(world.key("failing"), "fail"), world.plan(transport))
    outer = (await _error(handle)).cause
    assert isinstance(outer, ApplicationError)
    assert (outer.message, outer.type, outer.non_retryable) == ("the outer reason", "Outer", False)
    assert list(outer.details) == [{"key": world.key("failing")}, "two"]
    inner = outer.cause
    assert isinstance(inner, ApplicationError)
    assert (inner.message, inner.type, inner.non_retryable) == ("the inner reason", "Inner", True)


async def test_a_refused_input_is_a_handler_error_and_starts_nothing(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "refused")
    handle = await world.call(ask, world.plan(transport))
    error = (await _error(handle)).cause
    assert isinstance(error, HandlerError)
    assert error.type is HandlerErrorType.BAD_REQUEST
    assert "the check says no" in str(error)


async def test_a_canceled_call_ends_as_canceled(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "cleanup")
    handle = await world.call(ask, world.plan(transport))
    target = await world.until_started(ask)
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    assert isinstance(caught.value.cause, CancelledError)
    reported = await handle.query(CallingWorkflow.reported)
    assert reported == "CancelledError"
    assert "WORKFLOW_EXECUTION_CANCELED" in await events(target)


async def test_a_cancel_does_not_decide(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "swallow cancel")
    handle = await world.call(ask, world.plan(transport))
    await world.until_started(ask)
    await handle.cancel()
    assert await handle.result() == Reply("went on all the same")


async def test_a_call_out_of_time_ends_as_timed_out(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, world.plan(transport, deadline=3.0))
    error = (await _error(handle)).cause
    assert isinstance(error, TemporalTimeoutError)
    assert error.type is TimeoutType.SCHEDULE_TO_CLOSE


async def test_the_same_order_again_is_answered_with_its_outcome(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), text="once")
    first = await world.call(ask, world.plan(transport))
    assert await first.result() == Reply("once")
    again = await world.call(ask, world.plan(transport))
    assert await again.result() == Reply("once")


async def test_a_failed_order_asked_for_again_fails_the_same(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "fail")
    messages = []
    for _ in range(2):
        cause = (await _error(await world.call(ask, world.plan(transport)))).cause
        # The native transport wraps an outcome that was there before the start, as every Nexus handler does.
        messages.append([str(each.message) for each in _chain(cause) if isinstance(each, ApplicationError)])
    assert messages[0] == ["the outer reason", "the inner reason"]
    assert messages[1][-2:] == messages[0]


def _chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_chain(error.__cause__)]


async def test_two_workflows_wait_for_one_run(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, world.plan(transport))
    target = await world.until_started(ask)
    second = await world.call(ask, world.plan(transport))
    await assert_eventually(partial(_both_known, world, transport, second))
    await target.signal("say", "for both")
    assert await first.result() == Reply("for both")
    assert await second.result() == Reply("for both")


async def _both_known(world: World, transport: Transport, second: WorkflowHandle[CallingWorkflow, Reply]) -> None:
    if transport == "nexus":
        assert "NEXUS_OPERATION_STARTED" in await events(second)
    else:
        assert len(world.service.requests) >= (1 if transport == "wait" else 2)


@pytest.mark.parametrize(
    ("by_setting", "by_client", "answered"),
    [
        pytest.param("wait", None, ([200], []), id="the endpoint's setting"),
        pytest.param("poll", "wait", ([200], []), id="the client's choice comes first"),
        pytest.param("wait", "callback", ([201], [200]), id="and may be the default"),
    ],
)
async def test_an_endpoint_may_choose_for_calls_that_do_not(
    world: World, by_setting: str, by_client: Transport | None, answered: tuple[list[int], list[int]]
) -> None:
    """A change of the setting moves calls without a change of any workflow."""
    world.endpoint_options["transport"] = by_setting
    await world.stop_worker("caller")
    await world.start_worker("caller")
    handle = await world.call(Ask(world.key(), text="moved"), CallPlan(transport=by_client))
    assert await handle.result() == Reply("moved")
    assert (world.service.statuses, world.receiver.statuses) == answered


async def test_polls_leave_no_events(world: World) -> None:
    """Three polls or none: the caller's history is the same."""
    ask = Ask(world.key(), "wait")
    polled = await world.call(ask, CallPlan(transport="poll"))
    target = await world.until_started(ask)
    await world.until_attempt(polled, 4)
    await target.signal("say", "done")
    assert await polled.result() == Reply("done")
    called = await world.call(Ask(world.key(), text="done"), CallPlan(transport="callback"))
    await called.result()
    assert await events(polled) == await events(called)
    assert world.receiver.requests[1:] == [], "only the other call has a receiver"
