"""The delivery workflow's activity: one attempt to deliver the outcome in a target's close event.

The dispatcher makes the first attempt without a workflow. If that attempt fails, a delivery workflow repeats it, which
people can see. A delivery that was finally refused is a failed workflow: it can be listed and repeated.
"""

import logging
import random
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from bridge.protocol.answers import Meaning
from handler.delivery.callback_client import Attempted, CallbackClient, DestinationBusyError
from handler.delivery.close_event import CloseEvent, read_close_event
from handler.delivery.records import Delivery
from handler.delivery.workflow import COMPLETION_REFUSED, DELIVER_ACTIVITY, OUTCOME_NOT_KEPT, RECEIVER_NOT_READY

_MAX_STEP = timedelta(minutes=5)
_BUSY_STEP = timedelta(seconds=2)

NOT_CLOSED = "not closed"
"""Result of a delivery whose run turned out to be open, or continued as another run."""

_log = logging.getLogger(__name__)


class DeliveryActivities:
    """The handler's delivery activity, for one worker."""

    def __init__(self, *, callbacks: CallbackClient) -> None:
        self._callbacks = callbacks

    @activity.defn(name=DELIVER_ACTIVITY)
    async def deliver_completion(self, delivery: Delivery) -> str:
        """Make one attempt with the same URL and outcome and a fresh signature. Returns what the receiver answered.

        Raises:
            ApplicationError: Retryable with the next delay. Non-retryable if the receiver refused, or if the retention
                of the target's run has passed. The text is constant, because it is kept in the handler's history.
        """
        attempt = activity.info().attempt
        closed = await self._read(delivery)
        if closed is None:
            return NOT_CLOSED
        # Full jitter, because many deliveries may wait for the same receiver.
        spread = random.random()  # noqa: S311 - spreads load, keeps no secret
        delay = min(timedelta(seconds=2.0 ** min(attempt - 1, 9)), _MAX_STEP) * spread
        try:
            attempted = await self._callbacks.deliver(delivery, closed, activity.client().data_converter)
        except DestinationBusyError as error:
            # End at once, so that a receiver that hangs holds no slot of the worker.
            attempted, delay = Attempted(Meaning.AGAIN, reason=str(error)), _BUSY_STEP * (0.5 + spread)
        answer = attempted.meaning
        extra = {
            "bridge.request_id": delivery.call.request_id,
            "bridge.attempt": attempt,
            "bridge.target": delivery.workflow_id,
            "bridge.answer": answer.value,
            "bridge.reason": attempted.reason,
        }
        match answer:
            case Meaning.ACCEPTED | Meaning.CONFLICT | Meaning.GONE:
                _log.info("bridge.completion_delivered", extra=extra)
                return str(answer.value)
            case Meaning.REFUSED:
                _log.error("bridge.completion_refused", extra=extra)
                message = "the receiver refused the completion"
                raise ApplicationError(message, type=COMPLETION_REFUSED, non_retryable=True)
            case _:
                _log.info("bridge.completion_not_delivered", extra=extra)
                message = "the receiver is not ready"
                raise ApplicationError(
                    message,
                    type=RECEIVER_NOT_READY,
                    next_retry_delay=max(delay, attempted.retry_after or timedelta(milliseconds=50)),
                )

    async def _read(self, delivery: Delivery) -> CloseEvent | None:
        try:
            return await read_close_event(activity.client(), delivery.workflow_id, delivery.run_id)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
            message = "the target's run is no longer kept: its retention has passed"
            raise ApplicationError(message, type=OUTCOME_NOT_KEPT, non_retryable=True) from None
