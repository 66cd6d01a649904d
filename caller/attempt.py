"""One attempt of the waiting activity: its times by the server's clock, and what it reports.

Every report is sent by task token from inside the attempt, which then ends as "completes asynchronously". So no
interceptor of the team sees an exception that it could map, retry or report, and what the server records is what the
attempt decided. An attempt whose report fails ends by its start-to-close timeout, and the next one begins.
"""

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NoReturn

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.enums.v1 import ApplicationErrorCategory
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import RespondActivityTaskFailedRequest
from temporalio.converter import ActivitySerializationContext, DataConverter
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError

from bridge.protocol.link import WorkflowRef
from bridge.workflow.call import ATTEMPT_TIMEOUT, START_OPERATION_ACTIVITY, OperationCall
from caller.completer import final_failure
from caller.renewals import next_delay
from caller.started_operation import StartedOperation

CLOCK_DIFFERENCE = timedelta(seconds=30)
"""A larger difference between the worker's clock and the server's is worth a warning."""

_RPC_TIMEOUT = timedelta(seconds=3)

_log = logging.getLogger(__name__)


class Attempt:
    """The attempt that runs now. Made inside the activity."""

    def __init__(self, call: OperationCall, *, clock: Callable[[], datetime]) -> None:
        self.call = call
        self.info = activity.info()
        self.client = activity.client()
        """The worker's present client: it may be replaced while the worker runs."""
        self.caller = WorkflowRef(
            namespace=self.client.namespace,
            workflow_id=self.info.workflow_id or "",
            run_id=self.info.workflow_run_id or "",
        )
        self.known = StartedOperation.from_details(self.info.heartbeat_details)
        """What earlier attempts have learned; None while the operation is not known to run."""
        self.converter = waiting_converter(self.client.data_converter, self.info, request_id=self.info.activity_id)
        self.lifetime = self.info.start_to_close_timeout or ATTEMPT_TIMEOUT
        """How long the server lets the attempt run."""
        self.deadline = call.deadline
        """When the wait is over: the call's deadline, or earlier where the server limits the activity more tightly."""
        if self.info.schedule_to_close_timeout is not None:
            self.deadline = min(self.deadline, self.info.scheduled_time + self.info.schedule_to_close_timeout)
        self._clock = clock
        self.clock_difference = clock() - self.info.started_time
        """How far the worker's clock is ahead of the server's, or behind it where negative."""

    def now(self) -> datetime:
        """The present by the server's clock."""
        return self._clock() - self.clock_difference

    async def fail(self, reason: HandlerError | TemporalTimeoutError) -> NoReturn:
        """End the call with *reason*: nothing was started, the outcome cannot be known any more, or a time is out."""
        cause = Failure()
        # Its traceback would show our code in the history, which is not where the fault is.
        await self.converter.encode_failure(reason.with_traceback(None), cause)
        await self._report(final_failure(cause))
        activity.raise_complete_async()

    async def end(self, message: str, *, kind: str, wanted: timedelta, until: datetime | None = None) -> NoReturn:
        """End this attempt and let the next one begin after *wanted*, as it fits before the deadline.

        *message* is shown as the last failure of the pending activity. Where too little time is left, the attempt
        waits for the callback instead.
        """
        failure = Failure()
        await self.converter.encode_failure(ApplicationError(message[:1000]), failure)
        details = failure.application_failure_info
        details.type = kind
        details.category = ApplicationErrorCategory.APPLICATION_ERROR_CATEGORY_BENIGN
        # The present is read last: what comes before it takes time.
        delay = next_delay(wanted, now=self.now(), deadline=self.deadline, until=until)
        if delay is not None:
            details.next_retry_delay.FromTimedelta(delay)
            await self._report(failure)
        activity.raise_complete_async()

    async def _report(self, failure: Failure) -> None:
        token, identity = self.info.task_token, self.client.identity
        request = RespondActivityTaskFailedRequest(
            namespace=self.caller.namespace, task_token=token, identity=identity, failure=failure
        )
        try:
            await self.client.workflow_service.respond_activity_task_failed(request, retry=True, timeout=_RPC_TIMEOUT)
        except RPCError as error:
            # Not found: the callback came first.
            extra = {"bridge.request_id": self.info.activity_id, "bridge.rpc_status": error.status.name}
            _log.info("bridge.attempt_not_reported", extra=extra)


def waiting_converter(converter: DataConverter, info: activity.Info, *, request_id: str) -> DataConverter:
    """*converter* as the SDK uses it for the waiting activity *request_id* of the workflow that *info* belongs to."""
    return converter.with_context(
        ActivitySerializationContext(
            namespace=info.namespace,
            workflow_id=info.workflow_id,
            workflow_type=info.workflow_type,
            activity_type=START_OPERATION_ACTIVITY,
            activity_id=request_id,
            activity_task_queue=info.task_queue,
            is_local=False,
        )
    )
