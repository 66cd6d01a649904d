"""Protects the bridge's activities from the team's interceptors, whichever there are and in any order.

A team's interceptors may map errors, retry, time out or set options for all activities. They still see the bridge's
activities, but the server receives what these activities decide. Interceptors of the *client* wrap this one. They act
after an attempt of the waiting activity has sent its report. Therefore they cannot change the report.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from temporalio import activity, worker, workflow

from bridge.workflow.own_activity import STARTING

_TIMEOUTS = ("schedule_to_close_timeout", "schedule_to_start_timeout", "start_to_close_timeout", "heartbeat_timeout")
_NEUTRAL = dict.fromkeys((*_TIMEOUTS, "activity_id", "task_queue", "local_retry_threshold", "arg_types"))
"""Options that one of the bridge's activities leaves unset, by field names of the inputs."""


class ActivityGuard(worker.Interceptor):
    """Put it first in a worker's list: outermost around an activity, and last before a workflow's command."""

    def __init__(self, *own: str) -> None:
        """*own* are the activity types of the bridge on this worker."""
        self._own = frozenset(own)

    def intercept_activity(self, next: worker.ActivityInboundInterceptor) -> worker.ActivityInboundInterceptor:  # noqa: A002
        """Guard our activities from the interceptors after this one."""
        return _InboundGuard(next, self._own)

    def workflow_interceptor_class(
        self,
        input: worker.WorkflowInterceptorClassInput,  # noqa: A002, ARG002
    ) -> type[worker.WorkflowInboundInterceptor] | None:
        """Guard our commands."""
        return WorkflowGuard


class _InboundGuard(worker.ActivityInboundInterceptor):
    def __init__(self, next: worker.ActivityInboundInterceptor, own: frozenset[str]) -> None:  # noqa: A002
        super().__init__(next)
        self._own = own

    async def execute_activity(self, input: worker.ExecuteActivityInput) -> Any:  # noqa: A002
        """Run an activity of ours once and to its end, also if an interceptor in between retries or abandons it."""
        if activity.info().activity_type not in self._own:
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


class WorkflowGuard(worker.WorkflowInboundInterceptor):
    """The part inside a workflow."""

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
