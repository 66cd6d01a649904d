"""Protects the bridge's activities from the team's interceptors, whichever there are and in any order.

A team's interceptors may map errors, retry, time out or set options for all activities. They still see the bridge's
activities, but the server receives what these activities decide. Interceptors of the *client* wrap this one. They act
after the activity has sent its report, and therefore they cannot change the report.
"""

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from temporalio import activity, worker, workflow
from temporalio.service import RPCError

from bridge.runtime.temporal import describe_namespace
from bridge.workflow.call import CALL_ENDED, COUNT_CALL, LIMIT_INPUT, MAX_INPUT_BYTES, OWN_ACTIVITIES
from bridge.workflow.own_activity import STARTING
from caller.calls import Calls
from caller.waiting_activity import OperationActivities

_UNSET = ("task_queue", "schedule_to_start_timeout", "start_to_close_timeout", "heartbeat_timeout")
_NEUTRAL = dict.fromkeys((*_UNSET, "local_retry_threshold", "arg_types"))
"""Options that one of the bridge's activities leaves unset, by field names of the inputs."""


_METADATA_QUERY = "__temporal_workflow_metadata"
_DESCRIBE_CALLS = "bridge.describe_calls"
_DEFAULT_LIMIT = 2 * 1024 * 1024
_READ_S = 1.0
"""Limit for reading a run's calls. The SDK considers a workflow task stuck after 2 seconds."""


class CallerInterceptor(worker.Interceptor):
    """Put it first in a worker's list: outermost around an activity, and last before a workflow's command."""

    def __init__(self, activities: OperationActivities, *, ui_url: Callable[[str], str | None]) -> None:
        """*ui_url* returns the base URL of the UI of the handler behind an endpoint, None if it is unknown."""
        self._activities = activities
        self._ui_url = ui_url
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
        details = Calls(client=running.client, ui_url=self._ui_url).details(workflow_id, run_id)
        reading = asyncio.run_coroutine_threadsafe(details, loop)
        try:
            return reading.result(_READ_S)
        except Exception:  # noqa: BLE001 - these details are optional: any error only leaves them out
            reading.cancel()
            return ""

    def intercept_activity(self, next: worker.ActivityInboundInterceptor) -> worker.ActivityInboundInterceptor:  # noqa: A002
        """Guard our activities from the interceptors after this one."""
        return _ActivityGuard(next)

    def workflow_interceptor_class(
        self,
        input: worker.WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[worker.WorkflowInboundInterceptor] | None:
        """Guard our commands, and add a function that workflow code can call from inside the sandbox."""
        input.unsafe_extern_functions[CALL_ENDED] = self._activities.forget
        input.unsafe_extern_functions[COUNT_CALL] = self._activities.count
        input.unsafe_extern_functions[LIMIT_INPUT] = lambda: self._max_input_bytes
        input.unsafe_extern_functions[_DESCRIBE_CALLS] = self._describe_calls
        return _WorkflowGuard


class _ActivityGuard(worker.ActivityInboundInterceptor):
    async def execute_activity(self, input: worker.ExecuteActivityInput) -> Any:  # noqa: A002
        """Run an activity of ours once and to its end, also if an interceptor in between retries or abandons it."""
        if activity.info().activity_type not in OWN_ACTIVITIES:
            return await self.next.execute_activity(input)
        begun: list[asyncio.Task[Any]] = []

        async def run(*_: object) -> Any:
            if not begun:
                # Created here, so that the task has the context (for example a trace) that the interceptors set.
                begun.append(asyncio.create_task(input.fn(*input.args)))
            return await asyncio.shield(begun[0])

        # Ignore what the interceptors raise or return. The result of the attempt is read below.
        with contextlib.suppress(BaseException):
            await self.next.execute_activity(dataclasses.replace(input, fn=run))
        current = asyncio.current_task()
        is_asked_to_end = activity.is_cancelled() or activity.is_worker_shutdown()
        # An interceptor of the client that times out cancels this task too, and must not end the attempt.
        if is_asked_to_end and current is not None and current.cancelling():
            for attempt in begun:
                attempt.cancel()
            raise asyncio.CancelledError
        return await (begun[0] if begun else input.fn(*input.args))


class _WorkflowGuard(worker.WorkflowInboundInterceptor):
    def init(self, outbound: worker.WorkflowOutboundInterceptor) -> None:
        """Put our guard at the end of the chain, after the interceptors of the client too."""
        last, before = outbound, None
        while isinstance(following := getattr(last, "next", None), worker.WorkflowOutboundInterceptor):
            before, last = last, following
        guard = _CommandGuard(last)
        if before is None:
            outbound = guard
        else:
            before.next = guard
        super().init(outbound)

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


class _CommandGuard(worker.WorkflowOutboundInterceptor):
    def start_activity(self, input: worker.StartActivityInput) -> workflow.ActivityHandle[Any]:  # noqa: A002
        return _restored(input, self.next.start_activity)

    def start_local_activity(self, input: worker.StartLocalActivityInput) -> workflow.ActivityHandle[Any]:  # noqa: A002
        return _restored(input, self.next.start_local_activity)


def _restored(
    input: Any,  # noqa: A002
    start: Callable[[Any], workflow.ActivityHandle[Any]],
) -> workflow.ActivityHandle[Any]:
    """Start the activity of *input*. An activity of ours keeps the options that the bridge's code gave."""
    own = STARTING.get()
    if own is None or input.activity != own.activity:
        return start(input)
    names = {each.name for each in dataclasses.fields(input)}
    options = {name: value for name, value in {**_NEUTRAL, **own.options}.items() if name in names}
    own.handle = start(dataclasses.replace(input, **options))
    return own.handle
