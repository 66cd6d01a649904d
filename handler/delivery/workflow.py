"""The delivery workflow: how often and how long a delivery is tried. It shares names with its activities.

Workflow-safe.
"""

import contextlib
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy, VersioningBehavior
from temporalio.exceptions import ActivityError, ApplicationError

from bridge.workflow.own_activity import start_own_activity
from handler.delivery.records import Delivery

DELIVER_ACTIVITY = "bridge.deliver_completion"
DELIVERY_WORKFLOW = "bridge.Delivery"
REPORT_UNDELIVERED_ACTIVITY = "bridge.report_undelivered"

COMPLETION_REFUSED = "bridge.CompletionRefused"
RECEIVER_NOT_READY = "bridge.ReceiverNotReady"
OUTCOME_NOT_KEPT = "bridge.OutcomeNotKept"

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Timeout of one attempt: 10 seconds for the request, and 5 for the worker."""

_REPORT_TIMEOUT = timedelta(hours=1)
"""Time for which a report whose hook fails is repeated."""

_MIN_STEP, _MAX_STEP = timedelta(milliseconds=50), timedelta(minutes=5)
_BUSY_STEP = timedelta(seconds=2)

MAX_ATTEMPTS = 2**31 - 1
"""Set in every retry policy of ours, because 0 means the cluster's default, which may be three."""

RETRY_POLICY = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    backoff_coefficient=2.0,
    maximum_interval=_MAX_STEP,
    maximum_attempts=MAX_ATTEMPTS,
)
"""Applies only if the worker was killed. All other attempts name the delay until the next attempt."""


def next_delay(attempt: int | None, *, retry_after: timedelta | None, remaining: timedelta, spread: float) -> timedelta:
    """Return the delay until a delivery is tried again.

    Args:
        attempt: Number of the attempt that failed. None if it sent nothing, because its destination was full. Such an
            attempt ends at once, so that a receiver that hangs holds no slot of the worker.
        retry_after: The wait that the receiver asked for.
        remaining: Time to the deadline. The server would end a delivery whose delay passes the deadline.
        spread: In [0, 1]. Many deliveries may wait for the same receiver.
    """
    if attempt is None:
        step = _BUSY_STEP * (0.5 + spread)
    else:
        step = min(timedelta(seconds=2.0 ** min(attempt - 1, 9)), _MAX_STEP) * spread
    return max(min(max(step, retry_after or _MIN_STEP), remaining / 2), _MIN_STEP)


def start_activity(
    name: str, *args: object, attempt: timedelta = ATTEMPT_TIMEOUT, result_type: Any = None, **options: Any
) -> workflow.ActivityHandle[Any]:
    """Start an activity of the bridge on this worker. *attempt* is the timeout of one attempt.

    The other *options* are those of `workflow.start_activity`.
    """
    options |= {"args": args, "start_to_close_timeout": attempt, "retry_policy": RETRY_POLICY}
    return start_own_activity(workflow.start_activity, name, result_type=result_type, **options)


def _reason(error: BaseException) -> str:
    """Return the error type of a delivery's last attempt. A timeout that passed first has that error as its cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error.type or "" if isinstance(error, ApplicationError) else RECEIVER_NOT_READY


# Not sandboxed, because importing our own code again for every delivery would cost more than running it.
@workflow.defn(name=DELIVERY_WORKFLOW, sandboxed=False)
class DeliveryWorkflow:
    """Repeats the delivery of one outcome until the receiver accepts or refuses it, or the deadline passes."""

    @workflow.run
    async def run(self, delivery: Delivery) -> str:
        """Return what the receiver answered. The workflow fails if it refused or could not be reached in time."""
        remaining = timedelta(milliseconds=delivery.call.deadline_ms) - timedelta(seconds=workflow.now().timestamp())
        try:
            # Even after the deadline, make one attempt: the caller's clock decides whether it is late.
            limit, summary = max(remaining, ATTEMPT_TIMEOUT), f"to {delivery.call.caller}"
            answer: str = await start_activity(
                DELIVER_ACTIVITY, delivery, result_type=str, schedule_to_close_timeout=limit, summary=summary
            )
        except ActivityError as error:
            # If the report fails too, the error of the delivery is what people must see.
            with contextlib.suppress(ActivityError):
                await start_activity(
                    *(REPORT_UNDELIVERED_ACTIVITY, delivery, _reason(error)),
                    schedule_to_close_timeout=_REPORT_TIMEOUT,
                    summary="not delivered",
                )
            raise
        return answer


# A versioned worker refuses workflows without a behavior. On an unversioned worker (server 1.29) this one would hang.
@workflow.defn(name=DELIVERY_WORKFLOW, sandboxed=False, versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class VersionedDeliveryWorkflow(DeliveryWorkflow):
    """The same workflow, for versioned workers."""

    @workflow.run
    async def run(self, delivery: Delivery) -> str:
        """Run as the base class does. The SDK requires a `run` in the decorated class."""
        return await super().run(delivery)
