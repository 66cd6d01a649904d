"""Starts that are held open: after every fault during a hold the call ends with the outcome of one run."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.client import WorkflowHandle
from temporalio.exceptions import ApplicationError, TerminatedError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError

from handler.start.held_starts import HeldStarts
from scripts.environment.server import Server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.calling_workflows import failure_of
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

HELD_S = 20
"""Longer than any test takes to end its target: an earlier answer was not held to the end."""

HELD = CallPlan(first_lease=600, transport="wait")
"""The first renewal would come after the end of the test."""

Calling = WorkflowHandle[CallingWorkflow, Reply]


def holding(world: World) -> None:
    world.endpoint_options = {"wait_s": HELD_S}


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_world(server, prepare=holding) as made:
        yield made


async def held(world: World, ask: Ask, plan: CallPlan = HELD) -> tuple[Calling, WorkflowHandle[Any, Any]]:
    """A call whose start is held, and its running target."""
    handle = await world.call(ask, plan)
    target = await world.until_started(ask)
    assert world.service.statuses == [], "answered already"
    return handle, target


async def runs_of(world: World, ask: Ask) -> int:
    query = f"WorkflowId = '{world.target(ask).id}'"
    return len([each async for each in world.handler_client.list_workflows(query)])


async def assert_in_answer(world: World, target: WorkflowHandle[Any, Any], status: int) -> None:
    """Assert that there was one request in all, and that the target's worker delivered nothing."""
    assert world.service.statuses == [status]
    assert await world.receiver.answered() == []
    assert "ACTIVITY_TASK_SCHEDULED" not in await events(target)


async def test_a_held_start_is_answered_when_the_target_ends(world: World) -> None:
    """The attempt leaves the receipt by which the receiver knows a repeat."""
    handle, target = await held(world, Ask(world.key(), "wait"))
    await target.signal("say", "in the answer")
    assert await handle.result() == Reply("in the answer")
    closings = [each.activity_task_completed_event_attributes async for each in handle.fetch_history_events()]
    [identity] = [each.identity for each in closings if each.identity]
    assert identity.endswith(":succeeded")
    await assert_in_answer(world, target, 200)


async def test_a_failure_within_the_hold_is_the_answer(world: World) -> None:
    handle, target = await held(world, Ask(world.key(), "wait"))
    await target.signal("say", "fail")
    cause = await failure_of(handle)
    assert isinstance(cause, ApplicationError)
    assert (cause.type, cause.message) == ("Outer", "the outer reason")
    assert isinstance(cause.cause, ApplicationError)
    await assert_in_answer(world, target, 424)


async def test_a_termination_within_the_hold_is_the_answer(world: World) -> None:
    """It arrives without sweep and renewal."""
    handle, target = await held(world, Ask(world.key(), "wait"))
    await target.terminate(reason="by the test")
    cause = await failure_of(handle)
    assert isinstance(cause, TerminatedError)
    assert cause.message == "operation terminated"
    await assert_in_answer(world, target, 424)


async def test_continuing_as_new_within_the_hold_does_not_end_it(world: World) -> None:
    """The answer is the last run's outcome; its worker also delivers the same outcome."""
    handle, target = await held(world, Ask(world.key(), "continue on signal"))
    await target.signal("say", "go")
    assert await handle.result() == Reply("second run")

    async def both_answered() -> None:
        assert (await world.service.answered(), await world.receiver.answered()) == ([200], [200])

    await assert_eventually(both_answered)
    assert (await events(handle)).count("ACTIVITY_TASK_COMPLETED") == 1


