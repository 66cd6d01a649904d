"""Histories recorded by every released version replay with today's code.

A pass proves that today's workflow-side code gives the same commands for what was recorded: calls under way survive an
upgrade. `RECORD_HISTORIES=1 scripts/test tests/e2e/test_replay.py` records anew, a deliberate act that belongs to a
release.
"""

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

from examples.payments.orders import OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from handler.delivery.workflow import DeliveryWorkflow
from handler.sweep.workflow import SweepWorkflow
from scripts.environment.server import Server
from tests.support.callers import CALLERS, CallPlan
from tests.support.helpers import assert_eventually
from tests.support.targets import TARGETS, Ask
from tests.support.world import events, running_world

HISTORIES = Path(__file__).parent / "histories"
VERSION = "0.1"

RECORDED = sorted(HISTORIES.glob("*/*.json"))


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name} {path.stem}")
async def test_a_recorded_history_replays(path: Path) -> None:
    """The code issues the same commands in the same order, without plugins, settings or keys."""
    own = [DeliveryWorkflow, SweepWorkflow]
    replayer = Replayer(workflows=[OrderWorkflow, PaymentWorkflow, *CALLERS, *TARGETS, *own])
    await replayer.replay_workflow(WorkflowHistory.from_json(path.stem, path.read_text()))


@pytest.mark.skipif("RECORD_HISTORIES" in os.environ, reason="they are being recorded")
def test_every_released_version_has_histories() -> None:
    """With an empty folder the test above would check nothing."""
    assert {path.stem for path in RECORDED} >= {"call-success", "call-failure", "target-canceled", "delivery"}


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

        async def unavailable(_: web.Request) -> web.StreamResponse:
            return web.Response(status=503)

        world.receiver.before = unavailable
        ask = Ask(key=world.key(), text="delivered")
        handle = await world.call(ask)
        target = await world.until_started(ask)
        await target.result()
        described = await target.describe()
        request_id = (await described.memo())["bridge"]["request_id"]
        delivery = world.handler_client.get_workflow_handle(f"bridge-delivery-{request_id}-{described.run_id}")

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
