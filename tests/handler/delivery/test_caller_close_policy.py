"""Targets for which no caller waits any more, and targets that report progress."""

from collections import OrderedDict, UserDict
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter
from temporalio.worker import Worker

from bridge.temporal.executions import is_open
from bridge.workflow.targets import Targets
from handler.delivery.caller_close_policy import WATCH_CALLERS_ACTIVITY
from handler.delivery.interceptor import _Inbound
from handler.delivery.records import packed_reply
from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.codec import Tagged
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, MindedWorkflow, Reply
from tests.support.world import RUNNER, World, events, running_world

MINDED = CallPlan(first_lease=600, operation="minded")


@pytest_asyncio.fixture(loop_scope="session", name="attentive")
async def attentive_world(server: Server) -> AsyncIterator[World]:
    """A world that checks the callers every half second."""

    def prepare(world: World) -> None:
        world.override_handler_settings(world.handler_settings.model_copy(update={"abandoned_check_s": 0.5}))

    async with running_world(server, prepare=prepare) as world:
        yield world


def minded(world: World, ask: Ask) -> WorkflowHandle[Any, Any]:
    return world.handler_client.get_workflow_handle(f"minded-{ask.key}")


async def until_status(target: WorkflowHandle[Any, Any], status: WorkflowExecutionStatus) -> None:
    async def reached() -> None:
        assert (await target.describe()).status == status

    await assert_eventually(reached)


async def until_watched(world: World, target: WorkflowHandle[Any, Any]) -> None:
    async def watched() -> None:
        found = [each async for each in world.handler_client.list_workflows(f"WorkflowId = '{target.id}'")]
        assert found
        activities = (await target.describe()).raw_description.pending_activities
        assert any(each.attempt > 2 for each in activities), "the watch has not asked yet"

    await assert_eventually(watched)


@pytest.mark.parametrize("way", ["terminated", "deadline"])
async def test_an_abandoned_target_is_canceled(attentive: World, way: str) -> None:
    """The caller was terminated or its deadline has passed. The next check notices it."""
    world = attentive
    ask = Ask(key=world.key())
    plan = CallPlan(first_lease=600, operation="minded", deadline=3 if way == "deadline" else 600)
    handle = await world.call(ask, plan)
    target = minded(world, ask)
    await until_watched(world, target)
    if way == "terminated":
        await handle.terminate()
    with pytest.raises(WorkflowFailureError):
        await handle.result()
    await until_status(target, WorkflowExecutionStatus.CANCELED)
    scheduled = [
        event.activity_task_scheduled_event_attributes.retry_policy.maximum_attempts
        async for event in target.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    ]
    assert len(scheduled) <= 3
    assert set(scheduled) == {2**31 - 1}, "the cluster's default may be one attempt"


@pytest.mark.parametrize("converter", [DataConverter.default, DataConverter(payload_converter_class=Tagged)])
async def test_a_target_with_a_waiting_caller_goes_on(server: Server, converter: DataConverter) -> None:
    """Repeated checks do not cancel the target, even if its first caller has ended and another call is attached.

    The second converter returns objects for values without a type hint.
    """

    def prepare(world: World) -> None:
        world.override_handler_settings(world.handler_settings.model_copy(update={"abandoned_check_s": 0.5}))

    async with running_world(server, converters=(DataConverter.default, converter), prepare=prepare) as world:
        await first_call_ends_and_second_gets_the_outcome(world)


async def first_call_ends_and_second_gets_the_outcome(world: World) -> None:
    ask = Ask(key=world.key())
    first = await world.call(ask, MINDED)
    target = minded(world, ask)
    await until_watched(world, target)
    second = await world.call(ask, MINDED)

    async def attached() -> None:
        assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

    await assert_eventually(attached)
    await first.terminate()

    async def watched_again() -> None:
        scheduled = [
            event.activity_task_scheduled_event_attributes.activity_type.name
            async for event in target.fetch_history_events()
            if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        ]
        assert scheduled == [WATCH_CALLERS_ACTIVITY] * 2, "the second is not watched yet"

    await assert_eventually(watched_again)
    await target.signal("say", "done")
    assert await second.result() == Reply("done")
    await until_status(target, WorkflowExecutionStatus.COMPLETED)


