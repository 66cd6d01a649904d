"""The example's payment, with its outcome told by the handler's Temporal server instead of its own worker."""

from temporalio import workflow

from bridge import emits_callback
from examples.payments import payments
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService


@emits_callback(
    service=PaymentService,
    operation=PaymentService.process,
    workflow_id=lambda request: f"payment-{request.order_id}",
    check=payments.check_payment,
    delivery="server",
)
@workflow.defn(name="PaymentWorkflow")
class ServerToldPaymentWorkflow(payments.PaymentWorkflow):
    """Pays for one order, once."""

    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        """As its base."""
        return await super().run(request)
