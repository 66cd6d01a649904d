"""SDK behaviour on which the close reporter relies: the activation messages come from a module that is not stable."""

import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.bridge.proto.workflow_activation import RemoveFromCache, WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.client import WorkflowHandle
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowInstance, WorkflowInstanceDetails

from tests.support.helpers import assert_eventually
from tests.support.world import World


@dataclass
class Seen:
    """The activations and completions of one run's instance, in order."""

    steps: list[tuple[str, bool]] = field(default_factory=list)
    """The commands of a completion or the reason of an eviction, and whether the activation was a replay."""


class RecordingRunner(UnsandboxedWorkflowRunner):
    def __init__(self) -> None:
        self.seen = Seen()

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        instance = super().create_instance(det)
        inner = instance.activate

        def activate(act: WorkflowActivation) -> WorkflowActivationCompletion:
            completion = inner(act)
            evictions = [job.remove_from_cache.reason for job in act.jobs if job.HasField("remove_from_cache")]
            commands = [each.WhichOneof("variant") or "" for each in completion.successful.commands]
            names = [RemoveFromCache.EvictionReason.Name(each) for each in evictions] or commands
            self.seen.steps += [(name, act.is_replaying) for name in names]
            return completion

        instance.activate = activate  # type: ignore[method-assign] # as the reporter does
        return instance


@workflow.defn(name="Canary", sandboxed=False)
class Canary:
    @workflow.signal
    def nothing(self) -> None: ...

    @workflow.query
    def asked(self) -> str:
        return "asked"

    @workflow.run
    async def run(self) -> str:
        return "done"


@workflow.defn(name="Canary", sandboxed=False, failure_exception_types=[workflow.NondeterminismError])
class ChangedCanary:
    @workflow.run
    async def run(self) -> str:
        await workflow.sleep(timedelta(hours=1))
        return "changed"


@workflow.defn(name="Canary", sandboxed=False)
class TimedCanary:
    @workflow.signal
    def nothing(self) -> None: ...

    @workflow.run
    async def run(self) -> str:
        await workflow.execute_activity("none", start_to_close_timeout=timedelta(hours=1))
        return "never"


def worker(world: World, queue: str, kind: type) -> tuple[Worker, Seen]:
    runner = RecordingRunner()
    made = Worker(world.handler_client, task_queue=queue, workflows=[kind], unsandboxed_workflow_runner=runner)
    return made, runner.seen


async def test_a_closing_is_seen_and_its_eviction_shows_that_it_was_accepted(world: World) -> None:
    """A query of the closed run is a replay, and its eviction has the same reason."""
    queue = f"canary-{uuid.uuid4().hex[:8]}"
    made, seen = worker(world, queue, Canary)
    async with made:
        handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
            "Canary", id=f"canary-{uuid.uuid4().hex[:8]}", task_queue=queue
        )
        await handle.result()

        async def evicted() -> None:
            assert [name for name, _ in seen.steps] == ["complete_workflow_execution", "WORKFLOW_EXECUTION_ENDING"]

        await assert_eventually(evicted)
        assert seen.steps[0] == ("complete_workflow_execution", False)
        seen.steps.clear()
        assert await handle.query("asked") == "asked"

        async def replayed() -> None:
            names = [name for name, _ in seen.steps]
            assert names[-1] == "WORKFLOW_EXECUTION_ENDING"
            assert ("complete_workflow_execution", False) not in seen.steps

        await assert_eventually(replayed)


async def test_a_run_that_nondeterminism_fails_is_evicted_for_that_reason(world: World) -> None:
    """The SDK's core closes it without an activation."""
    queue = f"canary-{uuid.uuid4().hex[:8]}"
    made, _ = worker(world, queue, TimedCanary)
    async with made:
        handle: WorkflowHandle[Any, Any] = await world.handler_client.start_workflow(
            "Canary", id=f"canary-{uuid.uuid4().hex[:8]}", task_queue=queue
        )

        async def scheduled() -> None:
            events = (await handle.fetch_history()).events
            assert EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED in [each.event_type for each in events]

        await assert_eventually(scheduled)
    made, seen = worker(world, queue, ChangedCanary)
    async with made:
        await handle.signal("nothing")

        async def failed() -> None:
            events = (await handle.fetch_history()).events
            assert events[-1].event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED
            assert "NONDETERMINISM" in [name for name, _ in seen.steps]

        await assert_eventually(failed, within=40)
