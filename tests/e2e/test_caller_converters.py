"""The caller's codec fails at times, or its converter needs type hints: calls end by their outcome all the same."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowExecutionStatus, WorkflowHandle
from temporalio.converter import DataConverter

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler, Tagged
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world, with_codec

SHORT = CallPlan(first_lease=1, renewal=1)


class FailingCodec(Scrambler):
    """While it is failing, refuses a fifth of the decodes."""

    def __init__(self) -> None:
        self.is_failing = False
        self._chance = random.Random(1)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        if self.is_failing and self._chance.random() < 0.2:
            message = "the key service is unavailable"
            raise RuntimeError(message)
        return await super().decode(payloads)


async def scheduled(handle: WorkflowHandle[Any, Any]) -> int:
    return (await events(handle)).count("ACTIVITY_TASK_SCHEDULED")


@pytest.mark.part("codec", short=True)
async def test_a_codec_that_fails_at_times_ends_no_call(server: Server) -> None:
    """Ten calls ask often while a fifth of the decodes fails, until activities have ended three times."""
    codec = FailingCodec()

    def often(world: World) -> None:
        world.endpoint_options = {"poll_interval_s": 0.5, "transport": "poll"}

    async with running_world(server, converters=(with_codec(codec), with_codec(Scrambler())), prepare=often) as world:
        asks = [Ask(world.key(), "wait") for _ in range(10)]
        calls = [await world.call(each, SHORT) for each in asks]
        targets = [await world.until_started(each) for each in asks]
        for each in calls:
            await world.until_attempt(each, 2)
        codec.is_failing = True

        async def activities_have_ended() -> None:
            assert sum([await scheduled(each) for each in calls]) >= 13

        await assert_eventually(activities_have_ended, within=60)
        codec.is_failing = False
        for target in targets:
            await target.signal("say", "paid")
        assert [await each.result() for each in calls] == [Reply("paid")] * 10
        for target in targets:
            assert (await target.describe()).status is WorkflowExecutionStatus.COMPLETED
        ids = [await activity_ids(each) for each in calls]
        assert {len(each) for each in ids} == {1}, "scheduled again under another id"


async def activity_ids(handle: WorkflowHandle[Any, Any]) -> set[str]:
    return {
        event.activity_task_scheduled_event_attributes.activity_id
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    }


async def test_a_converter_that_returns_objects_without_a_type_hint_costs_no_cancel(server: Server) -> None:
    """The renewals know since when the operation runs, and the cancel finds its token."""
    converters = (DataConverter(payload_converter_class=Tagged), DataConverter.default)
    async with running_world(server, converters=converters) as world:
        ask = Ask(world.key(), "cleanup")
        call = await world.call(ask, SHORT)
        target = await world.until_started(ask)
        await world.until_attempt(call, 2, in_backoff=True)
        details = (await world.pending(call)).heartbeat_details
        await world.until_attempt(call, 3, in_backoff=True)
        assert (await world.pending(call)).heartbeat_details == details
        await call.cancel()

        async def canceled() -> None:
            assert (await target.describe()).status is WorkflowExecutionStatus.CANCELED

        await assert_eventually(canceled)
        assert [status for path, status in world.service.requests if path.endswith("/cancel")] == [202]
