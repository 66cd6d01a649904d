"""One attempt of the waiting activity: its times by the server's clock, and what it reports.

The attempt sends every report by task token and then ends as "completes asynchronously". An interceptor of the team
therefore sees no exception that it could map, retry or report, and the server records what the attempt decided. If a
report fails, the attempt ends by its start-to-close timeout, and the next attempt begins.
"""

import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.enums.v1 import ApplicationErrorCategory
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import (
    RecordActivityTaskHeartbeatRequest,
    RespondActivityTaskCompletedRequest,
    RespondActivityTaskFailedRequest,
)
from temporalio.converter import ActivitySerializationContext, DataConverter
from temporalio.exceptions import ApplicationError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from bridge.runtime.event_log import event_logger
from bridge.workflow.call import ATTEMPT_TIMEOUT, START_OPERATION_ACTIVITY, STILL_RUNNING, OperationCall
from bridge.workflow.pending_call import timed_out
from bridge.workflow.progress import MAX_PROGRESS_BYTES
from caller.receipt import final_failure, receipt, result_of
from caller.waiting.renewals import next_delay
from caller.waiting.started_operation import StartedOperation

CLOCK_DIFFERENCE = timedelta(seconds=30)
"""If the worker's clock and the server's differ by more, the worker logs a warning."""

_RPC_TIMEOUT = timedelta(seconds=3)

_log = event_logger(__name__)


