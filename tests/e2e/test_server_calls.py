"""Temporal's own server calls our handler service: what a call gets, and when."""

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from handler.delivery.records import CallMemo
from scripts.environment.server import Server
from tests.support.helpers import assert_eventually
from tests.support.server_caller import SERVER, call, cause_of, is_unknown, running_side, until_known_to_run
from tests.support.targets import Ask, Reply
from tests.support.world import World, events


@pytest.fixture(scope="session")
def server(own_server: Server) -> Server:
    """Its HTTP port is known, which the calls' completions use."""
    return own_server


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_side(server, auth="none") as made:
        yield made


async def runs_of(world: World, ask: Ask) -> int:
    """The runs of the target: one, for any number of starts."""
    workflow_id = world.target(ask).id
    return len([each async for each in world.handler_client.list_workflows(f"WorkflowId = '{workflow_id}'")])


async def assert_delivered(caplog: pytest.LogCaptureFixture, target: WorkflowHandle[Any, Any], answer: str) -> None:
    """Wait until the dispatcher has delivered the outcome of *target* once, with this answer."""

    async def delivered() -> None:
        records = [
            each.__dict__ for each in caplog.records if each.getMessage().startswith("bridge.completion_delivered")
        ]
        assert [each["bridge.answer"] for each in records if each["bridge.target"] == target.id] == [answer]

    await assert_eventually(delivered)


async def test_a_call_by_the_server_gets_the_result_when_the_target_has_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The started event has our token; the completion goes to the server's endpoint."""
    caplog.set_level(logging.INFO, "handler.delivery.callback_client")
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    target = await world.until_started(ask)
    await target.signal("say", "from the handler")
    assert await handle.result() == Reply("from the handler")
    assert world.service.statuses == [201]
    await target.result()
    await assert_delivered(caplog, target, "accepted")


async def test_an_existing_outcome_is_the_answer_to_the_start(world: World) -> None:
    """The same order again makes no second run and no completion."""
    ask = Ask(world.key(), text="once")
    assert await (await call(world, ask)).result() == Reply("once")
    again = await call(world, ask)
    assert await again.result() == Reply("once")
    assert "NEXUS_OPERATION_STARTED" not in await events(again)
    assert world.service.statuses == [201, 200]
    assert await runs_of(world, ask) == 1


async def test_an_operation_without_a_workflow_is_answered_at_once(world: World) -> None:
    """A plain nexusrpc operation takes one request."""
    handle = await call(world, Ask(world.key(), text="quoted"), operation="QuoteService/quote")
    assert await handle.result() == Reply("quoted")
    assert world.service.statuses == [200]


@pytest.mark.parametrize("behaviour", ["fail", "cancel"])
async def test_an_operation_without_a_workflow_that_fails_fails_the_call(world: World, behaviour: str) -> None:
    handle = await call(world, Ask(world.key(), behaviour), operation="QuoteService/quote")
    cause = await cause_of(handle)
    if behaviour == "fail":
        assert isinstance(cause, ApplicationError)
        assert [str(each) for each in chain(cause)] == [
            "OperationError: no such rate",
            "Inner: the inner reason",
            "ValueError: the innermost",
        ]
    else:
        assert isinstance(cause, CancelledError)
    assert world.service.statuses == [424]


def chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *chain(error.__cause__)]


async def test_a_failure_arrives_with_its_whole_chain(world: World) -> None:
    """Message, type, details and cause arrive as from a native handler, also for a repeated start."""
    ask = Ask(world.key(), "fail")
    for _ in range(2):
        causes = chain(await cause_of(await call(world, ask)))
        outer, inner = (
            each for each in causes if isinstance(each, ApplicationError) and each.type in {"Outer", "Inner"}
        )
        assert isinstance(outer, ApplicationError)
        assert (outer.message, list(outer.details)) == ("the outer reason", [{"key": ask.key}, "two"])
        assert isinstance(inner, ApplicationError)
        assert (inner.message, inner.non_retryable, list(inner.details)) == ("the inner reason", True, [1])
    assert world.service.statuses == [201, 424]


