"""The delivery workflow, and the names that it shares with its activities. Workflow-safe."""

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
WATCH_CALLERS_ACTIVITY = "bridge.watch_callers"
CANCEL_ABANDONED_ACTIVITY = "bridge.cancel_abandoned"
OWN_ACTIVITIES = (DELIVER_ACTIVITY, REPORT_UNDELIVERED_ACTIVITY, WATCH_CALLERS_ACTIVITY, CANCEL_ABANDONED_ACTIVITY)

COMPLETION_REFUSED = "bridge.CompletionRefused"
RECEIVER_NOT_READY = "bridge.ReceiverNotReady"
OUTCOME_NOT_KEPT = "bridge.OutcomeNotKept"

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Timeout of one attempt: 10 seconds for the request, and 5 for the worker."""

_REPORT_TIMEOUT = timedelta(hours=1)
"""Time for which a report whose hook fails is repeated."""

WATCH_TIMEOUT = timedelta(minutes=5)
"""Timeout of one attempt to ask for all calls of a target."""

MAX_ATTEMPTS = 2**31 - 1
"""Set in every retry policy of ours, because 0 means the cluster's default, which may be three."""

RETRY_POLICY = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(minutes=5),
    maximum_attempts=MAX_ATTEMPTS,
)
"""Applies only if the worker was killed. All other attempts name the delay until the next attempt."""


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