class Attempt:
    """The attempt that runs now. Create it inside the activity."""

    def __init__(self, call: OperationCall, *, clock: Callable[[], datetime]) -> None:
        self.call = call
        self.info = activity.info()
        self.client = activity.client()
        """The worker's current client. A team may replace the client while the worker runs."""
        self.caller = workflow_of(self.info)
        self.known = StartedOperation.from_details(self.info.heartbeat_details)
        """What earlier attempts recorded; None until an attempt was answered 201 (still running)."""
        self.converter = waiting_converter(
            self.client.data_converter,
            self.caller,
            self.info.workflow_type or "",
            task_queue=self.info.task_queue,
            request_id=self.info.activity_id,
        )
        self.lifetime = self.info.start_to_close_timeout or ATTEMPT_TIMEOUT
        """How long the server lets the attempt run."""
        self.deadline = call.deadline
        """End of the wait: the call's deadline, or the activity's schedule-to-close timeout if that is earlier."""
        if self.info.schedule_to_close_timeout is not None:
            self.deadline = min(self.deadline, self.info.scheduled_time + self.info.schedule_to_close_timeout)
        self._names: dict[str, Any] = {"namespace": self.caller.namespace, "task_token": self.info.task_token}
        self._began = time.monotonic()
        self.clock_difference = clock() - self.info.started_time
        """How far the worker's clock was ahead of the server's when the attempt began; negative if it was behind."""

    @property
    def is_first(self) -> bool:
        """Whether no earlier attempt of the call can have started the operation, but for a workflow that was reset.

        The attempts of a reset activity count anew, and so do those of the activity that a reset workflow schedules.
        """
        return self.info.attempt == 1 and not self.call.is_again and self.known is None

    def now(self) -> datetime:
        """Return the current time of the server's clock. The worker's clock may be set while the attempt runs."""
        return self.info.started_time + timedelta(seconds=time.monotonic() - self._began)

    def limit(self, known: StartedOperation | None) -> tuple[datetime | None, TimeoutType]:
        """Return the instant at which the call ends although its deadline is later, and the type of that timeout."""
        if known is None:
            return self.call.start_deadline, TimeoutType.SCHEDULE_TO_START
        return self.call.close_deadline(known.started or self.call.scheduled_time), TimeoutType.START_TO_CLOSE

    @property
    def passed(self) -> TimeoutType | None:
        """The timeout that passed before this attempt; None if the attempt may ask the handler."""
        now, start = self.now(), self.call.start_deadline
        if self.deadline <= now:
            # After a reset of the workflow, the server's timer of the activity begins anew.
            return TimeoutType.SCHEDULE_TO_CLOSE
        # No worker had a place for the first attempt in time, and the operation would start now. The activity of a
        # workflow that was reset later is scheduled after the limit, and its operation may have started before.
        is_late = start is not None and self.info.current_attempt_scheduled_time < start <= now
        return TimeoutType.SCHEDULE_TO_START if self.is_first and is_late else None

    async def complete(self, outcome: Outcome, target: WorkflowRef | None) -> None:
        """End the call with *outcome*, which is within the size limit. *target* is the run that had it."""
        identity = receipt(self.info.activity_id, target, outcome)
        if outcome.failure is not None:
            await self._report(final_failure(outcome.failure), identity=identity)
            return
        completed = RespondActivityTaskCompletedRequest(**self._names, identity=identity, result=result_of(outcome))
        service = self.client.workflow_service
        await self._send(service.respond_activity_task_completed(completed, retry=True, timeout=_RPC_TIMEOUT))

    async def fail(self, reason: HandlerError | TemporalTimeoutError) -> None:
        """End the call with *reason*: nothing was started, the outcome can no longer be known, or a timeout passed."""
        cause = Failure()
        # Drop the traceback: it would show the bridge's code in the history, and the fault is not there.
        await self.converter.encode_failure(reason.with_traceback(None), cause)
        await self._report(final_failure(cause))

    async def end(self, message: str, *, kind: str, wanted: timedelta, known: StartedOperation | None) -> None:
        """End this attempt. The next attempt begins after *wanted*, or earlier if a limit of the call requires it.

        *known* is the operation, if it has started. Temporal shows *message* as the last failure of the pending
        activity and *kind* as its type. If too little time is left before the deadline, the attempt stays open and
        waits for the callback. If the limit for the start or for the operation has passed, the call ends.
        """
        until, timeout = self.limit(known)
        if until is not None and until <= self.now() < self.deadline:
            cause = None if kind == STILL_RUNNING else ApplicationError(message[:1000], type=kind)
            await self.fail(timed_out(cause, timeout))
            return
        failure = Failure()
        await self.converter.encode_failure(ApplicationError(message[:1000]), failure)
        details = failure.application_failure_info
        details.type = kind
        details.category = ApplicationErrorCategory.APPLICATION_ERROR_CATEGORY_BENIGN
        # Read the clock last: encoding the failure takes time.
        delay = next_delay(wanted, now=self.now(), deadline=self.deadline, until=until)
        if delay is not None:
            details.next_retry_delay.FromTimedelta(delay)
            await self._report(failure)

    async def record(self, known: StartedOperation, *, progress: Payload | None) -> None:
        """Record a 201 as heartbeat details. The pending activity shows them, and later attempts read them as proof.

        *progress* is what the target reported, encoded by its worker.
        """
        try:
            # Record a plain mapping, because the SDK decodes details without a type hint.
            details = await self.converter.encode([asdict(known)])
            # Pass the progress as the target's converter and codec made it.
            payloads = Payloads(payloads=[*details, *await self._readable(progress)])
            heartbeat = RecordActivityTaskHeartbeatRequest(
                **self._names, identity=self.client.identity, details=payloads
            )
            await self.client.workflow_service.record_activity_task_heartbeat(heartbeat, retry=True)
        except RPCError:
            # Usually the activity was completed in the meantime. If the details are lost, nothing else is.
            return

    async def _readable(self, progress: Payload | None) -> list[Payload]:
        """Return the progress if this worker can decode it. Details that a worker cannot decode fail the activity."""
        if progress is None or progress.ByteSize() > MAX_PROGRESS_BYTES:
            return []
        try:
            await self.converter.decode([progress])
        except Exception as error:  # noqa: BLE001 - any error of our own converter and codec over the target's value
            _log.info("bridge.progress_unreadable", extra={"bridge.error": type(error).__name__})
            return []
        return [progress]

    async def _report(self, failure: Failure, *, identity: str = "") -> None:
        identity = identity or self.client.identity
        failed = RespondActivityTaskFailedRequest(**self._names, identity=identity, failure=failure)
        service = self.client.workflow_service
        await self._send(service.respond_activity_task_failed(failed, retry=True, timeout=_RPC_TIMEOUT))

    async def _send(self, report: Coroutine[Any, Any, object]) -> None:
        try:
            await report
        except RPCError as error:
            # NOT_FOUND means that the callback completed the activity first.
            extra = {"bridge.request_id": self.info.activity_id, "bridge.rpc_status": error.status.name}
            _log.info("bridge.attempt_not_reported", extra=extra)


def waiting_converter(
    converter: DataConverter, workflow: WorkflowRef, workflow_type: str, *, task_queue: str, request_id: str
) -> DataConverter:
    """Return *converter* with the context that the SDK gives the waiting activity *request_id* of *workflow*."""
    return converter.with_context(
        ActivitySerializationContext(
            namespace=workflow.namespace,
            workflow_id=workflow.workflow_id,
            workflow_type=workflow_type,
            activity_type=START_OPERATION_ACTIVITY,
            activity_id=request_id,
            activity_task_queue=task_queue,
            is_local=False,
        )
    )


def workflow_of(info: activity.Info) -> WorkflowRef:
    """Return the run that scheduled the activity of *info*."""
    return WorkflowRef(namespace=info.namespace, workflow_id=info.workflow_id or "", run_id=info.workflow_run_id or "")
