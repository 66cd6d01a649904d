"""The delivery workflow's activity: one attempt to deliver the outcome in a target's close event.

The dispatcher makes the first attempt without a workflow. If that attempt fails, a delivery workflow repeats it, which
people can see. A delivery that was finally refused is a failed workflow: it can be listed and repeated.
"""

import random
from datetime import timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from bridge.protocol.answers import Meaning
from bridge.temporal.server import is_missing
from handler.delivery.callback_client import CallbackClient
from handler.delivery.close_event import CloseEvent, read_close_event
from handler.delivery.records import Delivery
from handler.delivery.workflow import COMPLETION_REFUSED, DELIVER_ACTIVITY, OUTCOME_NOT_KEPT, RECEIVER_NOT_READY

_MIN_STEP, _MAX_STEP = timedelta(milliseconds=50), timedelta(minutes=5)
_BUSY_STEP = timedelta(seconds=2)

NOT_CLOSED = "not closed"
"""Result of a delivery whose run turned out to be open, or continued as another run."""


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
        info = activity.info()
        closed = await self._read(delivery)
        if closed is None:
            return NOT_CLOSED
        # Full jitter, because many deliveries may wait for the same receiver.
        spread = random.random()  # noqa: S311 - spreads load, keeps no secret
        delay = min(timedelta(seconds=2.0 ** min(info.attempt - 1, 9)), _MAX_STEP) * spread
        converter = activity.client().data_converter
        attempted = await self._callbacks.deliver(delivery, closed, converter, attempt=info.attempt)
        if attempted.is_done:
            return str(attempted.meaning.value)
        if attempted.meaning is Meaning.REFUSED:
            message = "the receiver refused the completion"
            raise ApplicationError(message, type=COMPLETION_REFUSED, non_retryable=True)
        if attempted.is_busy:
            # The attempt ends at once, so that a receiver that hangs holds no slot of the worker.
            delay = _BUSY_STEP * (0.5 + spread)
        message = "the receiver is not ready"
        # If a delay passes the deadline, the server ends the delivery at once.
        remaining = info.scheduled_time - info.started_time + (info.schedule_to_close_timeout or timedelta.max)
        delay = max(min(max(delay, attempted.retry_after or _MIN_STEP), remaining / 2), _MIN_STEP)
        raise ApplicationError(message, type=RECEIVER_NOT_READY, next_retry_delay=delay)

    async def _read(self, delivery: Delivery) -> CloseEvent | None:
        try:
            return await read_close_event(activity.client(), delivery.workflow_id, delivery.run_id)
        except RPCError as error:
            if not is_missing(error):
                raise
            message = "the target's run is no longer kept: its retention has passed"
            raise ApplicationError(message, type=OUTCOME_NOT_KEPT, non_retryable=True) from None
