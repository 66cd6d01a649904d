"""The order team's workflow. It calls a payment in another namespace like a child workflow."""

from temporalio import workflow
from temporalio.exceptions import ApplicationError, NexusOperationError

import bridge

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentService
    from examples.payments.order import Order, OrderReceipt
    from examples.payments.settings import FIRST_LEASE, ORDER_DEADLINE, RENEWALS

ORDER_QUEUE = "order-queue"


@workflow.defn
class OrderWorkflow:
    """Has an order paid."""

    @workflow.run
    async def run(self, order: Order) -> OrderReceipt:
        """Have the order paid.

        Raises:
            ApplicationError: `OrderNotPaid`, with the payment team's failure as its detail.
        """
        payments = bridge.create_client(
            service=PaymentService, endpoint="payments", first_lease=FIRST_LEASE, renewals=RENEWALS
        )
        try:
            payment = await payments.execute_operation(
                PaymentService.process,
                PaymentRequest(order_id=order.order_id, amount=order.amount),
                schedule_to_close_timeout=ORDER_DEADLINE,
            )
        except NexusOperationError as error:
            reason = error.cause
            if not isinstance(reason, ApplicationError):
                raise
            # The payment's own failure, with the type, message and cause that the other namespace raised.
            said = {
                "type": reason.type,
                "message": reason.message,
                "cause": str(reason.cause) if reason.cause else None,
            }
            message = f"order {order.order_id} was not paid: {reason.message}"
            raise ApplicationError(message, said, type="OrderNotPaid", non_retryable=True) from error
        return OrderReceipt(order_id=order.order_id, payment_id=payment.payment_id, status=payment.status)
