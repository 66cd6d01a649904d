"""The delivery workflow, and the names that it shares with the interceptor and the activity. Workflow-safe."""

from datetime import timedelta

from temporalio import workflow
from temporalio.common import RawValue, RetryPolicy

from handler.delivery.records import Delivery

DELIVER_ACTIVITY = "bridge.deliver_completion"
DELIVERY_WORKFLOW = "bridge.Delivery"
WATCH_CALLERS_ACTIVITY = "bridge.watch_callers"
CANCEL_ORPHAN_ACTIVITY = "bridge.cancel_orphan"

COMPLETION_REFUSED = "bridge.CompletionRefused"
RECEIVER_NOT_READY = "bridge.ReceiverNotReady"

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Of one attempt: the request's 10 seconds, and some for the worker."""

WATCH_TIMEOUT = timedelta(minutes=5)
"""Of one look at all the calls of a target."""

# The maximum of attempts is named, because 0 means the cluster's default.
RETRY_POLICY = RetryPolicy(
    initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=5), maximum_attempts=2**31 - 1
)
"""For attempts that end without a word, their worker killed; the others name their own delay."""


# Outside the sandbox: it is our own code, and importing it anew for every delivery would cost more than running it.
@workflow.defn(name=DELIVERY_WORKFLOW, sandboxed=False)
class DeliveryWorkflow:
    """Carries one completion on until the receiver takes or refuses it, or its deadline is over."""

    @workflow.run
    async def run(self, delivery: Delivery, content: RawValue) -> str:
        """Returns what the receiver said; fails where it refused or could not be reached in time."""
        remaining = timedelta(milliseconds=delivery.deadline_ms) - timedelta(seconds=workflow.now().timestamp())
        answer: str = await workflow.execute_activity(
            DELIVER_ACTIVITY,
            args=[delivery, content],
            result_type=str,
            # Even past the deadline one attempt is made: the outcome is here, and the caller's clock decides.
            schedule_to_close_timeout=max(remaining, ATTEMPT_TIMEOUT),
            start_to_close_timeout=ATTEMPT_TIMEOUT,
            retry_policy=RETRY_POLICY,
            summary=f"{delivery.state} to {delivery.caller}",
        )
        return answer
