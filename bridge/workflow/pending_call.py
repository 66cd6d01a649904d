"""One call in flight, on the side of its workflow: the waiting activity, and the effect of a cancel on the wait.

Only an outcome, a cancellation or the deadline ends a call. If the waiting activity ends in another way (for example it
could not read its heartbeat details, or an operator or an interceptor stopped it), the workflow schedules it again with
the same id.
"""

import asyncio
import contextlib
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, assert_never

from nexusrpc import HandlerError
from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy
from temporalio.workflow import NexusOperationCancellationType as CancellationType

from bridge.workflow.call import (
    ATTEMPT_TIMEOUT,
    CALL_ENDED,
    COUNT_CALL,
    OPERATION_UNSUCCESSFUL,
    START_OPERATION_ACTIVITY,
    STILL_RUNNING,
    UNSUCCESSFUL_MESSAGE,
    CancelOrder,
    OperationCall,
)
from bridge.workflow.own_activity import retrieve, start_own_activity
from bridge.workflow.run_calls import RunCalls

# Coefficient 1, because every attempt sets the delay of the next one. History shows no attempt until one of them or the
# receiver closes the activity. The number of attempts is explicit, because 0 means the default of the cluster.
_RETRY_POLICY = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0, maximum_attempts=2**31 - 1)

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=1)
"""Pause between the end of a waiting activity without an outcome and the next waiting activity."""


_OUTCOMES = {
    exceptions.CancelledError: "canceled",
    exceptions.TimeoutError: "timed out",
    HandlerError: "refused",
}
"""Names of outcomes in metrics, by the type of a call's error. Any other error is "failed"."""