async def test_an_attached_call_is_watched_after_continue_as_new(attentive: World) -> None:
    """The run that goes on has the attached call in its header. The caller that started the first run has ended."""
    world = attentive
    ask = Ask(key=world.key())
    first = await world.call(ask, MINDED)
    target = minded(world, ask)
    await until_watched(world, target)
    run_id = (await target.describe()).run_id
    second = await world.call(ask, MINDED)

    async def attached() -> None:
        assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

    await assert_eventually(attached)
    await first.terminate()
    await target.signal("say", "continue")

    async def continued() -> None:
        assert (await target.describe()).run_id != run_id

    await assert_eventually(continued)
    # The first attempt asks no caller. The third one therefore follows a question that found the second caller.
    await until_watched(world, target)
    await target.signal("say", "done")
    assert await second.result() == Reply("done")


async def test_a_workers_clock_that_is_ahead_abandons_no_target(server: Server) -> None:
    """By the worker's clock the deadline of the call has passed. By the server's clock the caller waits."""

    def prepare(world: World) -> None:
        world.override_handler_settings(world.handler_settings.model_copy(update={"abandoned_check_s": 0.5}))

    async with running_world(server, without=("handler",), prepare=prepare) as world:
        plugin = HandlerPlugin(world.handler_settings, clock=lambda: datetime.now(UTC) + timedelta(minutes=4))
        options: dict[str, Any] = {"workflows": [MindedWorkflow], "plugins": [plugin], "workflow_runner": RUNNER}
        async with Worker(world.handler_client, task_queue=world.payment_queue, **options):
            ask = Ask(key=world.key())
            handle = await world.call(ask, replace(MINDED, deadline=100))
            target = minded(world, ask)
            await until_watched(world, target)
            await target.signal("say", "done")
            assert await handle.result() == Reply("done")


async def test_a_call_that_the_server_delivers_to_counts_as_one_that_waits(server: Server) -> None:
    """The first call's deadline passes. The target goes on for the attached call."""

    def prepare(world: World) -> None:
        world.handler_options = {"abandoned_check_s": 0.5, "nexus": True}

    async with running_world(server, prepare=prepare) as world:
        await world.create_nexus_endpoint()
        plan = world.plan("nexus", operation="minded", first_lease=600)
        ask = Ask(key=world.key())
        first = await world.call(ask, replace(plan, deadline=5))
        target = minded(world, ask)
        await until_watched(world, target)
        second = await world.call(ask, plan)
        with pytest.raises(WorkflowFailureError):
            await first.result()

        async def looked_again() -> None:
            assert len(await activities_of(target)) >= 2

        await assert_eventually(looked_again)
        assert await activities_of(target) == [WATCH_CALLERS_ACTIVITY] * 2
        await target.signal("say", "done")
        assert await second.result() == Reply("done")


async def activities_of(target: WorkflowHandle[Any, Any]) -> list[str]:
    """Return the types of the scheduled activities, in order."""
    return [
        each.activity_task_scheduled_event_attributes.activity_type.name
        for each in (await target.fetch_history()).events
        if each.HasField("activity_task_scheduled_event_attributes")
    ]


@pytest.mark.parametrize("status", [400, 401, 404, 410, 500, 503])
async def test_in_doubt_the_caller_counts_as_waiting(attentive: World, status: int) -> None:
    """A receiver that cannot answer, or a peer that does not know the question, cancels no target."""
    world = attentive
    ask = Ask(key=world.key())
    handle = await world.call(ask, MINDED)
    target = minded(world, ask)

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status)

    world.receiver.before = refuse
    await until_watched(world, target)
    assert status in await world.receiver.answered()
    world.receiver.before = None
    await target.signal("say", "done")
    assert await handle.result() == Reply("done")


