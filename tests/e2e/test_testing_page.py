"""The tests that docs/testing.md shows, as teams would write them."""

import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, NexusOperationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer, Worker

from bridge.testing import FakeEndpoints, Pair
from examples.payments import payments as payments_module
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
from examples.payments.order import Order
from examples.payments.orders import OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from scripts.environment.server import Server
from tests.support.helpers import HANDLER

BINARY = Path(sys.executable).with_name("temporal-test-server")


@pytest_asyncio.fixture(loop_scope="session")
async def environment() -> AsyncIterator[WorkflowEnvironment]:
    async with await WorkflowEnvironment.start_time_skipping(test_server_existing_path=str(BINARY)) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="session")
async def client(server: Server) -> Client:
    return await Client.connect(server.address, namespace=HANDLER)


async def test_an_order_is_paid_after_two_days(environment: WorkflowEnvironment, fake_endpoints: FakeEndpoints) -> None:
    process = fake_endpoints.on(PaymentService.process, service=PaymentService, endpoint="payments")
    process.returns(PaymentResponse(payment_id="p-7", status="paid"), after=timedelta(days=2))
    client = environment.client
    async with Worker(client, task_queue="orders", workflows=[OrderWorkflow], plugins=[fake_endpoints]):
        order = Order(order_id="7", amount=12.5)
        receipt = await client.execute_workflow(OrderWorkflow.run, order, id="order-7", task_queue="orders")
    assert receipt.status == "paid"
    assert process.calls[0].input == PaymentRequest(order_id="7", amount=12.5)


async def test_a_declined_card_fails_the_order(environment: WorkflowEnvironment, fake_endpoints: FakeEndpoints) -> None:
    process = fake_endpoints.on(PaymentService.process, service=PaymentService, endpoint="payments")
    process.fails(ApplicationError("card declined", type="CardDeclined"))
    client = environment.client
    async with Worker(client, task_queue="orders", workflows=[OrderWorkflow], plugins=[fake_endpoints]):
        order = Order(order_id="8", amount=12.5)
        with pytest.raises(WorkflowFailureError) as raised:
            await client.execute_workflow(OrderWorkflow.run, order, id="order-8", task_queue="orders")
    assert isinstance(raised.value.cause, ApplicationError)
    assert raised.value.cause.type == "OrderNotPaid"


async def test_the_payment_team_answers_as_its_contract_says(client: Client) -> None:
    async with (
        Pair(payments_module, task_queue="payments", handler_client=client) as pair,
        Worker(client, task_queue="payments", workflows=[PaymentWorkflow]),
        pair.client(service=PaymentService) as payments,
    ):
        payment = await payments.execute_operation(PaymentService.process, PaymentRequest(order_id="7", amount=12.5))
        assert payment.status == "paid"
        review = await payments.start_operation(PaymentService.process, PaymentRequest(order_id="8", amount=5000.0))
        await client.get_workflow_handle("payment-8").signal(PaymentWorkflow.reject)
        with pytest.raises(NexusOperationError) as raised:
            await review.result()
    assert isinstance(raised.value.cause, ApplicationError)
    assert raised.value.cause.type == "PaymentRejected"


async def test_a_callback_is_lost_and_the_receiver_answers_503_twice(client: Client) -> None:
    async with Pair(payments_module, task_queue="payments", handler_client=client) as pair:
        pair.receiver.faults = ["lost", 503, 503, "answer lost", timedelta(seconds=1)]
        async with (
            Worker(client, task_queue="payments", workflows=[PaymentWorkflow], plugins=[pair.handler_plugin]),
            Worker(client, task_queue="orders", workflows=[OrderWorkflow], plugins=[pair.caller_plugin]),
        ):
            order = Order(order_id="9", amount=12.5)
            handle = await client.start_workflow(OrderWorkflow.run, order, id="order-9", task_queue="orders")
            assert (await handle.result()).status == "paid"
    await Replayer(workflows=[OrderWorkflow]).replay_workflow(await handle.fetch_history())
