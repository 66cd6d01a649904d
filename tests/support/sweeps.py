"""Sweeps that tests hasten, wait for, and read."""

import json
from typing import Any

from temporalio.client import WorkflowHandle

from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import (
    Ask,
    FlakyWorkflow,
    ProbeWorkflow,
    foreign_target,
)
from tests.support.world import World

LONG = CallPlan(first_lease=600)

FLAKY = CallPlan(first_lease=600, operation="flaky")

FOREIGN = CallPlan(first_lease=600, operation="foreign")


def hasten(world: World) -> None:
    set_interval(world, 0.2)
    world.targets = [ProbeWorkflow, FlakyWorkflow, foreign_target(f"foreign-{world.id}")]


def set_interval(world: World, seconds: float) -> None:
    world.override_handler_settings(world.handler_settings.model_copy(update={"sweep_interval_s": seconds}))


async def end_sweep(world: World) -> None:
    """Stop the sweeps after the test, because a sweep runs for ever."""
    for each in world.sweeps:
        await each.terminate()


async def attempts(world: World) -> list[int]:
    found = [await world.pending(each) for each in world.sweeps]
    return [0 if activity is None else int(activity.attempt) for activity in found]


async def swept_on(world: World, times: int = 3) -> None:
    """Wait until every sweep has run a few more times."""
    before = await attempts(world)

    async def check() -> None:
        assert all(now >= then + times for now, then in zip(await attempts(world), before, strict=True))

    await assert_eventually(check)


async def place(world: World) -> dict[str, Any]:
    activity = await world.pending(world.sweep)
    assert activity is not None
    assert activity.heartbeat_details.payloads, "nothing recorded yet"
    [text] = await world.handler_client.data_converter.decode(activity.heartbeat_details.payloads, [str])
    found: dict[str, Any] = json.loads(text)
    return found


async def request_id(world: World, ask: Ask) -> str:
    described = await world.target(ask).describe()
    return str((await described.memo_value("bridge"))["request_id"])


async def deliveries(world: World, ask: Ask) -> list[str]:
    """Return the delivery workflows for all runs of the call."""
    prefix = f"bridge-delivery-{CALLER}:{await request_id(world, ask)}"
    query = f"WorkflowType = 'bridge.Delivery' AND WorkflowId STARTS_WITH '{prefix}'"
    return [each.id async for each in world.handler_client.list_workflows(query)]


async def assert_delivered_once(world: World, ask: Ask) -> None:
    """One request delivers the outcome, without a delivery workflow. The next sweeps do not repeat it."""
    await swept_on(world)
    assert (await world.service.answered(), await world.receiver.answered()) == ([201], [200])
    assert await deliveries(world, ask) == []


async def terminated(world: World, ask: Ask, plan: CallPlan = LONG) -> WorkflowHandle[Any, Any]:
    handle = await world.call(ask, plan)
    target = await world.until_started(ask)
    await target.terminate(reason="suspected fraud")
    return handle


async def runs_of_sweep(world: World) -> list[str]:
    query = f"WorkflowId = '{world.sweep.id}'"
    return [each.run_id async for each in world.handler_client.list_workflows(query)]