async def test_starts_beyond_the_limit_of_held_starts_are_answered_at_once(server: Server) -> None:
    """With a limit of one the second call waits for its callback; both get their results."""

    def prepare(world: World) -> None:
        holding(world)
        settings = world.handler_settings
        service = settings.service.model_copy(update={"held_starts": 1})
        world.override_handler_settings(settings.model_copy(update={"service": service}))

    async with running_world(server, prepare=prepare) as world:
        asks = [Ask(world.key(), "wait") for _ in range(2)]
        first, first_target = await held(world, asks[0])
        second = await world.call(asks[1], HELD)

        async def answered() -> None:
            assert world.service.statuses == [201]

        await assert_eventually(answered)
        second_target = await world.until_started(asks[1])
        await second_target.signal("say", "by callback")
        assert await second.result() == Reply("by callback")
        assert await world.receiver.answered() == [200]
        await first_target.signal("say", "in the answer")
        assert await first.result() == Reply("in the answer")
        assert world.service.statuses == [201, 200]
        assert await world.receiver.answered() == [200]

        # Another start can be held again.
        third = Ask(world.key(), "wait")
        handle, target = await held_again(world, third)
        await target.signal("say", "held")
        assert await handle.result() == Reply("held")
        assert world.service.statuses == [201, 200, 200]


async def held_again(world: World, ask: Ask) -> tuple[Calling, WorkflowHandle[Any, Any]]:
    handle = await world.call(ask, HELD)
    return handle, await world.until_started(ask)


async def test_a_stopping_service_releases_its_held_starts(world: World) -> None:
    """The answer is 503. The next service gets the repeated start, finds the run and holds the start."""
    ask = Ask(world.key(), "wait")
    handle, target = await held(world, ask)
    await asyncio.wait_for(world.service.stop(), HELD_S / 2)
    assert world.service.statuses == [503]
    await world.service.start()
    await target.signal("say", "asked again")
    assert await handle.result() == Reply("asked again")
    assert world.service.statuses == [503, 200]
    assert await runs_of(world, ask) == 1


def connections(world: World) -> list[asyncio.Transport]:
    """The connections of all requests from now on."""
    found: list[asyncio.Transport] = []

    async def note(request: web.Request) -> None:
        assert isinstance(request.transport, asyncio.Transport)
        found.append(request.transport)

    world.service.before = note
    return found


async def test_a_connection_that_breaks_while_held_costs_nothing_but_a_second_request(world: World) -> None:
    opened = connections(world)
    ask = Ask(world.key(), "wait")
    handle, target = await held(world, ask)
    opened[0].abort()

    async def asked_again() -> None:
        assert len(opened) == 2

    await assert_eventually(asked_again)
    await target.signal("say", "whole")
    assert await handle.result() == Reply("whole")
    assert await runs_of(world, ask) == 1


async def test_a_hold_that_a_proxy_cuts_ends_by_callback_if_the_repeat_is_not_held(server: Server) -> None:
    """The cut start still has the only place. The repeat is answered 201, and only a callback can end the call."""

    def prepare(world: World) -> None:
        holding(world)
        service = world.handler_settings.service.model_copy(update={"held_starts": 1})
        world.override_handler_settings(world.handler_settings.model_copy(update={"service": service}))

    async with running_world(server, prepare=prepare) as world:
        opened = connections(world)
        ask = Ask(world.key(), "wait")
        handle, target = await held(world, ask)
        opened[0].abort()

        async def answered() -> None:
            assert world.service.statuses == [201]

        await assert_eventually(answered)
        await target.signal("say", "by callback")
        assert await asyncio.wait_for(handle.result(), HELD_S) == Reply("by callback")
        assert await world.receiver.answered() == [200]
        assert await runs_of(world, ask) == 1


async def test_the_next_attempt_replaces_an_answer_lost_after_the_target_ended(world: World) -> None:
    """The worker sends no callback for a held start. The next attempt gets the outcome."""
    opened = connections(world)

    async def lose() -> None:
        if len(opened) == 1:
            opened[0].abort()

    world.service.after = lose
    ask = Ask(world.key(), "wait")
    handle, target = await held(world, ask)
    await target.signal("say", "learned")
    assert await handle.result() == Reply("learned")
    assert len(opened) == 2
    assert await world.receiver.answered() == []
    assert "ACTIVITY_TASK_SCHEDULED" not in await events(target)
    assert await runs_of(world, ask) == 1


