"""The cancel activity: ask the handler to end an operation that our workflow waits for.

It learns the operation token from the pending waiting activity in its own namespace, waits while there is none yet,
ends when the call has ended, and never sends a start.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from bridge.protocol.cancel import CancelRequest
from bridge.workflow.call import (
    CANCEL_OPERATION_ACTIVITY,
    OPERATION_UNSUCCESSFUL,
    UNSUCCESSFUL_MESSAGE,
    OperationCall,
    unreached_delay,
)
from caller.endpoints import Endpoints, NotStartedError
from caller.started_operation import Known
from caller.waiting_activity import HANDLER_NOT_REACHED

NOT_STARTED_YET = "bridge.NotStartedYet"

_LOOK_AGAIN = timedelta(seconds=1)


class CancelActivities:
    """The caller's cancel activity, for one worker."""

    def __init__(self, *, client: Client, endpoints: Endpoints, clock: Callable[[], datetime]) -> None:
        self._client = client
        self._endpoints = endpoints
        self._clock = clock

    @activity.defn(name=CANCEL_OPERATION_ACTIVITY)
    async def cancel_operation(self, call: OperationCall, request_id: str) -> str:
        """One attempt. Returns "requested" once the handler has taken the cancel, "ended" if the call had ended.

        Raises:
            ApplicationError: Retryable while the start is not known yet or the handler is not reached; non-retryable,
                with the HandlerError as its cause, where the handler refused.
        """
        is_pending, known = await self._look_up(request_id)
        if not is_pending:
            return "ended"
        if known is None:
            message = "the operation is not known to have started yet"
            raise ApplicationError(
                message, type=NOT_STARTED_YET, category=ApplicationErrorCategory.BENIGN, next_retry_delay=_LOOK_AGAIN
            )
        request = CancelRequest(
            service=call.service,
            operation=call.operation,
            operation_token=known.operation_token,
            headers=call.headers,
        )
        remaining = call.deadline - self._clock()
        try:
            await self._endpoints.cancel(call.endpoint, request, remaining=max(remaining, _LOOK_AGAIN))
        except NotStartedError as error:
            if isinstance(error.reason, HandlerError) and not error.reason.retryable:
                raise ApplicationError(
                    UNSUCCESSFUL_MESSAGE, type=OPERATION_UNSUCCESSFUL, non_retryable=True
                ) from error.reason.with_traceback(None)
            raise ApplicationError(
                f"handler not reached: {error}"[:1000],
                type=HANDLER_NOT_REACHED,
                category=ApplicationErrorCategory.BENIGN,
                next_retry_delay=unreached_delay(
                    activity.info().attempt, retry_after=error.retry_after, remaining=remaining
                ),
            ) from None
        return "requested"

    async def _look_up(self, request_id: str) -> tuple[bool, Known | None]:
        """Whether the call is pending, and what is known of its operation."""
        info = activity.info()
        described = await self._client.workflow_service.describe_workflow_execution(
            DescribeWorkflowExecutionRequest(
                namespace=self._client.namespace,
                execution=WorkflowExecution(workflow_id=info.workflow_id or "", run_id=info.workflow_run_id or ""),
            ),
            retry=True,
        )
        for pending in described.pending_activities:
            if pending.activity_id == request_id:
                details = await self._client.data_converter.decode(pending.heartbeat_details.payloads[:1])
                return True, Known.from_details(details)
        return False, None
