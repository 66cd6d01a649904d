"""An order that is paid by a child workflow, in its own namespace."""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentResponse
    from examples.payments.order import Order, OrderReceipt
    from examples.payments.settings import ORDER_DEADLINE


@workflow.defn
class ChildOrderWorkflow:
    """Has an order paid by a child workflow, in its own namespace."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is the task queue of the payments."""
        payment: PaymentResponse = await workflow.execute_child_workflow(
            "PaymentWorkflow",
            PaymentRequest(order_id=order.order_id, amount=order.amount),
            id=f"payment-{order.order_id}",
            task_queue=queue,
            result_type=PaymentResponse,
            execution_timeout=ORDER_DEADLINE,
        )
        return OrderReceipt(order_id=order.order_id, payment_id=payment.payment_id, status=payment.status)