async def test_a_cancel_by_the_server_cancels_the_target(world: World) -> None:
    """The operation token comes in the path or in a header, depending on the server's version."""
    ask = Ask(world.key(), "cleanup")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    target = await world.until_started(ask)
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, CancelledError)
    with pytest.raises(WorkflowFailureError):
        await target.result()
    assert (await events(target))[-1] == "WORKFLOW_EXECUTION_CANCELED"
    assert world.service.statuses == [201, 202]
    path, _ = world.service.requests[1]
    assert re.fullmatch(rf"/c/{SERVER}/ProbeService/probe(/[^/]+)?/cancel", path)


async def test_a_cancel_does_not_decide(world: World) -> None:
    ask = Ask(world.key(), "swallow cancel")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    await handle.cancel()
    assert await handle.result() == Reply("went on all the same")


async def test_an_outcome_after_the_callers_deadline_is_sent_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers that the operation is over; the target closes, and no delivery continues."""
    caplog.set_level(logging.INFO, "handler.delivery.callback_client")
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask, deadline=2.0)
    cause = await cause_of(handle)
    assert isinstance(cause, TemporalTimeoutError)
    assert cause.type is TimeoutType.SCHEDULE_TO_CLOSE
    target = world.target(ask)
    await target.signal("say", "too late")
    await target.result()
    await assert_delivered(caplog, target, "gone")


def spoil_first_answer(world: World, way: str, *, first: Callable[[], Awaitable[None]] | None = None) -> list[str]:
    """The service acts on the first start, *first* happens, the answer is "lost" or "500". Returns the caller."""
    asked: list[web.Request] = []
    ids: list[str] = []

    async def note(request: web.Request) -> None:
        asked.append(request)
        ids.append(request.headers["Nexus-Request-Id"])

    async def spoil() -> None:
        if len(asked) > 1:
            return
        if first is not None:
            await first()
        if way == "500":
            raise web.HTTPInternalServerError
        assert asked[0].transport is not None
        asked[0].transport.abort()

    world.service.before, world.service.after = note, spoil
    return ids


@pytest.mark.parametrize("way", ["lost", "500"])
async def test_a_start_that_the_server_repeats_starts_the_target_once(world: World, way: str) -> None:
    """The same request id gets the same token."""
    ids = spoil_first_answer(world, way)
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    await world.target(ask).signal("say", "once")
    assert await handle.result() == Reply("once")
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert await runs_of(world, ask) == 1


async def test_a_completion_may_overtake_the_answer_to_the_start(world: World) -> None:
    """The answer is lost; the completion arrives with the token that the answer would have had."""
    spoil_first_answer(world, "lost")
    ask = Ask(world.key(), text="overtaken")
    handle = await call(world, ask)
    assert await handle.result() == Reply("overtaken")
    [started] = [
        each.nexus_operation_started_event_attributes
        for each in (await handle.fetch_history()).events
        if each.HasField("nexus_operation_started_event_attributes")
    ]
    memo = await (await world.target(ask).describe()).memo()
    assert started.operation_token == CallMemo(**memo["bridge"]).operation_token
    assert await runs_of(world, ask) == 1


async def test_a_repeated_start_is_answered_with_an_undelivered_outcome(world: World) -> None:
    """The target was terminated before the repeat: no worker could deliver that, and no sweep runs here."""
    ask = Ask(world.key(), "wait")

    async def terminate() -> None:
        await world.target(ask).terminate(reason="by the test")

    ids = spoil_first_answer(world, "lost", first=terminate)
    cause = await cause_of(await call(world, ask))
    assert "operation terminated" in str(chain(cause)[-1])
    assert len(ids) == 2
    assert await runs_of(world, ask) == 1


async def test_a_refused_input_fails_the_call_at_once(world: World) -> None:
    """The refusal is final: the server sends one request, and nothing is started."""
    ask = Ask(world.key(), "refused")
    cause = await cause_of(await call(world, ask))
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.BAD_REQUEST
    assert "the check says no" in str(cause)
    assert world.service.statuses == [400]
    assert await is_unknown(world.target(ask))


async def test_a_call_goes_on_when_the_handler_service_is_back(world: World) -> None:
    """The server repeats the start."""
    await world.service.stop()
    ask = Ask(world.key(), text="after the outage")
    handle = await call(world, ask)

    async def asked_in_vain() -> None:
        pending = (await handle.describe()).raw_description.pending_nexus_operations
        assert [each.HasField("last_attempt_failure") for each in pending] == [True]

    await assert_eventually(asked_in_vain)
    await world.service.start()
    assert await handle.result() == Reply("after the outage")
    assert world.service.statuses == [201]
