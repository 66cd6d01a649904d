"""Histories recorded by every released version replay with today's code.

A pass proves that today's workflow-side code gives the same commands for what was recorded: calls under way survive an
upgrade. `RECORD_HISTORIES=1 scripts/test tests/e2e/test_replay.py` records anew, a deliberate act that belongs to a
release.
"""

import asyncio
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import WorkflowFailureError, WorkflowHandle, WorkflowHistory
from temporalio.service import RPCError
from temporalio.worker import Replayer
from temporalio.workflow import NexusOperationCancellationType as CancellationType

from examples.payments.orders import OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from handler.delivery.workflow import DeliveryWorkflow
from handler.sweep.workflow import SweepWorkflow
from scripts.environment.server import Server
from tests.support.callers import CALLERS, CallingWorkflow, CallPlan, ManyCalls
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import TARGETS, Ask
from tests.support.world import RUNNER, World, events, running_world

HISTORIES = Path(__file__).parent / "histories"
VERSION = "0.1"

SHAPES = {
    "canceled-wait-completed": CallPlan(cancellation=int(CancellationType.WAIT_COMPLETED), catch=True),
    "canceled-wait-requested": CallPlan(cancellation=int(CancellationType.WAIT_REQUESTED), catch=True),
    "canceled-try-cancel": CallPlan(cancellation=int(CancellationType.TRY_CANCEL), catch=True),
    "canceled-abandon": CallPlan(cancellation=int(CancellationType.ABANDON), catch=True),
    "start-to-close": CallPlan(start_to_close=8, renewal=1, catch=True),
    "schedule-to-start": CallPlan(schedule_to_start=2, catch=True),
    "scheduled-again": CallPlan(),
    "refused": CallPlan(max_input_bytes=10, catch=True),
    "poll": CallPlan(transport="poll"),
}
"""Further shapes of a call, by the name of the history."""

RECORDED = sorted(HISTORIES.glob("*/*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name} {path.stem}")
async def test_a_recorded_history_replays(path: Path) -> None:
    """The code issues the same commands in the same order, without plugins, settings or keys."""
    own = [DeliveryWorkflow, SweepWorkflow]
    workflows = [OrderWorkflow, PaymentWorkflow, *CALLERS, *TARGETS, *own]
    replayer = Replayer(workflows=workflows, workflow_runner=RUNNER)
    await replayer.replay_workflow(WorkflowHistory.from_json(path.stem, path.read_text()))


@pytest.mark.skipif("RECORD_HISTORIES" in os.environ, reason="they are being recorded")
def test_every_released_version_has_histories() -> None:
    """With an empty folder the test above would check nothing."""
    assert {path.stem for path in RECORDED} >= {
        *("call-success", "call-failure", "call-timeout", "calls-canceled-together", "target-canceled", "delivery"),
        *(f"call-{name}" for name in SHAPES),
    }


def _anonymous(value: Any) -> Any:
    """*value* without data of the machine that no replay reads: stack traces, identities, inputs of commands."""
    if isinstance(value, list):
        return [_anonymous(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: each for name, each in value.items() if name not in {"stackTrace", "identity", "binaryChecksum"}}
    for name in ("activityTaskScheduledEventAttributes", "startChildWorkflowExecutionInitiatedEventAttributes"):
        if name in kept:
            kept[name] = {key: each for key, each in kept[name].items() if key != "input"}
    return {name: _anonymous(each) for name, each in kept.items()}


async def _restart(world: World) -> None:
    await world.stop_worker("caller")
    await world.start_worker("caller")


async def _recorded(world: World, plan: CallPlan) -> WorkflowHandle[Any, Any]:
    """Make a call of one shape, on two workers one after the other."""
    ask = Ask(world.key(), "cleanup")
    if plan.schedule_to_start:
        await world.service.stop()
    handle = await world.call(ask, plan)
    if plan.schedule_to_start or plan.max_input_bytes == 10:
        await handle.result()
        await world.service.stop()
        await world.service.start()
        return handle
    target = await world.until_started(ask)

    async def known() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads

    await assert_eventually(known)
    await _restart(world)
    if plan.start_to_close:
        await handle.result()
    elif plan.catch:
        await handle.signal(CallingWorkflow.cancel_call)
        await handle.result()
    elif plan.transport == "poll":
        await target.cancel()
    else:
        await world.stop_waiting(handle)

        async def again() -> None:
            assert (await events(handle)).count("ACTIVITY_TASK_SCHEDULED") == 2

        await assert_eventually(again)
        await _restart(world)
        await target.cancel()
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()
    with contextlib.suppress(RPCError):
        await target.terminate()
    return handle


async def test_record(server: Server) -> None:
    """Write the histories of this version."""

    async def save(name: str, handle: WorkflowHandle[Any, Any]) -> None:
        (HISTORIES / VERSION).mkdir(parents=True, exist_ok=True)
        history = json.loads((await handle.fetch_history()).to_json())
        (HISTORIES / VERSION / f"{name}.json").write_text(json.dumps(_anonymous(history), indent=1) + "\n")

    async with running_world(server) as world:
        for name, behaviour in (("success", "return"), ("failure", "fail"), ("canceled", "cleanup")):
            ask = Ask(key=world.key(), behaviour=behaviour, text="recorded")
            handle = await world.call(ask)
            target = await world.until_started(ask)
            if behaviour == "cleanup":
                await target.cancel()
            for each in (handle, target):
                with contextlib.suppress(WorkflowFailureError):
                    await each.result()
            await save(f"call-{name}", handle)
            await save(f"target-{name}", target)
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(deadline=2))
        with pytest.raises(WorkflowFailureError):
            await handle.result()
        await save("call-timeout", handle)
        await world.target(ask).terminate()
        for name, plan in SHAPES.items():
            await save(f"call-{name}", await _recorded(world, plan))
        asks = [Ask(world.key(), "cleanup") for _ in range(3)]
        batch = await world.caller_client.start_workflow(
            ManyCalls.run, args=[asks, CallPlan()], id=world.key("many"), task_queue=world.order_queue
        )
        await asyncio.gather(*map(world.until_started, asks))
        await _restart(world)
        await batch.cancel()
        await batch.result()
        await save("calls-canceled-together", batch)

        async def unavailable(_: web.Request) -> web.StreamResponse:
            return web.Response(status=503)

        world.receiver.before = unavailable
        ask = Ask(key=world.key(), text="delivered")
        handle = await world.call(ask)
        target = await world.until_started(ask)
        await target.result()
        described = await target.describe()
        request_id = (await described.memo())["bridge"]["request_id"]
        delivery = world.handler_client.get_workflow_handle(f"bridge-delivery-{CALLER}:{request_id}-{described.run_id}")

        async def handed_over() -> None:
            try:
                names = await events(delivery)
            except RPCError as error:
                raise AssertionError from error
            assert "ACTIVITY_TASK_SCHEDULED" in names

        await assert_eventually(handed_over)
        world.receiver.before = None
        await handle.result()
        await delivery.result()
        await save("delivery", delivery)


if "RECORD_HISTORIES" not in os.environ:
    # Recording needs a decision: without the variable the test is not collected.
    del test_record
