"""An order that is paid by an activity, which calls the payment team's HTTP API."""

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentResponse
    from examples.payments.order import Order, OrderReceipt
    from examples.payments.settings import ORDER_DEADLINE

PAY_ACTIVITY = "pay"
"""Activity type of both wrappers."""
WRAPPER_TIMEOUT = timedelta(minutes=5)
"""Of one attempt of a wrapper's activity: longer than any payment measured here."""
HEARTBEAT_TIMEOUT = timedelta(seconds=30)
"""Of the wrapper that polls: it heartbeats at every poll."""


@workflow.defn
class WrapperOrderWorkflow:
    """Has an order paid by an activity that calls the payment team's HTTP API."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is not needed: the activity knows its API."""
        del queue
        payment = await workflow.execute_activity(
            PAY_ACTIVITY,
            PaymentRequest(order_id=order.order_id, amount=order.amount),
            result_type=PaymentResponse,
            schedule_to_close_timeout=ORDER_DEADLINE,
            start_to_close_timeout=WRAPPER_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
        )
        return OrderReceipt(order_id=order.order_id, payment_id=payment.payment_id, status=payment.status)
