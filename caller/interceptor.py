"""What the caller's plugin adds around activities and inside workflows."""

import asyncio
import contextlib
import math
from typing import Any

from temporalio import worker, workflow
from temporalio.service import RPCError

from bridge.temporal.activity_guard import ActivityGuard, WorkflowGuard
from bridge.temporal.connection import describe_namespace
from bridge.workflow.call import (
    CALL_ENDED,
    CANCEL_OPERATIONS_ACTIVITY,
    COUNT_CALL,
    LIMIT_INPUT,
    MAX_INPUT_BYTES,
    START_OPERATION_ACTIVITY,
)
from caller.reports.calls import Calls
from caller.settings import CallerSettings
from caller.waiting.waiting_activity import OperationActivities

_METADATA_QUERY = "__temporal_workflow_metadata"
_DESCRIBE_CALLS = "bridge.describe_calls"
_DEFAULT_LIMIT = 2 * 1024 * 1024
_READ_S = 1.0
"""Limit for reading a run's calls. The SDK considers a workflow task stuck after 2 seconds."""


class CallerInterceptor(ActivityGuard):
    """Guards the caller's activities and commands, and describes calls. Put it first in a worker's list."""

    def __init__(self, activities: OperationActivities, *, settings: CallerSettings | None) -> None:
        super().__init__(START_OPERATION_ACTIVITY, CANCEL_OPERATIONS_ACTIVITY)
        self._activities = activities
        self._settings = settings
        self._serving: tuple[worker.Worker, asyncio.AbstractEventLoop] | None = None
        self._max_input_bytes = math.inf

    async def serve(self, running: worker.Worker) -> None:
        """From now on describe calls with the present client of *running*, in the running event loop.

        Read the namespace's limit for one value, if its server names one below the default. A workflow task with a
        larger input would fail again and again. A part of the limit is for the record of the call, as by default.
        """
        self._serving = running, asyncio.get_running_loop()
        with contextlib.suppress(RPCError):
            named = (await describe_namespace(running.client)).namespace_info.limits.blob_size_limit_error
            if 0 < named < _DEFAULT_LIMIT:
                self._max_input_bytes = named * MAX_INPUT_BYTES // _DEFAULT_LIMIT

    def _describe_calls(self, workflow_id: str, run_id: str) -> str:
        """Return Markdown about the calls of a run. Called in a workflow's thread, and only to answer a query."""
        if self._serving is None:
            return ""
        running, loop = self._serving
        details = Calls(client=running.client, settings=self._settings).details(workflow_id, run_id)
        reading = asyncio.run_coroutine_threadsafe(details, loop)
        try:
            return reading.result(_READ_S)
        except Exception:  # noqa: BLE001 - these details are optional: any error only leaves them out
            reading.cancel()
            return ""

    def workflow_interceptor_class(
        self,
        input: worker.WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[worker.WorkflowInboundInterceptor] | None:
        """Guard our commands, and add a function that workflow code can call from inside the sandbox."""
        input.unsafe_extern_functions[CALL_ENDED] = self._activities.forget
        input.unsafe_extern_functions[COUNT_CALL] = self._activities.count
        input.unsafe_extern_functions[LIMIT_INPUT] = lambda: self._max_input_bytes
        input.unsafe_extern_functions[_DESCRIBE_CALLS] = self._describe_calls
        return _CallerWorkflow


class _CallerWorkflow(WorkflowGuard):
    async def handle_query(self, input: worker.HandleQueryInput) -> Any:  # noqa: A002
        """Show the calls and their targets as the current details of a workflow whose author sets none.

        Temporal's UI queries the details, also of a closed run. Workflow code cannot provide them, because a completion
        gives it only the result. They are read from history when they are queried, and nothing is recorded.
        """
        answer = await super().handle_query(input)
        if input.query == _METADATA_QUERY and not answer.current_details:
            info, describe = workflow.info(), workflow.extern_functions().get(_DESCRIBE_CALLS)
            answer.current_details = describe(info.workflow_id, info.run_id) if describe is not None else ""
        return answer
