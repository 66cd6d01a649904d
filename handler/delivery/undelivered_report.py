"""Reports an outcome that was not delivered, by a log line, a counter and the hook of the handler's team."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from temporalio import activity

from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from handler.delivery.records import Delivery
from handler.delivery.workflow import REPORT_UNDELIVERED_ACTIVITY

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


class UndeliveredActivities:
    """The activity that reports undelivered outcomes, for one worker."""

    def __init__(self, *, metrics: Metrics, hook: OnUndelivered | None) -> None:
        self._metrics = metrics
        self._hook = hook

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
        if self._hook is not None and inspect.isawaitable(running := self._hook(outcome)):
            await running