async def test_a_caller_whose_worker_stops_during_a_hold_gets_the_outcome_by_its_next_attempt(world: World) -> None:
    """The answer reached no process; the next attempt gets the outcome."""
    ask = Ask(world.key(), "wait")
    handle, target = await held(world, ask)
    await world.stop_worker("caller")
    await target.signal("say", "while down")
    await target.result()
    await world.start_worker("caller")
    assert await handle.result() == Reply("while down")
    assert await runs_of(world, ask) == 1
    assert len(await events(handle)) == 11


async def test_a_run_longer_than_the_hold_is_completed_by_callback(server: Server) -> None:
    """The answer is 201 after the hold. Then the call continues like any other, without a second start."""

    def prepare(world: World) -> None:
        world.endpoint_options = {"wait_s": 1}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, HELD)

        async def answered() -> None:
            assert world.service.statuses == [201]

        await assert_eventually(answered)
        await world.target(ask).signal("say", "later")
        assert await handle.result() == Reply("later")
        assert world.service.statuses == [201]
        assert await world.receiver.answered() == [200]


async def test_a_hold_ends_before_the_operation_must_have_started(world: World) -> None:
    """The time to start is shorter than the hold. The start is released early, so that the call does not time out."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, CallPlan(first_lease=600, transport="wait", schedule_to_start=5))

    async def released() -> None:
        assert world.service.statuses == [201]

    await assert_eventually(released, within=HELD_S / 2)
    await world.target(ask).signal("say", "started")
    assert await handle.result() == Reply("started")


async def test_a_hold_ends_before_the_operation_must_have_ended(world: World) -> None:
    """The time to close is shorter than the hold. After it the call ends as with a callback."""
    ask = Ask(world.key(), "wait")
    handle = await world.call(ask, CallPlan(transport="wait", start_to_close=3, renewal=1, deadline=20))
    cause = await failure_of(handle)
    assert isinstance(cause, TemporalTimeoutError)
    assert cause.type is TimeoutType.START_TO_CLOSE


async def test_no_start_is_held_after_holding_has_ended(world: World) -> None:
    """A start that is released later makes no room for another one."""
    holds = HeldStarts(world.handler_client, limit=1)
    second = timedelta(seconds=1)
    with holds.reserve(second, caller=CALLER, limit=1) as hold:
        assert hold == second
        holds.close()
    with holds.reserve(second, caller=CALLER, limit=1) as hold:
        assert hold is None


async def test_one_caller_cannot_take_the_held_starts_of_all(world: World) -> None:
    """A caller at its own limit is answered at once, while another caller is held, up to the limit of all."""
    holds = HeldStarts(world.handler_client, limit=3)
    second = timedelta(seconds=1)
    with contextlib.ExitStack() as stack:

        def hold(caller: str) -> timedelta | None:
            return stack.enter_context(holds.reserve(second, caller=caller, limit=2))

        assert [hold("greedy") for _ in range(3)] == [second, second, None]
        assert [hold("other"), hold("third")] == [second, None]
    with holds.reserve(second, caller="greedy", limit=2) as again:
        assert again == second


async def test_a_hold_costs_one_request_to_temporal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds also in the last second, in which the server ends a long poll early."""
    world.endpoint_options["wait_s"] = 2
    await world.stop_worker("caller")
    await world.start_worker("caller")
    service, asked = world.handler_client.workflow_service, 0
    ask_temporal = service.get_workflow_execution_history

    async def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        return await ask_temporal(*arguments, **options)

    monkeypatch.setattr(service, "get_workflow_execution_history", counting)
    await world.call(Ask(world.key(), "wait"), HELD)

    async def released() -> None:
        assert world.service.statuses == [201]

    await assert_eventually(released)
    assert asked == 1
