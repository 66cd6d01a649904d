"""One call under way, seen from its workflow: the waiting activity, and what a cancel does to the wait.

Nothing but an outcome, a cancellation or the deadline ends a call. Where the waiting activity has ended with none of
them (it could not read its heartbeat details, an operator or an interceptor stopped it), it is scheduled again under
the same id.
"""

import asyncio
import dataclasses
from datetime import timedelta
from typing import Any, ClassVar, assert_never
from weakref import WeakKeyDictionary

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
from bridge.workflow.cancellation import Cancellations
from bridge.workflow.own_activity import start_own_activity

# Coefficient 1: every attempt after the first names its own delay. Each attempt is silent in history until one of
# them, or the receiver, closes the activity. The number of attempts is named, because 0 means the cluster's default.
_RETRY_POLICY = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0, maximum_attempts=2**31 - 1)

_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(seconds=1), timedelta(minutes=1)
"""Between the end of a waiting activity without an outcome and the next one."""


class RunCalls:
    """The calls of one workflow run."""

    _of_runs: ClassVar["WeakKeyDictionary[asyncio.AbstractEventLoop, RunCalls]"] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.waiting: set[str] = set()
        """Request ids of the calls that have a pending activity."""
        self._cancellations: dict[str, Cancellations] = {}

    @classmethod
    def present(cls) -> "RunCalls":
        """Those of the run whose code is running: every run has an event loop of its own."""
        return cls._of_runs.setdefault(asyncio.get_running_loop(), cls())

    def cancellations(self, endpoint: str) -> Cancellations:
        """The cancels of calls through *endpoint*."""
        return self._cancellations.setdefault(endpoint, Cancellations(endpoint))


class PendingCall:
    """A call whose waiting activity has been scheduled."""

    def __init__(
        self,
        call: OperationCall,
        operation_input: Any,
        *,
        request_id: str,
        output_type: type[Any] | None,
        cancellation_type: CancellationType,
        summary: str,
    ) -> None:
        """Schedule the waiting activity. *request_id* becomes its id."""
        self._call = call
        self._input = operation_input
        self._request_id = request_id
        self._output_type = output_type
        self._cancellation_type = cancellation_type
        self._summary = summary
        self._run = RunCalls.present()
        self._activity = self._schedule(call, within=timedelta(milliseconds=call.schedule_to_close_ms))

    async def outcome(self) -> Any:
        """Wait for the outcome, and carry out the cancellation type if the wait is canceled.

        Raises:
            temporalio.exceptions.NexusOperationError: The call failed, was canceled, or its time is over.
        """
        waiting = asyncio.create_task(self._outcome(), name=f"waiting: {self._summary}")
        waiting.add_done_callback(_retrieve)
        canceling: asyncio.Future[None] | None = None
        while True:
            try:
                if canceling is not None and self._cancellation_type is CancellationType.WAIT_REQUESTED:
                    await workflow.wait([waiting, canceling], return_when=asyncio.FIRST_COMPLETED)
                    if not waiting.done():
                        waiting.cancel()
                        raise self._error() from canceling.exception() or _canceled()
                return await asyncio.shield(waiting)
            except asyncio.CancelledError:
                if waiting.cancelling() or waiting.cancelled():
                    # The run is being evicted: nothing may wait any more, and nothing new may begin.
                    raise
                match self._cancellation_type:
                    case CancellationType.ABANDON:
                        waiting.cancel()
                        raise self._error() from _canceled()
                    case CancellationType.TRY_CANCEL:
                        canceling = self._request_cancel(waiting)
                        waiting.cancel()
                        raise self._error() from _canceled()
                    case CancellationType.WAIT_REQUESTED | CancellationType.WAIT_COMPLETED:
                        # However often the wait is canceled, the handler is asked once; the operation decides.
                        canceling = canceling or self._request_cancel(waiting)
                    case _:
                        assert_never(self._cancellation_type)

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
                remaining = self._call.deadline - workflow.now()
                if remaining < _FIRST_PAUSE:
                    raise self._error() from _timed_out(cause)
                pause_now = min(pause, remaining / 2)
                workflow.logger.warning(
                    "bridge.waiting_activity_ended: it is scheduled again in %.1f s, because it ended with neither an "
                    "outcome nor the deadline: %s",
                    pause_now.total_seconds(),
                    cause or error,
                    extra={"bridge.request_id": self._request_id, "bridge.endpoint": self._call.endpoint},
                )
            await workflow.sleep(pause_now)
            pause = min(pause * 2, _LONGEST_PAUSE)
            # The earlier activity may have seen the operation start: a limit for the start is not counted anew.
            again = dataclasses.replace(self._call, schedule_to_start_ms=None)
            self._activity = self._schedule(again, within=self._call.deadline - workflow.now())

    def _schedule(self, call: OperationCall, *, within: timedelta) -> workflow.ActivityHandle[Any]:
        leases = filter(None, (call.first_lease_ms, call.start_to_close_ms))
        activity = start_own_activity(
            workflow.start_activity,
            START_OPERATION_ACTIVITY,
            args=[call, self._input],
            activity_id=self._request_id,
            result_type=self._output_type,
            schedule_to_close_timeout=within,
            # The first lease, but at least as long as a request may take.
            start_to_close_timeout=max(ATTEMPT_TIMEOUT, timedelta(milliseconds=min(leases))),
            retry_policy=_RETRY_POLICY,
            # The activity itself is never canceled: its token is what the cancel is sent by.
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary=self._summary,
        )
        self._run.waiting.add(self._request_id)
        activity.add_done_callback(self._ended)
        return activity

    def _ended(self, activity: "asyncio.Future[Any]") -> None:
        if activity.cancelled():
            # The run is being evicted.
            return
        self._run.waiting.discard(self._request_id)
        self._run.cancellations(self._call.endpoint).wake()
        if (report_end := workflow.extern_functions().get(CALL_ENDED)) is not None:
            # Saves a request to the server; nothing that the workflow does depends on it.
            report_end(self._request_id)

    def _request_cancel(self, waiting: "asyncio.Task[Any]") -> "asyncio.Future[None]":
        return self._run.cancellations(self._call.endpoint).request(
            CancelOrder(request_id=self._request_id, call=self._call),
            is_over=lambda: (waiting.done() and self._activity.done()) or self._call.deadline <= workflow.now(),
        )

    def _error(self) -> exceptions.NexusOperationError:
        return operation_error(self._call.endpoint, self._call.service, self._call.operation)


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


def _retrieve(waiting: "asyncio.Task[Any]") -> None:
    """Read the error of a wait that was given up, so that asyncio does not log it."""
    if not waiting.cancelled():
        waiting.exception()
