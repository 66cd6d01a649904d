"""The parts of both worker plugins: one HTTP session for the worker's life, and a sandbox that shares our modules."""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from temporalio.plugin import SimplePlugin
from temporalio.worker import Worker, WorkerConfig, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.http.client import HttpClient

WORKFLOW_SAFE_MODULES = (
    "bridge",
    "bridge.workflow.call",
    "bridge.workflow.targets",
    "bridge.workflow.progress",
    "bridge.workflow.client",
    "bridge.workflow.pending_call",
    "bridge.workflow.run_calls",
    "bridge.workflow.own_activity",
)
"""Modules that are deterministic and do no I/O. Workflow code may import them."""


class SessionPlugin(SimplePlugin):
    """Base of the two plugins. One instance may serve several workers of a process."""

    def __init__(self, name: str, *, workflows: Sequence[type] = ()) -> None:
        super().__init__(name, workflows=workflows, workflow_runner=share_modules)
        self.http = HttpClient()
        self._running = 0

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add the plugin's name to the worker's identity, which Temporal shows for every poller of a task queue."""
        config = super().configure_worker(config)
        identity = config.get("identity") or config["client"].identity
        # A plugin that is on the worker and on its client configures the worker twice.
        config["identity"] = identity if self.name() in identity else f"{identity} {self.name()}"
        return config

    async def before_close(self) -> None:
        """Do nothing. Subclasses override it to use the session once more after the last worker has ended."""

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run the worker. When the last worker of this plugin has ended, close the session."""
        self._running += 1
        try:
            await next(worker)
        finally:
            self._running -= 1
            if self._running == 0:
                await self.before_close()
                await self.http.aclose()


def share_modules(runner: WorkflowRunner | None) -> WorkflowRunner:
    """A runner whose sandbox shares the workflow-safe modules instead of importing them again for every run."""
    if runner is None:
        runner = SandboxedWorkflowRunner()
    if not isinstance(runner, SandboxedWorkflowRunner):
        return runner
    restrictions = runner.restrictions.with_passthrough_modules(*WORKFLOW_SAFE_MODULES)
    return dataclasses.replace(runner, restrictions=restrictions)
