"""One call under way, seen from its workflow: the waiting activity, and what a cancel does to the wait.

Nothing but an outcome, a cancellation or the deadline ends a call. Where the waiting activity has ended with none of
them (it could not read its heartbeat details, an operator or an interceptor stopped it), it is scheduled again under
the same id.
"""

import asyncio
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, assert_never

from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy
from temporalio.workflow import NexusOperationCancellationType as CancellationType

from bridge.workflow.call import (
    ATTEMPT_TIMEOUT,
    CALL_ENDED,
    OPERATION_UNSUCCESSFUL,
    START_OPERATION_ACTIVITY,
    STILL_RUNNING,
    UNSUCCESSFUL_MESSAGE,
    CancelOrder,
    OperationCall,
)
from bridge.workflow.own_activity import retrieve, start_own_activity
from bridge.workflow.run_calls import RunCalls

# Coefficient 1: every attempt after the first names its own delay. Each attempt is silent in history until one of
# them, or the receiver, closes the activity. The number of attempts is named, because 0 means the cluster's default.
_RETRY_POLICY = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0, maximum_attempts=2**31 - 1)

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=1)
"""Between the end of a waiting activity without an outcome and the next one."""


@dataclass(kw_only=True, eq=False)
class PendingCall:
    """A call whose waiting activity has been scheduled: that is what making one does."""

    call: OperationCall
    operation_input: Any
    request_id: str
    """Also the id of the waiting activity."""
    output_type: type[Any] | None
    cancellation_type: CancellationType
    summary: str

    def __post_init__(self) -> None:
        self._run = RunCalls.present()
        self._activity = self._schedule(self.call, within=timedelta(milliseconds=self.call.schedule_to_close_ms))

    async def outcome(self) -> Any:
        """Wait for the outcome, and carry out the cancellation type if the wait is canceled.

        Raises:
            temporalio.exceptions.NexusOperationError: The call failed, was canceled, or its time is over.
        """
        waiting = asyncio.create_task(self._outcome(), name=f"waiting: {self.summary}")
        waiting.add_done_callback(retrieve)
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
                    # The run is being evicted: nothing may wait any more, and nothing new may begin.
                    raise
                match self.cancellation_type:
                    case CancellationType.ABANDON | CancellationType.TRY_CANCEL:
                        if self.cancellation_type is CancellationType.TRY_CANCEL:
                            canceling = self._request_cancel(waiting)
                        waiting.cancel()
                        raise self._error() from _canceled()
                    case CancellationType.WAIT_REQUESTED | CancellationType.WAIT_COMPLETED:
                        # However often the wait is canceled, the handler is asked once; the operation decides.
                        canceling = canceling or self._request_cancel(waiting)
                    case _:
                        assert_never(self.cancellation_type)

    async def _outcome(self) -> Any:
        """Wait for the activity; schedule it again where it ended with neither an outcome nor the deadline."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return await asyncio.shield(self._activity)
            except exceptions.ActivityError as error:
                cause = error.cause
                if isinstance(cause, exceptions.ApplicationError) and cause.type == OPERATION_UNSUCCESSFUL:
                    raise self._error() from cause.cause or cause
                remaining = self.call.deadline - workflow.now()
                if remaining < _FIRST_PAUSE:
                    raise self._error() from _timed_out(cause)
                workflow.logger.warning(
                    "bridge.waiting_activity_ended: scheduled again, because it ended without an outcome: %s",
                    cause or error,
                    extra={"bridge.request_id": self.request_id, "bridge.endpoint": self.call.endpoint},
                )
            await workflow.sleep(min(pause, remaining / 2))
            pause = min(pause * 2, _LONGEST_PAUSE)
            # The earlier activity may have seen the operation start: a limit for the start is not counted anew.
            again = replace(self.call, schedule_to_start_ms=None)
            self._activity = self._schedule(again, within=self.call.deadline - workflow.now())

    def _schedule(self, call: OperationCall, *, within: timedelta) -> workflow.ActivityHandle[Any]:
        lease = timedelta(milliseconds=min(filter(None, (call.first_lease_ms, call.start_to_close_ms))))
        activity = start_own_activity(
            workflow.start_activity,
            START_OPERATION_ACTIVITY,
            args=[call, self.operation_input],
            activity_id=self.request_id,
            result_type=self.output_type,
            schedule_to_close_timeout=within,
            # The first lease, but at least as long as a request may take, which is held for half of it at most.
            start_to_close_timeout=max(lease, ATTEMPT_TIMEOUT + lease / 2),
            retry_policy=_RETRY_POLICY,
            # The activity itself is never canceled: its token is what the cancel is sent by.
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary=self.summary,
        )
        self._run.waiting.add(self.request_id)
        activity.add_done_callback(self._ended)
        return activity

    def _ended(self, _: object) -> None:
        self._run.ended(self.request_id)
        report_end = workflow.extern_functions().get(CALL_ENDED)
        # An eviction, which counts as a replay, ends the handle and not the call.
        if report_end is not None and not workflow.unsafe.is_replaying():
            # Saves a request to the server; nothing that the workflow does depends on it.
            report_end(self.request_id)

    def _request_cancel(self, waiting: "asyncio.Task[Any]") -> "asyncio.Future[None]":
        return self._run.cancel(
            CancelOrder(request_id=self.request_id, call=self.call),
            is_over=lambda: (waiting.done() and self._activity.done()) or self.call.deadline <= workflow.now(),
        )

    def _error(self) -> exceptions.NexusOperationError:
        return operation_error(self.call.endpoint, self.call.service, self.call.operation)


def operation_error(endpoint: str, service: str, operation: str) -> exceptions.NexusOperationError:
    """The error that native Nexus raises for a call that failed; its cause says why."""
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


def _timed_out(error: BaseException | None) -> exceptions.TimeoutError:
    """The deadline's error. Its cause is what went wrong last; None if the operation merely ran on."""
    while isinstance(error, exceptions.TimeoutError) or (
        isinstance(error, exceptions.ApplicationError) and error.type == STILL_RUNNING
    ):
        error = error.cause
    timeout = exceptions.TimeoutError(
        "operation timed out", type=exceptions.TimeoutType.SCHEDULE_TO_CLOSE, last_heartbeat_details=[]
    )
    timeout.__cause__ = error
    return timeout
