"""Orders that a run makes and counts, on a real server, with a workflow that ends in every way."""

import uuid
from dataclasses import replace

from temporalio import workflow
from temporalio.client import (
    Client,
    FetchWorkflowHistoryEventsInput,
    Interceptor,
    OutboundInterceptor,
    WorkflowHistoryEventAsyncIterator,
)
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from examples.payments.order import Order
from examples.payments.orders import ORDER_QUEUE
from scripts.chaos_run.calls import Call, CallKind
from scripts.chaos_run.load import is_paid
from scripts.environment.server import Server
from tests.support.helpers import CALLER

PAID = Call(workflow_id="order", order_id="paid", kind=CallKind.AT_ONCE, at=0, own_s=0)


@workflow.defn(name="OrderWorkflow")
class Ending:
    """Ends as the id of its order says."""

    @workflow.run
    async def run(self, order: Order) -> None:
        if order.order_id == "fails":
            raise ApplicationError("not paid")
        await workflow.wait_condition(lambda: order.order_id == "paid")


class Unavailable(Interceptor):
    """Refuses to read a history, as a server does that was unavailable for some seconds."""

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002 -- the SDK's name
        return _NoHistory(next)


class _NoHistory(OutboundInterceptor):
    def fetch_workflow_history_events(
        self,
        input: FetchWorkflowHistoryEventsInput,  # noqa: A002 -- the SDK's name
    ) -> WorkflowHistoryEventAsyncIterator:
        raise RPCError("tcp connect error", RPCStatusCode.UNAVAILABLE, b"")


def named(order_id: str) -> Call:
    return replace(PAID, workflow_id=f"order-{uuid.uuid4()}", order_id=order_id)


async def test_an_order_that_fails_or_does_not_end_is_not_paid(server: Server) -> None:
    """Nor is one whose end cannot be read. The run counts it, and makes the next order."""
    client = await Client.connect(server.address, namespace=CALLER)
    blind = await Client.connect(server.address, namespace=CALLER, interceptors=[Unavailable()])
    async with Worker(client, task_queue=ORDER_QUEUE, workflows=[Ending], workflow_runner=UnsandboxedWorkflowRunner()):
        assert await is_paid(client, named("paid"), patience_s=60)
        assert not await is_paid(client, named("fails"), patience_s=60)
        assert not await is_paid(client, named("waits"), patience_s=0.5)
        assert not await is_paid(blind, named("paid"), patience_s=60)
