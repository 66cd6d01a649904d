"""The order team's workflow that calls the bad handler: alone, because the sandbox imports all of its module."""

from datetime import timedelta

from temporalio import workflow

import bridge

with workflow.unsafe.imports_passed_through():
    from examples.payments.contract import PaymentRequest, PaymentService

BAD = "bad"
"""Name of the bad peer: as a caller, as a handler, and of its endpoint."""


@workflow.defn
class BadOrderWorkflow:
    """Calls the bad handler, which gives no outcome."""

    @workflow.run
    async def run(self, order_id: str) -> None:
        """Wait until the workflow is terminated."""
        payments = bridge.create_client(service=PaymentService, endpoint=BAD)
        request = PaymentRequest(order_id=order_id, amount=1)
        await payments.execute_operation(PaymentService.process, request, schedule_to_close_timeout=timedelta(hours=1))
