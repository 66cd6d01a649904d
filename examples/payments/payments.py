"""The payment team's workflow: an ordinary workflow with one decorator. Its code does not mention callers or HTTP.

The amount decides its behaviour, so that the Temporal CLI is enough to try everything. Up to 100 is paid at once, up to
1 000 settles after some seconds, up to 10 000 waits for a reviewer. Above that the card is declined.
"""

import asyncio

from temporalio import workflow
from temporalio.exceptions import ApplicationError

from bridge import emits_callback

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
    from examples.payments.settings import SETTLEMENT

PAYMENT_QUEUE = "payment-queue"

PAID_AT_ONCE = 100
SETTLES = 1_000
NEEDS_REVIEW = 10_000


def check_payment(request: PaymentRequest) -> None:
    """Refuse an amount that can never be paid, before the workflow starts.

    Raises:
        ValueError: The amount is not positive.
    """
    if not request.amount > 0:
        message = "the amount must be positive"
        raise ValueError(message)


@emits_callback(
    service=PaymentService,
    operation=PaymentService.process,
    workflow_id=lambda request: f"payment-{request.order_id}",
    check=check_payment,
)
@workflow.defn
class PaymentWorkflow:
    """Pays for one order, once."""

    def __init__(self) -> None:
        self._verdict: str | None = None

    @workflow.signal
    def approve(self) -> None:
        """A reviewer approves the payment."""
        self._verdict = self._verdict or "approved"

    @workflow.signal
    def reject(self) -> None:
        """A reviewer rejects the payment."""
        self._verdict = self._verdict or "rejected"

    @workflow.query
    def status(self) -> str:
        """State of the payment."""
        return self._verdict or "pending"

    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        """Charge the order.

        Raises:
            ApplicationError: `CardDeclined` or `PaymentRejected`.
        """
        payment_id = f"p-{request.order_id}"
        if request.amount > NEEDS_REVIEW:
            _decline(request)
        elif request.amount > SETTLES:
            try:
                await workflow.wait_condition(lambda: self._verdict is not None)
            except asyncio.CancelledError:
                # The money was reserved during the review. Refund it before the payment ends as canceled.
                await self._refund()
                raise
            if self._verdict == "rejected":
                message = "rejected by the reviewer"
                raise ApplicationError(message, payment_id, type="PaymentRejected", non_retryable=True)
            return PaymentResponse(payment_id=payment_id, status="approved")
        elif request.amount > PAID_AT_ONCE:
            await asyncio.sleep(SETTLEMENT.total_seconds())
        return PaymentResponse(payment_id=payment_id, status="paid")

    async def _refund(self) -> None:
        await asyncio.sleep(0.1)
        self._verdict = "refunded"


def _decline(request: PaymentRequest) -> None:
    issuer = ApplicationError("insufficient funds", type="IssuerRefused", non_retryable=True)
    message = "card declined"
    raise ApplicationError(
        message, {"order_id": request.order_id, "limit": NEEDS_REVIEW}, type="CardDeclined", non_retryable=True
    ) from issuer
