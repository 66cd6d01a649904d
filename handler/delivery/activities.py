"""The activities of a delivery: one attempt, and the report of an outcome that was not delivered.

The dispatcher makes the first attempt to deliver without a workflow. If that attempt fails, a delivery workflow repeats
it, which people can see. A delivery that was finally refused is a failed workflow: it can be listed and repeated.
"""

import asyncio
import contextlib
import inspect
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError

from bridge.protocol.answers import Meaning
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.temporal.rpc_status import is_missing
from handler.delivery.callback_client import CallbackClient
from handler.delivery.close_event import CloseEvent, read_close_event
from handler.delivery.records import Delivery
from handler.delivery.workflow import (
    COMPLETION_REFUSED,
    DELIVER_ACTIVITY,
    OUTCOME_NOT_KEPT,
    RECEIVER_NOT_READY,
    REPORT_UNDELIVERED_ACTIVITY,
    next_delay,
)
from handler.user_code.threads import BoundedThreads, is_cancellation

NOT_CLOSED = "not closed"
"""Result of a delivery whose run turned out to be open, or continued as another run."""

_THREADS = 4

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


def require_hook(function: object) -> None:
    """Refuse a function for undelivered outcomes that could never be called.

    Raises:
        TypeError: It cannot be called with an outcome.
    """
    try:
        # Some functions that are written in C have no signature, which is a ValueError.
        with contextlib.suppress(ValueError):
            inspect.signature(cast("OnUndelivered", function)).bind(None)
    except TypeError:
        message = "on_undelivered must be a function of (outcome)"
        raise TypeError(message) from None


class DeliveryActivities:
    """The activities, for one worker."""

    def __init__(self, *, callbacks: CallbackClient, metrics: Metrics, on_undelivered: OnUndelivered | None) -> None:
        self._callbacks = callbacks
        self._metrics = metrics
        self._on_undelivered = on_undelivered
        # Threads of its own: a function that never returns must not take those that asyncio needs for host names.
        self._threads = BoundedThreads(threads=_THREADS, waiting=0)

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
        converter = activity.client().data_converter
        attempted = await self._callbacks.deliver(delivery, closed, converter, attempt=info.attempt)
        if attempted.is_done:
            return str(attempted.meaning.value)
        if attempted.meaning is Meaning.REFUSED:
            message = "the receiver refused the completion"
            raise ApplicationError(message, type=COMPLETION_REFUSED, non_retryable=True)
        message = "the receiver is not ready"
        delay = next_delay(
            None if attempted.is_busy else info.attempt,
            retry_after=attempted.retry_after,
            remaining=info.scheduled_time - info.started_time + (info.schedule_to_close_timeout or timedelta.max),
            spread=random.random(),  # noqa: S311 - spreads load, keeps no secret
        )
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
        if self._on_undelivered is None:
            return
        try:
            # In a thread, because a plain function may block. If no thread is free, Temporal repeats the activity.
            loop = asyncio.get_running_loop()
            running = await loop.run_in_executor(self._threads, self._on_undelivered, outcome)
            if inspect.isawaitable(running):
                await running
        except BaseException as error:
            if isinstance(error, Exception) or is_cancellation(error):
                raise
            # SystemExit would end the worker.
            raise RuntimeError(type(error).__name__) from None
