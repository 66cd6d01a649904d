"""The order workflow of the example, with the call itself replaced: what the bridge is measured against.

Workflow code only. Each does what `examples.payments.orders.OrderWorkflow` does around its call.
"""

from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
    from examples.payments.orders import Order, OrderReceipt
    from examples.payments.settings import ORDER_DEADLINE

PAY_ACTIVITY = "pay"
"""Activity type of both wrappers."""
WRAPPER_TIMEOUT = timedelta(minutes=5)
"""Of one attempt of a wrapper's activity: longer than any payment measured here."""
HEARTBEAT_TIMEOUT = timedelta(seconds=30)
"""Of the wrapper that polls: it heartbeats at every poll."""


def nexus_endpoint(queue: str) -> str:
    """The Nexus endpoint whose target is the worker on *queue*."""
    return f"bench-{queue}"


def _request(order: Order) -> PaymentRequest:
    return PaymentRequest(order_id=order.order_id, amount=order.amount)


def _receipt(order: Order, payment: PaymentResponse) -> OrderReceipt:
    return OrderReceipt(order_id=order.order_id, payment_id=payment.payment_id, status=payment.status)


@workflow.defn
class NexusOrderWorkflow:
    """Has an order paid by a native Nexus operation."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is the task queue of the payment team."""
        payments = workflow.create_nexus_client(service=PaymentService, endpoint=nexus_endpoint(queue))
        payment = await payments.execute_operation(
            PaymentService.process, _request(order), schedule_to_close_timeout=ORDER_DEADLINE
        )
        return _receipt(order, payment)


@workflow.defn
class ChildOrderWorkflow:
    """Has an order paid by a child workflow, in its own namespace."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is the task queue of the payments."""
        payment: PaymentResponse = await workflow.execute_child_workflow(
            "PaymentWorkflow",
            _request(order),
            id=f"payment-{order.order_id}",
            task_queue=queue,
            result_type=PaymentResponse,
            execution_timeout=ORDER_DEADLINE,
        )
        return _receipt(order, payment)


@workflow.defn
class WrapperOrderWorkflow:
    """Has an order paid by an activity that calls the payment team's HTTP API."""

    @workflow.run
    async def run(self, order: Order, queue: str) -> OrderReceipt:
        """*queue* is not needed: the activity knows its API."""
        del queue
        payment = await workflow.execute_activity(
            PAY_ACTIVITY,
            _request(order),
            result_type=PaymentResponse,
            schedule_to_close_timeout=ORDER_DEADLINE,
            start_to_close_timeout=WRAPPER_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
        )
        return _receipt(order, payment)
