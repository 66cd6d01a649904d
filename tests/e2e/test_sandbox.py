"""Workflow code may import the workflow-safe modules: proven inside the sandbox of a running worker."""

import sys

from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.temporal.worker_plugin import WORKFLOW_SAFE_MODULES
from tests.support.sandboxed import ImportingWorkflow
from tests.support.world import World

FORBIDDEN = ("aiohttp", "itsdangerous", "tenacity")


async def test_every_workflow_safe_module_is_imported_inside_the_sandbox(world: World) -> None:
    """The sandbox imports each module itself, without passing it through; no import does I/O."""
    async with Worker(
        world.caller_client,
        task_queue=f"sandbox-{world.id}",
        workflows=[ImportingWorkflow],
        workflow_runner=SandboxedWorkflowRunner(),
    ):
        found = await world.caller_client.execute_workflow(
            ImportingWorkflow.run, id=f"sandbox-{world.id}", task_queue=f"sandbox-{world.id}"
        )
    for name in WORKFLOW_SAFE_MODULES:
        assert found[name] != id(sys.modules[name]), f"{name} was not imported inside the sandbox"
    assert not [name for name in found if name.partition(".")[0] in FORBIDDEN]
