"""The cancel activity: ask handlers to cancel operations that our workflow waits for.

The activity is a local activity, because the server refuses other activities once the workflow is at the limit of its
pending activities. One describe of the workflow finds the operation tokens of all calls of a batch. The workflow
repeats the cancel requests that no handler accepted, with growing delays.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.service import RPCError

from bridge.protocol.cancel import CancelRequest
from bridge.runtime.event_log import event_logger
from bridge.temporal.executions import describe
from bridge.workflow.call import CANCEL_OPERATIONS_ACTIVITY, CancelAnswer, CancelOrder
from caller.endpoint_client import Endpoints, NotStartedError
from caller.waiting.attempt import waiting_converter, workflow_of
from caller.waiting.started_operation import StartedOperation

_REQUEST_TIMEOUT = timedelta(seconds=5)
"""Shorter than the timeout of other requests, because the workflow task waits for the answer."""

_log = event_logger(__name__)


class CancelActivities:
    """The caller's cancel activity, for one worker."""

    def __init__(self, *, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    @activity.defn(name=CANCEL_OPERATIONS_ACTIVITY)
    async def cancel_operations(self, orders: list[CancelOrder]) -> list[CancelAnswer]:
        """Send each cancel request once. The answers have the order of *orders*."""
        try:
            details = await self._recorded_details()
        except RPCError as error:
            return [_not_sent(each, type(error).__name__) for each in orders]
        return await asyncio.gather(*(self._cancel(each, details.get(each.request_id, ())) for each in orders))

    async def _cancel(self, order: CancelOrder, details: Sequence[Payload]) -> CancelAnswer:
        info = activity.info()
        converter = waiting_converter(
            activity.client().data_converter,
            workflow_of(info),
            info.workflow_type or "",
            task_queue=info.task_queue,
            request_id=order.request_id,
        )
        try:
            decoded = await converter.decode(details[:1], [dict] * len(details[:1]))
        except Exception as error:  # noqa: BLE001 - any error of the team's codec and converter
            return _not_sent(order, type(error).__name__)
        started = StartedOperation.from_details(decoded)
        if started is None or not started.operation_token:
            return _not_sent(order, "the operation is not known to have started yet")
        call = order.call
        request = CancelRequest(
            service=call.service,
            operation=call.operation,
            operation_token=started.operation_token,
            headers=call.headers,
        )
        try:
            await self._endpoints.cancel(call.endpoint, request, remaining=_REQUEST_TIMEOUT)
        except HandlerError as error:
            # Nothing was sent: the settings of this worker are at fault, and may be repaired.
            return _not_sent(order, error.message)
        except NotStartedError as error:
            reason = error.reason
            # A HandlerError that is not retryable always comes from the handler's answer.
            if isinstance(reason, HandlerError) and not reason.retryable:
                return CancelAnswer(refusal=str(reason), refusal_type=reason.type.name)
            return _not_sent(order, type(reason).__name__)
        return CancelAnswer(is_requested=True)

    async def _recorded_details(self) -> dict[str, Sequence[Payload]]:
        """Return the heartbeat details of our workflow's pending activities, by activity id."""
        info, client = activity.info(), activity.client()
        described = await describe(client, info.workflow_id or "", info.workflow_run_id or "", within=_REQUEST_TIMEOUT)
        activities = () if described is None else described.pending_activities
        return {each.activity_id: each.heartbeat_details.payloads for each in activities}


def _not_sent(order: CancelOrder, reason: str) -> CancelAnswer:
    _log.warning(
        "bridge.cancel_not_sent",
        extra={
            "bridge.request_id": order.request_id,
            "bridge.endpoint": order.call.endpoint,
            "bridge.reason": reason,
        },
    )
    return CancelAnswer()
