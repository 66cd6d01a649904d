"""One contract and one workflow over four transports, with the same assertions."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, get_args

import pytest
import pytest_asyncio
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import PayloadCodec
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from bridge.workflow.call import Transport
from scripts.environment.server import Server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.helpers import assert_eventually
from tests.support.releases import names_native_callers
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world, with_codec


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
    """The error that the calling workflow caught."""
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
    """The run is longer than the hold: the callback completes the waiting call, without a second start."""
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
        assert await world.receiver.answered() == [200]


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
    if transport == "nexus":
        # A cancel in the same task as the start would end the caller's workflow before it sends the cancel.
        await assert_eventually(partial(_has_seen_the_start, handle))
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as caught:
        await handle.result()
    assert isinstance(caught.value.cause, CancelledError)
    reported = await handle.query(CallingWorkflow.reported)
    assert reported == "CancelledError"
    # The caller may get the outcome a moment before the target is shown as closed.
    await assert_eventually(partial(_has_event, target, "WORKFLOW_EXECUTION_CANCELED"))


async def _has_seen_the_start(handle: WorkflowHandle[CallingWorkflow, Reply]) -> None:
    _, found, later = "\n".join(await events(handle)).partition("NEXUS_OPERATION_STARTED")
    assert found
    assert "WORKFLOW_TASK_COMPLETED" in later


async def _has_event(handle: WorkflowHandle[Any, Any], event: str) -> None:
    assert event in await events(handle)


async def test_a_cancel_does_not_decide(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "swallow cancel")
    handle = await world.call(ask, world.plan(transport))
    await world.until_started(ask)
    if transport == "nexus":
        await assert_eventually(partial(_has_seen_the_start, handle))
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
    if _may_attach(world, transport):
        assert await again.result() == Reply("once")
    else:
        await _is_refused_as_taken(again)


def _may_attach(world: World, transport: Transport) -> bool:
    """Whether a second call of one namespace gets the outcome of its first one. A caller without a name does not."""
    return transport != "nexus" or names_native_callers(world.server)


async def _is_refused_as_taken(again: WorkflowHandle[CallingWorkflow, Reply]) -> None:
    refusal = (await _error(again)).cause
    assert isinstance(refusal, HandlerError)
    assert refusal.type is HandlerErrorType.BAD_REQUEST
    assert str(refusal) == "the workflow id that this input leads to is taken"


async def test_a_failed_order_asked_for_again_fails_the_same(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "fail")
    first = await world.call(ask, world.plan(transport))
    assert await _messages(first) == ["the outer reason", "the inner reason"]
    again = await world.call(ask, world.plan(transport))
    if _may_attach(world, transport):
        # The native transport wraps an outcome that existed before the start, as every Nexus handler does.
        assert (await _messages(again))[-2:] == ["the outer reason", "the inner reason"]
    else:
        await _is_refused_as_taken(again)


async def _messages(handle: WorkflowHandle[CallingWorkflow, Reply]) -> list[str]:
    cause = (await _error(handle)).cause
    return [each.message for each in _chain(cause) if isinstance(each, ApplicationError)]


def _chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *_chain(error.__cause__)]


async def test_two_workflows_wait_for_one_run(world: World, transport: Transport) -> None:
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, world.plan(transport))
    target = await world.until_started(ask)
    second = await world.call(ask, world.plan(transport))
    if _may_attach(world, transport):
        await assert_eventually(partial(_both_known, world, transport, second))
    else:
        await _is_refused_as_taken(second)
    await target.signal("say", "to all")
    assert await first.result() == Reply("to all")
    if _may_attach(world, transport):
        assert await second.result() == Reply("to all")


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
async def test_the_endpoints_setting_decides_for_calls_without_a_transport(
    world: World, by_setting: str, by_client: Transport | None, answered: tuple[list[int], list[int]]
) -> None:
    """A change of the setting changes the transport without a change of any workflow."""
    world.endpoint_options["transport"] = by_setting
    await world.stop_worker("caller")
    await world.start_worker("caller")
    handle = await world.call(Ask(world.key(), text="moved"), CallPlan(transport=by_client))
    assert await handle.result() == Reply("moved")
    assert (await world.service.answered(), await world.receiver.answered()) == answered


async def test_polls_leave_no_events(world: World) -> None:
    """The caller's history is the same after three polls and after none."""
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


