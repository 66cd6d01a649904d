"""The plugin does not change a target's history: it is the same without the plugin, and replays without it."""

import contextlib
import gc
import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from google.protobuf.json_format import MessageToDict
from temporalio.client import Client, WorkflowContinuedAsNewError, WorkflowFailureError, WorkflowHandle, WorkflowHistory
from temporalio.common import RetryPolicy, VersioningBehavior, WorkerDeploymentVersion
from temporalio.worker import Replayer, Worker, WorkerDeploymentConfig

from handler.delivery.records import MEMO_KEY, CallMemo, packed_reply
from handler.plugin import HandlerPlugin
from tests.support.callers import CallPlan
from tests.support.cases import Case, CaseChild, CaseWorkflow, double
from tests.support.helpers import CALLER, assert_eventually, make_current
from tests.support.targets import Ask, PinnedWorkflow, Reply
from tests.support.world import World

CASES = [
    "returns",
    "fails",
    "retries",
    "is canceled",
    "fails in a handler",
    "fails in init",
    "is updated",
    "is signalled",
    "continues as new",
    "runs activities and a timer",
    "runs a child",
    "runs by cron",
]


async def run_case(client: Client, behaviour: str, worker: Worker, memo: CallMemo) -> list[WorkflowHistory]:
    """Return the histories of all runs of one case."""
    async with worker:
        handle: WorkflowHandle[Any, Any] = await client.start_workflow(
            CaseWorkflow.run,
            Case(behaviour),
            id=f"case-{uuid.uuid4().hex[:8]}",
            task_queue=worker.task_queue,
            memo={MEMO_KEY: memo},
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=50), maximum_attempts=2)
            if behaviour == "retries"
            else None,
            cron_schedule="@every 1s" if behaviour == "runs by cron" else "",
        )

        async def started() -> None:
            assert len((await handle.fetch_history()).events) >= 4

        if behaviour not in {"retries", "runs by cron", "continues as new"}:
            await assert_eventually(started)
        match behaviour:
            case "is canceled":
                await handle.cancel()
            case "fails in a handler":
                await handle.signal("say", "fail")
            case "is updated":
                await handle.execute_update("change", "updated")
            case "is signalled":
                await handle.signal("say", "signalled")
            case _:
                pass
        with contextlib.suppress(WorkflowFailureError, WorkflowContinuedAsNewError):
            await handle.result(follow_runs=behaviour != "runs by cron")
        if behaviour == "runs by cron":
            # Only the run that has ended: the next run is stopped at some moment.
            return [await client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id).fetch_history()]
        return [await handle.fetch_history()] + (
            [await client.get_workflow_handle(handle.id, run_id=handle.first_execution_run_id).fetch_history()]
            if behaviour in {"retries", "continues as new"}
            else []
        )


_VARIES = re.compile(
    r"(eventId|EventId|RequestId|requestId|RunId|runId|Time|identity|taskId|workflowId|WorkflowId|binaryChecksum|stackTrace"
    r"|taskQueue|historySizeBytes|workerVersion|version|coreUsedFlags|protocolInstanceId|MessageId|updateId|firstWorkflowTaskBackoff)$"
)
"""Attributes that differ between any two runs."""


def attributes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return every attribute of an event, except ids and times, by its path."""
    if isinstance(value, dict):
        for name, each in value.items():
            # A local activity's marker has times in JSON.
            if not _VARIES.search(name) and name != "markerRecordedEventAttributes":
                yield from attributes(each, f"{path}.{name}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from attributes(each, f"{path}.{index}")
    else:
        yield path, value


def comparable(histories: Sequence[WorkflowHistory]) -> list[tuple[str, Any]]:
    return list(attributes([[MessageToDict(event) for event in each.events] for each in histories]))


def a_call() -> CallMemo:
    return CallMemo(
        caller=CALLER,
        request_id=uuid.uuid4().hex,
        input_hash="",
        service="CaseService",
        operation="case",
        reply=packed_reply(operation_token="t", callback_url="http://127.0.0.1:1/callbacks/x?sig=1"),
        deadline_ms=0,
    )


@pytest.mark.parametrize("behaviour", CASES)
async def test_a_target_makes_the_same_history_with_and_without_the_plugin(world: World, behaviour: str) -> None:
    """The events and their attributes are the same. Each history replays without plugin, settings or keys."""
    client, call, found = world.handler_client, a_call(), []
    for plugins in ([], [HandlerPlugin(world.handler_settings)]):
        worker = Worker(
            client,
            task_queue=f"cases-{uuid.uuid4().hex[:8]}",
            workflows=[CaseWorkflow, CaseChild],
            activities=[double],
            plugins=plugins,
        )
        found.append(await run_case(client, behaviour, worker, call))
    without, with_plugin = map(comparable, found)
    assert [each for each in with_plugin if each not in without] == []
    assert with_plugin == without
    replayer = Replayer(workflows=[CaseWorkflow, CaseChild])
    for history in (each for histories in found for each in histories):
        await replayer.replay_workflow(history)
    gc.collect()


async def test_versioned_workers_deliver_and_a_new_version_takes_over_deliveries_and_sweep(world: World) -> None:
    """The worker pins workflows by default. The bridge's own are AUTO_UPGRADE, so that version 1 does not keep them."""
    await world.stop_worker("handler")

    def versioned(build_id: str) -> Worker:
        version = WorkerDeploymentVersion(deployment_name=f"payments-{world.id}", build_id=build_id)
        return Worker(
            world.handler_client,
            task_queue=world.payment_queue,
            workflows=[PinnedWorkflow],
            plugins=[HandlerPlugin(world.handler_settings)],
            deployment_config=WorkerDeploymentConfig(
                version=version,
                use_worker_versioning=True,
                default_versioning_behavior=VersioningBehavior.PINNED,
            ),
        )

    async def unavailable(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    settings = world.handler_settings.model_copy(update={"sweep_interval_s": 0.2})
    world.targets = [PinnedWorkflow]
    world.override_handler_settings(settings)
    await world.service.stop()
    await world.service.start()
    world.receiver.before = unavailable
    async with versioned("1"):
        await make_current(world.handler_client, WorkerDeploymentVersion(f"payments-{world.id}", "1"))
        await world.start_sweep()
        ask = Ask(key=world.key(), text="of version 1")
        handle = await world.call(ask, CallPlan(first_lease=600, operation="pinned"))
        target = await world.until_started(ask)
        await target.result()
        [sweep] = world.sweeps

        async def swept_and_handed_over() -> None:
            assert 503 in await world.receiver.answered()
            activity = await world.pending(sweep)
            assert activity is not None
            assert activity.attempt > 2

        await assert_eventually(swept_and_handed_over)
    async with versioned("2"):
        await make_current(world.handler_client, WorkerDeploymentVersion(f"payments-{world.id}", "2"))
        world.receiver.before = None
        assert await handle.result() == Reply("of version 1")
        before = (await world.pending(sweep)).attempt

        async def swept() -> None:
            assert (await world.pending(sweep)).attempt > before

        await assert_eventually(swept)
        await sweep.terminate()