async def test_a_target_is_kept_by_default(world: World) -> None:
    """Without the policy there is no watch, no event and no request."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask)
    target = await world.until_started(ask)
    await handle.terminate()
    await target.signal("say", "on")
    assert (await target.result())["text"] == "on"
    assert "ACTIVITY_TASK_SCHEDULED" not in await events(target)


async def test_progress_is_shown_with_the_pending_activity(world: World) -> None:
    """The answer to the next renewal has the latest progress. No message and no event is added in between."""
    ask = Ask(key=world.key())
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1, operation="minded"))
    target = minded(world, ask)
    await world.until_attempt(handle, 2)
    before = await events(handle)
    for text in ("first", "second"):
        await target.signal("say", text)

    async def shown() -> None:
        payloads = (await world.pending(handle)).heartbeat_details.payloads
        assert len(payloads) == 2, "no progress yet"
        [_, progress] = await world.caller_client.data_converter.decode(payloads)
        assert progress == {"said": "second"}

    await assert_eventually(shown)
    assert await events(handle) == before
    await target.signal("say", "done")
    assert await handle.result() == Reply("done")


async def test_progress_that_the_caller_cannot_read_ends_no_call(world: World) -> None:
    """A worker fails an activity with details that it cannot decode. Such progress is therefore left out."""
    ask = Ask(key=world.key())
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1, operation="minded"))
    target = minded(world, ask)
    await world.until_attempt(handle, 2)
    await target.signal("say", "unreadable")
    await world.until_attempt(handle, 5)
    assert len((await world.pending(handle)).heartbeat_details.payloads) == 1
    await target.signal("say", "done")
    assert await handle.result() == Reply("done")


def test_a_paused_run_is_open() -> None:
    """Newer servers have this status. Such a run does not count as closed."""
    assert [number for number in range(9) if is_open(WorkflowExecutionInfo(status=number))] == [1, 8]  # type: ignore[arg-type] # the enum's numbers


def test_an_attached_call_is_watched_with_any_mapping_or_object() -> None:
    """Some mappings have attributes too. A call that is not watched would let its target be canceled."""
    fields = {
        **dict.fromkeys(("input_hash", "service", "operation"), ""),
        "caller": "orders",
        "request_id": "one",
        "deadline_ms": 0,
        "reply": packed_reply(operation_token="", callback_url=None),
    }
    for value in (fields, OrderedDict(fields), UserDict(fields), SimpleNamespace(**fields)):
        inbound = _Inbound.__new__(_Inbound)
        inbound._watched = {}
        inbound._attach(value)
        inbound._attach(7)
        assert list(inbound._watched) == [("orders", "one")]


async def test_a_retried_run_is_not_watched(server: Server) -> None:
    """It has not seen the signals of the failed run. A call that is attached to that run may wait, and renew later."""

    def prepare(world: World) -> None:
        world.handler_options = {"abandoned_check_s": 0.5}
        policy = RetryPolicy(initial_interval=timedelta(milliseconds=100), maximum_attempts=2)
        world.targets = [replace(each, retry_policy=policy) for each in Targets([MindedWorkflow])]

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(key=world.key())
        handle = await world.call(ask, MINDED)
        target = minded(world, ask)
        await until_watched(world, target)
        run_id = (await target.describe()).run_id
        await target.signal("say", "fail")

        async def retried() -> None:
            assert (await target.describe()).run_id != run_id
            assert "WORKFLOW_TASK_COMPLETED" in await events(target)

        await assert_eventually(retried)
        assert "ACTIVITY_TASK_SCHEDULED" not in await events(target)
        await target.signal("say", "done")
        assert await handle.result() == Reply("done")
