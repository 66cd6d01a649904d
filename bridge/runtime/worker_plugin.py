"""What both plugins do to a worker: one HTTP session for its life, and a sandbox that shares our modules."""

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from temporalio.plugin import SimplePlugin
from temporalio.worker import Worker, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.runtime.http_client import HttpClient

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
"""Deterministic and free of I/O: workflow code may import them."""


class SessionPlugin(SimplePlugin):
    """Base of the two plugins. One instance may serve several workers of a process."""

    def __init__(self, name: str, *, user_agent: str, workflows: Sequence[type] = ()) -> None:
        super().__init__(name, workflows=workflows, workflow_runner=_share_modules)
        self.http = HttpClient(user_agent=user_agent)
        self._running = 0

    async def before_close(self) -> None:
        """Called when the last worker has ended, while the session is still open."""

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run the worker; the last one closes the session, after all that uses it has ended."""
        self._running += 1
        try:
            await next(worker)
        finally:
            self._running -= 1
            if self._running == 0:
                await self.before_close()
                await self.http.close()


def _share_modules(runner: WorkflowRunner | None) -> WorkflowRunner:
    """Let the sandbox share the workflow-safe modules instead of importing them again for every run."""
    if runner is None:
        runner = SandboxedWorkflowRunner()
    if not isinstance(runner, SandboxedWorkflowRunner):
        return runner
    restrictions = runner.restrictions.with_passthrough_modules(*WORKFLOW_SAFE_MODULES)
    return dataclasses.replace(runner, restrictions=restrictions)