@pytest.mark.parametrize(
    "deadline", [pytest.param(12.0, id="near the deadline"), pytest.param(600.0, id="far from the deadline")]
)
async def test_a_poll_that_fails_is_followed_by_the_next(world: World, deadline: float) -> None:
    """The next poll comes after the interval, for any number of earlier polls, because there is no callback."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, CallPlan(transport="poll", deadline=deadline))
    target = await world.until_started(ask)
    # Less than ten of twelve seconds are left, and a back-off by attempts would take half a minute.
    await world.until_attempt(handle, 5)

    async def fail_once(_: web.Request) -> web.StreamResponse:
        world.service.before = None
        return web.Response(status=503)

    async def asked_again() -> None:
        assert 503 in world.service.statuses[:-1]

    world.service.before = fail_once
    await assert_eventually(asked_again, within=5)
    await target.signal("say", "asked again")
    assert await handle.result() == Reply("asked again")


async def _known(world: World, handle: WorkflowHandle[CallingWorkflow, Reply]) -> None:
    activity = await world.pending(handle)
    assert activity is not None, "the call has ended"
    assert activity.heartbeat_details.payloads, "the 201 is not recorded yet"


async def _restart_caller(world: World, endpoint: dict[str, Any], **options: Any) -> None:
    """Restart the caller's worker with other settings."""
    await world.stop_worker("caller")
    world.endpoint_options |= endpoint
    world.caller_options |= options
    await world.start_worker("caller")


async def _asked(world: World, times: int) -> None:
    assert len(world.service.requests) >= times


async def test_a_call_goes_on_without_the_receiver_that_it_began_with(world: World) -> None:
    """The renewals need no callback: they get the outcome."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, CallPlan(transport="callback", first_lease=2, renewal=1))
    target = await world.until_started(ask)
    await assert_eventually(partial(_known, world, handle))

    async def lose(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 200)

    world.receiver.before = lose
    await _restart_caller(world, {"transport": "poll"}, receiver=None, callback_keys=None)
    await assert_eventually(partial(_asked, world, len(world.service.requests) + 1))
    await target.signal("say", "learned")
    assert await handle.result() == Reply("learned")


async def test_a_call_goes_on_without_the_endpoint_that_it_began_with(world: World) -> None:
    """The endpoint's name was removed too early: attempts fail, the operation does not, and its callback arrives."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, CallPlan(transport="callback", first_lease=2, renewal=1))
    target = await world.until_started(ask)
    await assert_eventually(partial(_known, world, handle))
    endpoints = world.caller_settings.endpoints
    await _restart_caller(world, {}, endpoints={"others": endpoints["payments"]})

    async def missed() -> None:
        await _known(world, handle)
        assert "no endpoint 'payments'" in (await world.pending(handle)).last_failure.message

    await assert_eventually(missed)
    await target.signal("say", "by callback")
    assert await handle.result() == Reply("by callback")


async def test_a_call_keeps_the_transport_of_its_first_201(world: World) -> None:
    """A call that was started by polling gets no callback. Therefore a change of the setting is for later calls."""
    await _restart_caller(world, {"transport": "poll"})
    ask = Ask(world.key(), "wait")
    polled = await world.call(ask)
    target = await world.until_started(ask)
    await assert_eventually(partial(_known, world, polled))
    await _restart_caller(world, {"transport": "callback"})
    await assert_eventually(partial(_asked, world, len(world.service.requests) + 3))
    await target.signal("say", "polled for")
    assert await polled.result() == Reply("polled for")
    assert world.receiver.requests == []
    called = await world.call(Ask(world.key(), text="called back"))
    assert await called.result() == Reply("called back")
    assert await world.receiver.answered() == [200]


class _Compressor(PayloadCodec):
    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [
            Payload(metadata={"encoding": b"binary/zlib"}, data=zlib.compress(each.SerializeToString()))
            for each in payloads
        ]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [Payload.FromString(zlib.decompress(each.data)) for each in payloads]


async def test_a_client_may_allow_larger_inputs_where_a_codec_compresses(server: Server) -> None:
    """The limit applies to the payload that crosses."""
    converter = with_codec(_Compressor())
    async with running_world(server, converters=(converter, converter)) as world:

        async def call(limit: int | None) -> Reply:
            ask = Ask(world.key(), "end", text="x" * 3 * 1024 * 1024)
            handle = await world.call(ask, CallPlan(transport="callback", max_input_bytes=limit))
            return await handle.result()

        assert tuple(await asyncio.gather(call(None), call(8 * 1024 * 1024))) == (Reply("end"), Reply("end"))


async def test_a_client_may_refuse_smaller_inputs(world: World, transport: Transport) -> None:
    handle = await world.call(Ask(world.key(), text="x" * 1000), world.plan(transport, max_input_bytes=1000))
    error = (await _error(handle)).cause
    assert isinstance(error, HandlerError)
    assert error.type is HandlerErrorType.BAD_REQUEST
    assert "is over the limit of 1000" in str(error)
    assert world.service.requests == []
