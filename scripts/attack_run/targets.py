"""The payment team's operations, and one whose runs take the calls of every caller."""

import nexusrpc
from temporalio import workflow

from bridge import emits_callback
from examples.payments.payments import PaymentWorkflow

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentResponse

__all__ = ["PaymentWorkflow", "SharedService", "SharedWorkflow"]

SHARED_ID = "shared"


@nexusrpc.service
class SharedService:
    """An operation that callers share."""

    rates: nexusrpc.Operation[PaymentRequest, PaymentResponse]


@emits_callback(
    service=SharedService, operation=SharedService.rates, workflow_id=lambda _: SHARED_ID, attach_across_callers=True
)
@workflow.defn
class SharedWorkflow:
    """Ends when it is released. Until then calls attach to it."""

    def __init__(self) -> None:
        self._is_released = False

    @workflow.signal
    def release(self) -> None:
        """End the run."""
        self._is_released = True

    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        """Wait for the release."""
        await workflow.wait_condition(lambda: self._is_released)
        return PaymentResponse(payment_id=request.order_id, status="released")
