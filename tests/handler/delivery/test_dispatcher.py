"""Delivery by the worker: what arrives is what closed the target, and the target knows nothing of it."""

import asyncio
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import NexusOperationError

from tests.support.workflows import Ask, CallPlan, Reply
from tests.support.world import World, events

LONG = CallPlan(first_lease=600)
"""No renewal comes before the test is over."""
BIG = 2 * 1024 * 1024 - 20_000
"""Fits Temporal's limit as a result."""
PLAIN_HISTORY = [
    "WORKFLOW_EXECUTION_STARTED",
    "WORKFLOW_TASK_SCHEDULED",
    "WORKFLOW_TASK_STARTED",
    "WORKFLOW_TASK_COMPLETED",
    "WORKFLOW_EXECUTION_COMPLETED",
]


class Gate:
    """Holds the receiver's requests until it is opened."""

    def __init__(self, world: World) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        world.receiver.before = self

    async def __call__(self, _: web.Request) -> web.StreamResponse | None:
        self.reached.set()
        await self.opened.wait()
        return None


async def deliveries(world: World, target: WorkflowHandle[Any, Any]) -> list[WorkflowExecutionStatus | None]:
    """States of the delivery workflows of *target*."""
    described = await target.describe()
    query = f"WorkflowType = 'bridge.Delivery' AND WorkflowId STARTS_WITH 'bridge-delivery-{await request_id(target)}'"
    found = [each async for each in world.handler_client.list_workflows(query)]
    return [each.status for each in found if described.run_id in each.id]


async def request_id(target: WorkflowHandle[Any, Any]) -> str:
    return (await _memo(target))["request_id"]


async def _memo(target: WorkflowHandle[Any, Any]) -> dict[str, str]:
    memo: dict[str, str] = await (await target.describe()).memo_value("bridge")
    return memo


async def status(handle: WorkflowHandle[Any, Any]) -> WorkflowExecutionStatus | None:
    return (await handle.describe()).status


async def failure_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


async def answers(world: World, status_code: int) -> None:
    async def before(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status_code)

    world.receiver.before = before


async def test_the_target_has_closed_before_its_outcome_is_delivered(world: World) -> None:
    """When the callback arrives, the run is closed, and its history is the one that it has without the plugin."""
    gate = Gate(world)
    ask = Ask(key=world.key(), text="committed")
    handle = await world.call(ask, LONG)
    await asyncio.wait_for(gate.reached.wait(), 20)
    assert await events(world.target(ask)) == PLAIN_HISTORY
    gate.opened.set()
    assert await handle.result() == Reply("committed")
    assert await deliveries(world, world.target(ask)) == []
