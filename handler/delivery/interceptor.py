"""The interceptor that `HandlerPlugin` adds to a worker, so that a target's callers get its outcome.

The path of an outcome:

1. The handler service starts the target. The memo field `bridge` names the caller and the callback URL.
2. The target runs as it would without the plugin, and makes the same history.
3. Its worker closes it. The close reporter (`close_reporter.py`) notices every way of closing.
4. The dispatcher (`dispatcher.py`) reads the run's last event. It drops a run that is open or continues as another run.
5. It POSTs the outcome to the callback URL, signed for the caller. The receiver completes the waiting activity.
6. If the delivery fails, a delivery workflow (`workflow.py`) repeats it. People can list these workflows.
7. If the process is killed first, the caller's next renewal or the sweep (`handler/sweep/`) finds the outcome.

Inside a run it receives the signal that attaches a further call, because otherwise a target's own dynamic handler would
receive it. If the `caller_close_policy` of an operation is "request_cancel", it watches the callers.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from temporalio import worker, workflow
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.workflow.targets import Targets
from handler.delivery.caller_close_policy import MAX_WATCHED, cancel_when_abandoned
from handler.delivery.close_reporter import CloseReporter
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_HEADER, MEMO_KEY, CallMemo

_LOOK_S = 1.0


class DeliveryInterceptor(worker.Interceptor):
    """Delivery for the targets of one worker."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher, self._reporter = dispatcher, CloseReporter(dispatcher.notice)

    def configure(self, config: worker.WorkerConfig) -> None:
        """Put the interceptor and its runners on a worker."""
        config["interceptors"] = [*config.get("interceptors", ()), self]
        config["workflow_runner"] = self._reporter.around(config.get("workflow_runner") or SandboxedWorkflowRunner())
        config["unsandboxed_workflow_runner"] = self._reporter.around(config["unsandboxed_workflow_runner"])

    def workflow_interceptor_class(
        self,
        input: worker.WorkflowInterceptorClassInput,  # noqa: A002, ARG002
    ) -> type[worker.WorkflowInboundInterceptor]:
        """Return the part of the interceptor that runs inside workflows."""
        return _Inbound

    @contextlib.asynccontextmanager
    async def delivering(self, running: worker.Worker) -> AsyncIterator[None]:
        """Deliver while the worker is *running*, and afterwards finish the deliveries of the runs that it has closed.

        Raises:
            RuntimeError: Another plugin has replaced the runner, so that no closing would be noticed.
        """
        self._check(running.config(active_config=True).get("workflows", ()))
        self._dispatcher.start(running)
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


class _Inbound(worker.WorkflowInboundInterceptor):
    def init(self, outbound: worker.WorkflowOutboundInterceptor) -> None:
        """Handle the attach signal from here on, because a signal may be accepted before the first workflow task."""
        self._watched: dict[tuple[str, str], CallMemo] = {}
        super().init(outbound)
        workflow.set_signal_handler(ATTACH_SIGNAL, self._attach)

    def _attach(self, *arguments: Any) -> None:
        # Accept arguments of any number and form: an exception here would fail the workflow task for ever. A team's
        # converter may return any mapping or object for a value without a type hint.
        with contextlib.suppress(TypeError, ValueError):
            value = arguments[0] if arguments else {}
            found = value if isinstance(value, Mapping) else vars(value)
            call = CallMemo(**{name: found[name] for name in CallMemo.__dataclass_fields__ if name in found})
            if len(self._watched) < MAX_WATCHED:
                self._watched.setdefault(call.identity, call)

    async def execute_workflow(self, input: worker.ExecuteWorkflowInput) -> Any:  # noqa: A002
        own = _own_call()
        # Callers must not cancel a run that no call started. A retried run does not know the calls that were attached
        # to the failed run, and some of them may wait.
        is_retried = workflow.info().attempt > 1
        if own is not None and own.caller_close_policy == "request_cancel" and not is_retried:
            for name, payload in workflow.info().headers.items():
                if name.startswith(ATTACHED_HEADER):
                    # The call was attached to a run that this run continues.
                    with contextlib.suppress(Exception):
                        self._attach(workflow.payload_converter().from_payload(payload, CallMemo))
            self._watched = {own.identity: own, **self._watched}
            # Keep a reference, because the loop has only a weak one. The task ends with the run.
            self._watching = asyncio.create_task(cancel_when_abandoned(self._watched))
        return await super().execute_workflow(input)


def _own_call() -> CallMemo | None:
    """Return the call that started this run; None if no call did, or if the memo field is not of a call of this run.

    A delivery workflow has a record of its own in the field. The dispatcher reports what another program wrote.
    """
    if MEMO_KEY not in workflow.info().raw_memo:
        return None
    try:
        call = workflow.memo_value(MEMO_KEY, type_hint=CallMemo)
        return call if call.is_of(workflow.info().workflow_id) else None
    except Exception:  # noqa: BLE001 - any error that the converter raises on a foreign value
        return None
