"""The activities of the bridge on the handler's worker: deliveries, and the watch over a target's callers.

The dispatcher makes the first attempt to deliver without a workflow. If that attempt fails, a delivery workflow repeats
it, which people can see. A delivery that was finally refused is a failed workflow: it can be listed and repeated.

If an operation declares it, a target for which no caller waits any more is canceled. One activity watches the calls of
one target. Each attempt asks the receivers of these calls and then names the delay until the next attempt. The watch
therefore costs one event of history, and one small request per call and interval.
"""

import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError

from bridge.errors import BridgeError
from bridge.protocol import headers as wire
from bridge.protocol.answers import Meaning, Sent
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.temporal.server import is_missing
from handler.delivery.callback_client import CallbackClient
from handler.delivery.close_event import CloseEvent, read_close_event
from handler.delivery.records import CallMemo, Delivery
from handler.delivery.workflow import (
    CANCEL_ABANDONED_ACTIVITY,
    COMPLETION_REFUSED,
    DELIVER_ACTIVITY,
    OUTCOME_NOT_KEPT,
    RECEIVER_NOT_READY,
    REPORT_UNDELIVERED_ACTIVITY,
    WATCH_CALLERS_ACTIVITY,
)

_MIN_STEP, _MAX_STEP = timedelta(milliseconds=50), timedelta(minutes=5)
_BUSY_STEP = timedelta(seconds=2)
_MAX_WATCH_STEP = timedelta(hours=1)

NOT_CLOSED = "not closed"
"""Result of a delivery whose run turned out to be open, or continued as another run."""
CALLER_WAITS = "bridge.CallerWaits"
"""Error type of an attempt after which a caller still waits, or may wait."""

_log = event_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class UndeliveredOutcome:
    """A delivery that ended without being accepted. A caller that renews still gets the outcome from its renewal."""

    delivery_id: str
    """Id for `callback-bridge deliveries show` and `redeliver`."""
    caller: str
    """Name of the caller in the settings."""
    operation: str
    """Service and operation of the call, as `service/operation`."""
    request_id: str
    """Request id of the call."""
    target_workflow_id: str
    """Workflow whose outcome was not delivered."""
    target_run_id: str
    """Run of that workflow that produced the outcome."""
    reason: str
    """Error type of the last attempt. For example, `bridge.ReceiverNotReady` if the receiver did not accept
    or refuse the outcome before the deadline."""


OnUndelivered = Callable[[UndeliveredOutcome], Awaitable[None] | None]
"""A function of the handler's team, plain or `async`. Each outcome is passed to it at least once, and again if the
function raises an error."""


class DeliveryActivities:
    """The activities, for one worker."""

    def __init__(
        self, *, callbacks: CallbackClient, metrics: Metrics, on_undelivered: OnUndelivered | None, first_watch: float
    ) -> None:
        """*first_watch* is the time in seconds until a target's callers are asked for the first time."""
        self._callbacks = callbacks
        self._metrics = metrics
        self._on_undelivered = on_undelivered
        self._first_watch = timedelta(seconds=first_watch)
        self.all = (self.deliver_completion, self.report_undelivered, self.watch_callers, self.cancel_abandoned)
        """The methods that a worker registers."""

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

    @activity.defn(name=REPORT_UNDELIVERED_ACTIVITY)
    async def report_undelivered(self, delivery: Delivery, reason: str) -> None:
        """Log, count and pass on one undelivered outcome. *reason* is the error type of the last attempt."""
        call = delivery.call
        outcome = UndeliveredOutcome(
            delivery_id=delivery.key,
            caller=call.caller,
            operation=f"{call.service}/{call.operation}",
            request_id=call.request_id,
            target_workflow_id=delivery.workflow_id,
            target_run_id=delivery.run_id,
            reason=reason,
        )
        if activity.info().attempt == 1:
            extra = {f"bridge.{name}": getattr(outcome, name) for name in outcome.__dataclass_fields__}
            _log.error("bridge.outcome_undelivered", extra=extra)
            self._metrics.count("bridge_deliveries_failed", caller=call.caller, reason=reason)
        if self._on_undelivered is not None and inspect.isawaitable(running := self._on_undelivered(outcome)):
            await running

    @activity.defn(name=WATCH_CALLERS_ACTIVITY)
    async def watch_callers(self, calls: list[CallMemo]) -> None:
        """Ask once whether a caller waits. Returns when none of *calls* waits any more.

        Raises:
            ApplicationError: A caller waits, or may wait. The delay until the next attempt doubles up to an hour.
        """
        # The time is the server's, because a worker's clock that is ahead would abandon calls that wait.
        attempt, now = activity.info().attempt, activity.info().started_time
        step = min(self._first_watch * 2.0 ** min(attempt - 1, 20), _MAX_WATCH_STEP)
        # The first attempt begins with the target's start, when its caller certainly waits.
        if attempt > 1 and not any([await self._waits(call, now) for call in calls]):
            return
        last = max(datetime.fromtimestamp(call.deadline_ms / 1000, UTC) for call in calls)
        message = "a caller waits for this target"
        raise ApplicationError(
            message,
            type=CALLER_WAITS,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=max(min(step, last - now), timedelta(seconds=1)),
        )

    async def _waits(self, call: CallMemo, now: datetime) -> bool:
        """Whether *call* still waits *now*. If that is unknown, it counts as waiting."""
        if now.timestamp() * 1000 >= call.deadline_ms:
            return False
        if call.callback_url is None:
            # There is no receiver to ask. The caller polls until its deadline.
            return True
        # Send the headers of a completion: they may include the callback's own token.
        headers = call.callback_headers | {wire.OPERATION_STATE: wire.OperationState.RUNNING.value}
        try:
            answer = await self._callbacks.post(
                Sent.QUESTION, call.caller, call.callback_url, headers, b"", more=call.callback_headers
            )
        except BridgeError:
            return True
        return answer.meaning is not Meaning.GONE

    @activity.defn(name=CANCEL_ABANDONED_ACTIVITY)
    async def cancel_abandoned(self) -> None:
        """Request cancellation of the workflow that runs this activity."""
        info = activity.info()
        await activity.client().get_workflow_handle(info.workflow_id or "", run_id=info.workflow_run_id).cancel()
