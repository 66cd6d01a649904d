"""An order that is paid by a native Nexus operation."""

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentService
    from examples.payments.order import Order, OrderReceipt
    from examples.payments.settings import ORDER_DEADLINE


def nexus_endpoint(queue: str) -> str:
    """The Nexus endpoint whose target is the worker on *queue*."""
    return f"bench-{queue}"


@workflow.defn
class NexusOrderWorkflow:
    """Has an order paid by a native Nexus operation."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is the task queue of the payment team."""
        payments = workflow.create_nexus_client(service=PaymentService, endpoint=nexus_endpoint(queue))
        payment = await payments.execute_operation(
            PaymentService.process,
            PaymentRequest(order_id=order.order_id, amount=order.amount),
            schedule_to_close_timeout=ORDER_DEADLINE,
        )
        return OrderReceipt(order_id=order.order_id, payment_id=payment.payment_id, status=payment.status)
