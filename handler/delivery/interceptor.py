"""The small interceptor: what `HandlerPlugin` puts on a worker, so that a target's callers hear how it closed.

The way of an outcome:

1. The handler service starts the target. One memo field names the call: who waits, and the callback URL.
2. The target runs as it would without the plugin, and makes the same history.
3. Its worker closes it. The close reporter (`close_reporter.py`) notices that, however it happens.
4. The dispatcher (`dispatcher.py`) reads the run's last event. It drops a run that is open or goes on as another.
5. It POSTs what the event says to the callback URL, signed for the caller. The receiver completes the waiting activity.
6. What could not be delivered goes to a delivery workflow (`workflow.py`), which repeats it and can be listed.
7. What a killed process left undelivered is found by the caller's next renewal, or by the sweep (`handler/sweep/`).

Inside a run the interceptor does two small things: it takes the signal that attaches a further call, because a target's
own dynamic handler would see it otherwise, and it watches the callers of an operation whose `caller_close_policy` is
"request_cancel".
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

from temporalio import workflow
from temporalio.worker import (
    ExecuteWorkflowInput,
    Interceptor,
    Worker,
    WorkerConfig,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.workflow.targets import Targets
from handler.delivery.close_reporter import CloseReporter
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY, CallMemo
from handler.delivery.workflow import (
    ATTEMPT_TIMEOUT,
    CANCEL_ABANDONED_ACTIVITY,
    RETRY_POLICY,
    WATCH_CALLERS_ACTIVITY,
    WATCH_TIMEOUT,
)

MAX_WATCHED = 500
"""Calls that one run watches: their records must fit one payload."""
_LOOK_S = 1.0


class DeliveryInterceptor(Interceptor):
    """Delivery for the targets of one worker."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher, self._reporter = dispatcher, CloseReporter(dispatcher.notice)

    def configure(self, config: WorkerConfig) -> None:
        """Put the interceptor and its runners on a worker."""
        config["interceptors"] = [*config.get("interceptors", ()), self]
        config["workflow_runner"] = self._reporter.around(config.get("workflow_runner") or SandboxedWorkflowRunner())
        config["unsandboxed_workflow_runner"] = self._reporter.around(config["unsandboxed_workflow_runner"])

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002, ARG002
    ) -> type[WorkflowInboundInterceptor]:
        return _Inbound

    @contextlib.asynccontextmanager
    async def delivering(self, worker: Worker) -> AsyncIterator[None]:
        """Deliver while *worker* runs, and finish what it has closed.

        Raises:
            RuntimeError: Another plugin has replaced the runner, so that nothing would be noticed.
        """
        self._check(worker.config(active_config=True).get("workflows", ()))
        self._dispatcher.start(worker)
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            self._reporter.report_overdue(older_than_s=0)
            await self._dispatcher.drain()

    def _check(self, workflows: Iterable[type]) -> None:
        for target in Targets(workflows):
            if target.workflow_type not in self._reporter.prepared:
                message = (
                    f"{target.workflow_type} runs outside HandlerPlugin's runner, so that its outcomes would not be "
                    "delivered: another plugin sets a workflow runner of its own. Give HandlerPlugin after it."
                )
                raise RuntimeError(message)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            self._reporter.report_overdue()


class _Inbound(WorkflowInboundInterceptor):
    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        """Take the attach signal: here, because a signal may be accepted before the first workflow task."""
        self._watched: dict[str, CallMemo] = {}
        super().init(outbound)
        workflow.set_signal_handler(ATTACH_SIGNAL, self._attach)

    def _attach(self, *arguments: Any) -> None:
        # Of any number and form: an exception here would fail the workflow task for ever.
        with contextlib.suppress(TypeError):
            call = CallMemo(**arguments[0]) if arguments else None
            if call is not None and len(self._watched) < MAX_WATCHED:
                self._watched.setdefault(call.request_id, call)

    async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:  # noqa: A002
        own = _own_call()
        # A run that was started by hand is not the callers' to cancel.
        if own is not None and own.caller_close_policy == "request_cancel":
            self._watched = {own.request_id: own, **self._watched}
            # Held, or the loop might forget it. It ends with the run.
            self._watching = asyncio.create_task(self._cancel_when_abandoned())
        return await super().execute_workflow(input)

    async def _cancel_when_abandoned(self) -> None:
        """Ask our own run to cancel once none of its calls waits any more, those attached meanwhile included."""
        seen: list[CallMemo] = []
        while len(seen) < len(self._watched):
            seen = list(self._watched.values())
            await workflow.execute_activity(
                WATCH_CALLERS_ACTIVITY,
                args=[seen],
                start_to_close_timeout=WATCH_TIMEOUT,
                retry_policy=RETRY_POLICY,
                cancellation_type=workflow.ActivityCancellationType.ABANDON,
                summary="does any caller wait?",
            )
        await workflow.execute_activity(
            CANCEL_ABANDONED_ACTIVITY, start_to_close_timeout=ATTEMPT_TIMEOUT, summary="no caller waits"
        )


def _own_call() -> CallMemo | None:
    """The call that started this run; None if no call did, or if the memo under our name is not ours."""
    if MEMO_KEY not in workflow.info().raw_memo:
        return None
    try:
        return workflow.memo_value(MEMO_KEY, type_hint=CallMemo)
    except Exception as error:  # noqa: BLE001 - any error that the converter raises on a foreign value
        workflow.logger.warning("bridge.memo_unreadable", extra={"bridge.error": type(error).__name__})
        return None