@dataclass(kw_only=True, eq=False)
class PendingCall:
    """A call and its waiting activity. Creating an instance schedules the activity."""

    call: OperationCall
    """First argument of the activity."""
    operation_input: Any
    """Second argument of the activity."""
    request_id: str
    """Request id of the call, and id of the waiting activity."""
    output_type: type[Any] | None
    """Type of the result; None for the default of the data converter."""
    cancellation_type: CancellationType
    """What must happen before a canceled call raises its error."""
    summary: str
    """Line that UI and CLI show with the activity."""

    def __post_init__(self) -> None:
        self._run = RunCalls.present()
        self._activity = self._schedule(self.call, within=timedelta(milliseconds=self.call.schedule_to_close_ms))

    async def outcome(self) -> Any:
        """Wait for the outcome. If the wait is canceled, act according to the cancellation type.

        Raises:
            temporalio.exceptions.NexusOperationError: The call failed, was canceled, or passed its deadline.
        """
        waiting = asyncio.create_task(self._outcome(), name=f"waiting: {self.summary}")
        waiting.add_done_callback(retrieve)
        waiting.add_done_callback(self._count)
        canceling: asyncio.Future[None] | None = None
        while True:
            try:
                if canceling is not None and self.cancellation_type is CancellationType.WAIT_REQUESTED:
                    await workflow.wait([waiting, canceling], return_when=asyncio.FIRST_COMPLETED)
                    if not waiting.done():
                        waiting.cancel()
                        raise self._error() from canceling.exception() or _canceled()
                return await asyncio.shield(waiting)
            except asyncio.CancelledError:
                if waiting.cancelling() or waiting.cancelled():
                    # The run is being evicted. No task may wait any more, and no new one may start.
                    raise
                with contextlib.suppress(asyncio.CancelledError):
                    # The SDK checks conditions when no task of the run can go on. An outcome in the same workflow task
                    # has then arrived. Native Nexus returns it too.
                    await workflow.wait_condition(lambda: True)
                if waiting.done():
                    continue
                match self.cancellation_type:
                    case CancellationType.ABANDON:
                        waiting.cancel()
                        raise self._error() from _canceled()
                    case CancellationType.TRY_CANCEL:
                        waiting.remove_done_callback(self._count)
                        self._count_as("canceled")
                        # Only a pending activity holds the operation token. A stopped one is scheduled again until the
                        # handler has answered the cancel.
                        self._request_cancel(waiting).add_done_callback(lambda _: waiting.cancel())
                        raise self._error() from _canceled()
                    case CancellationType.WAIT_REQUESTED | CancellationType.WAIT_COMPLETED:
                        # Request the cancel once, also if the wait is canceled again. The operation decides how it
                        # ends.
                        canceling = canceling or self._request_cancel(waiting)
                    case _:
                        assert_never(self.cancellation_type)

    async def _outcome(self) -> Any:
        """Wait for the activity. Schedule it again if it ends without an outcome before the deadline."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await asyncio.shield(self._activity)
            except exceptions.ActivityError as error:
                cause = error.cause
                if isinstance(cause, exceptions.ApplicationError) and cause.type == OPERATION_UNSUCCESSFUL:
                    raise self._error() from cause.cause or cause
                if isinstance(cause, exceptions.ServerError):
                    # The outcome is larger than the caller's namespace allows (`limit.blobSize.error`).
                    raise self._error() from cause
                remaining = self.call.deadline - workflow.now()
                if remaining < _FIRST_PAUSE:
                    raise self._error() from _past_deadline(cause)
                workflow.logger.warning(
                    "bridge.waiting_activity_ended: scheduled again, because it ended without an outcome: %s",
                    cause or error,
                    extra={"bridge.request_id": self.request_id, "bridge.endpoint": self.call.endpoint},
                )
            await workflow.sleep(min(pause, remaining / 2))
            if (remaining := self.call.deadline - workflow.now()) <= timedelta(0):
                # No worker ran the workflow for a while. The server refuses an activity with a negative timeout.
                raise self._error() from _past_deadline(cause)
            pause = min(pause * 2, _LONGEST_PAUSE)
            # The earlier activity may have started the operation. Therefore the limit for the start is not set again.
            again = replace(self.call, schedule_to_start_ms=None, is_again=True)
            self._activity = self._schedule(again, within=remaining)

    def _schedule(self, call: OperationCall, *, within: timedelta) -> workflow.ActivityHandle[Any]:
        lease = timedelta(milliseconds=min(filter(None, (call.first_lease_ms, call.start_to_close_ms))))
        activity = start_own_activity(
            workflow.start_activity,
            START_OPERATION_ACTIVITY,
            args=[call, self.operation_input],
            activity_id=self.request_id,
            result_type=self.output_type,
            schedule_to_close_timeout=within,
            # The first lease, but at least the time of a request. The handler may hold it for half of the lease.
            start_to_close_timeout=max(lease, ATTEMPT_TIMEOUT + lease / 2),
            retry_policy=_RETRY_POLICY,
            # The workflow never cancels the activity itself, because a cancel reads the operation token from the
            # pending activity.
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary=self.summary,
        )
        self._run.waiting.add(self.request_id)
        activity.add_done_callback(self._ended)
        return activity

    def _count(self, waiting: "asyncio.Task[Any]") -> None:
        self._count_as(_outcome_name(waiting))

    def _count_as(self, outcome: str) -> None:
        count = workflow.extern_functions().get(COUNT_CALL)
        if count is not None and not workflow.unsafe.is_replaying():
            count(self.call, outcome, (workflow.now() - self.call.scheduled_time).total_seconds())

    def _ended(self, _: object) -> None:
        self._run.ended(self.request_id)
        report_end = workflow.extern_functions().get(CALL_ENDED)
        # An eviction ends the handle and not the call. It counts as a replay.
        if report_end is not None and not workflow.unsafe.is_replaying():
            # The report saves a request to the server. No decision of the workflow depends on it.
            report_end(self.request_id)

    def _request_cancel(self, waiting: "asyncio.Task[Any]") -> "asyncio.Future[None]":
        return self._run.cancel(
            CancelOrder(request_id=self.request_id, call=self.call),
            is_over=lambda: (waiting.done() and self._activity.done()) or self.call.deadline <= workflow.now(),
        )

    def _error(self) -> exceptions.NexusOperationError:
        return operation_error(self.call.endpoint, self.call.service, self.call.operation)


def _outcome_name(waiting: "asyncio.Task[Any]") -> str:
    if waiting.cancelled():
        return "canceled"
    error = waiting.exception()
    return "succeeded" if error is None else _OUTCOMES.get(type(error.__cause__), "failed")


def operation_error(endpoint: str, service: str, operation: str) -> exceptions.NexusOperationError:
    """The error that native Nexus raises for a failed call. The caller of this function sets its cause."""
    return exceptions.NexusOperationError(
        UNSUCCESSFUL_MESSAGE,
        scheduled_event_id=0,
        endpoint=endpoint,
        service=service,
        operation=operation,
        operation_token="",
    )


def _canceled() -> exceptions.CancelledError:
    return exceptions.CancelledError("operation canceled")


def _past_deadline(error: BaseException | None) -> exceptions.TimeoutError:
    """The error of a call that passed its deadline. Its cause is the last error, None if the operation was running."""
    while isinstance(error, exceptions.TimeoutError) or (
        isinstance(error, exceptions.ApplicationError) and error.type == STILL_RUNNING
    ):
        error = error.cause
    return timed_out(error)


def timed_out(
    cause: BaseException | None, timeout: exceptions.TimeoutType = exceptions.TimeoutType.SCHEDULE_TO_CLOSE
) -> exceptions.TimeoutError:
    """The error of a call of which *timeout* has passed."""
    error = exceptions.TimeoutError("operation timed out", type=timeout, last_heartbeat_details=[])
    error.__cause__ = cause
    return error
