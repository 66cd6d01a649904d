"""The delivery workflow, and the names that it shares with its activities. Workflow-safe."""

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy, VersioningBehavior

from handler.delivery.records import Delivery

DELIVER_ACTIVITY = "bridge.deliver_completion"
DELIVERY_WORKFLOW = "bridge.Delivery"
WATCH_CALLERS_ACTIVITY = "bridge.watch_callers"
CANCEL_ABANDONED_ACTIVITY = "bridge.cancel_abandoned"

COMPLETION_REFUSED = "bridge.CompletionRefused"
RECEIVER_NOT_READY = "bridge.ReceiverNotReady"
OUTCOME_NOT_KEPT = "bridge.OutcomeNotKept"

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Of one attempt: the request's 10 seconds, and some for the worker."""

WATCH_TIMEOUT = timedelta(minutes=5)
"""Of one look at all the calls of a target."""

MAX_ATTEMPTS = 2**31 - 1
"""Named in every retry policy of ours, because 0 means the cluster's default, which may be three."""

RETRY_POLICY = RetryPolicy(
    initial_interval=timedelta(seconds=1),
    backoff_coefficient=2.0,
    maximum_interval=timedelta(minutes=5),
    maximum_attempts=MAX_ATTEMPTS,
)
"""For attempts whose worker was killed. All others name the delay until the next attempt."""


# Outside the sandbox: it is our own code, and importing it anew for every delivery would cost more than running it.
@workflow.defn(name=DELIVERY_WORKFLOW, sandboxed=False)
class DeliveryWorkflow:
    """Repeats the delivery of one outcome until the receiver takes or refuses it, or the deadline is over."""

    @workflow.run
    async def run(self, delivery: Delivery) -> str:
        """Returns what the receiver answered; fails where it refused or could not be reached in time."""
        remaining = timedelta(milliseconds=delivery.call.deadline_ms) - timedelta(seconds=workflow.now().timestamp())
        answer: str = await workflow.execute_activity(
            DELIVER_ACTIVITY,
            delivery,
            result_type=str,
            # Even past the deadline one attempt is made: the outcome exists, and the caller's clock decides.
            schedule_to_close_timeout=max(remaining, ATTEMPT_TIMEOUT),
            start_to_close_timeout=ATTEMPT_TIMEOUT,
            retry_policy=RETRY_POLICY,
            summary=f"to {delivery.call.caller}",
        )
        return answer


# A versioned worker refuses workflows without a behavior, and on an unversioned one (server 1.29) they would hang.
@workflow.defn(name=DELIVERY_WORKFLOW, sandboxed=False, versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class VersionedDeliveryWorkflow(DeliveryWorkflow):
    """The same, for versioned workers."""

    @workflow.run
    async def run(self, delivery: Delivery) -> str:
        return await super().run(delivery)
