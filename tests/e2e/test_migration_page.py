"""The code that docs/migration.md shows, before and after, on a real server."""

import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer
from temporalio.api.nexus.v1 import EndpointSpec, EndpointTarget
from temporalio.api.operatorservice.v1 import CreateNexusEndpointRequest, DeleteNexusEndpointRequest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle, WorkflowHistory
from temporalio.worker import Replayer, Worker

from bridge.testing import Pair
from examples.payments import payments as payments_module
from examples.payments.contract import PaymentRequest, PaymentResponse
from examples.payments.payments import PaymentWorkflow
from handler import HandlerPlugin
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.e2e.test_docs import blocks
from tests.support.helpers import HANDLER, assert_eventually
from tests.support.migrating import AnyOrder, PaidOrder, PaymentApi, Payments, PollingOrder, payment_api
from tests.support.world import RUNNER


def test_the_code_of_the_page_is_code_that_runs() -> None:
    """Each snippet of the page is a part of the module that these tests run."""
    source = (ROOT / "tests" / "support" / "migrating.py").read_text()
    snippets = blocks(ROOT / "docs" / "migration.md", "python")
    assert len(snippets) == 6
    for snippet in snippets:
        assert snippet in source


@dataclass(frozen=True)
class Teams:
    """Both teams, on one server and in one namespace, so that a child workflow and native Nexus work too."""

    client: Client
    pair: Pair

    def payment_worker(self, plugin: HandlerPlugin | None = None, *, nexus: Sequence[Any] = ()) -> Worker:
        return Worker(
            self.client,
            task_queue="payment-queue",
            workflows=[PaymentWorkflow],
            nexus_service_handlers=nexus,
            plugins=[plugin or self.pair.handler_plugin],
        )

    def order_worker(self, order: type[Any] = AnyOrder, *, activities: Sequence[Callable[..., Any]] = ()) -> Worker:
        return Worker(
            self.client,
            task_queue="order-queue",
            workflows=[order],
            activities=activities,
            plugins=[self.pair.caller_plugin],
            workflow_runner=RUNNER,
        )

    @property
    def native_plugin(self) -> HandlerPlugin:
        """The plugin of the payment team with `nexus = true`."""
        return HandlerPlugin(self.pair.handler_plugin._settings.model_copy(update={"nexus": True}))

    async def start(
        self, order: str, *arguments: str, workflow: str = "AnyOrder", amount: float = 12.5
    ) -> WorkflowHandle[Any, PaymentResponse]:
        """Start an order. Its way is the argument of `AnyOrder`."""
        return await self.client.start_workflow(
            workflow,
            args=[*arguments, PaymentRequest(order_id=order, amount=amount)],
            id=f"order-{uuid.uuid4().hex}",
            task_queue="order-queue",
            result_type=PaymentResponse,
        )

    async def pay(self, *arguments: str, workflow: str = "AnyOrder") -> WorkflowHistory:
        """Pay a new order, and return the history of its workflow."""
        order = uuid.uuid4().hex
        handle = await self.start(order, *arguments, workflow=workflow)
        assert await handle.result() == PaymentResponse(payment_id=f"p-{order}", status="paid")
        return await handle.fetch_history()


@pytest_asyncio.fixture(loop_scope="session")
async def teams(server: Server) -> AsyncIterator[Teams]:
    client = await Client.connect(server.address, namespace=HANDLER)
    async with Pair(payments_module, task_queue="payment-queue", handler_client=client) as pair:
        yield Teams(client, pair)


@pytest_asyncio.fixture(loop_scope="session")
async def endpoint(teams: Teams) -> AsyncIterator[None]:
    """The Nexus endpoint that an operator registers."""
    worker = EndpointTarget.Worker(namespace=HANDLER, task_queue="payment-queue")
    spec = EndpointSpec(name="payments", target=EndpointTarget(worker=worker))
    operator = teams.client.operator_service
    made = (await operator.create_nexus_endpoint(CreateNexusEndpointRequest(spec=spec))).endpoint
    yield
    await operator.delete_nexus_endpoint(DeleteNexusEndpointRequest(id=made.id, version=made.version))


def _activities(history: WorkflowHistory) -> list[str]:
    scheduled = [each.activity_task_scheduled_event_attributes for each in history.events]
    return [each.activity_type.name for each in scheduled if each.activity_id]


async def test_an_order_that_polls_goes_on_when_its_code_calls_over_the_bridge(teams: Teams) -> None:
    """The history of an order that polled replays with the changed code. A later order calls over the bridge."""
    async with TestServer(payment_api(teams.client)) as routes, teams.payment_worker():
        activities = [PaymentApi(str(routes.make_url("")).rstrip("/")).wait_for_payment]
        async with teams.order_worker(PollingOrder, activities=activities):
            polled = await teams.pay(workflow="PaidOrder")
        async with teams.order_worker(PaidOrder, activities=activities):
            called = await teams.pay(workflow="PaidOrder")
    assert _activities(polled) == ["wait_for_payment"]
    assert _activities(called) == ["bridge.start_operation"]
    await Replayer(workflows=[PaidOrder], workflow_runner=RUNNER).replay_workflow(polled)


async def test_a_child_workflow_and_an_operation_give_the_same_payment(teams: Teams) -> None:
    """The decorated workflow still runs as a child."""
    async with teams.payment_worker(), teams.order_worker():
        await teams.pay("paid_by_a_child")
        await teams.pay("paid_over_the_bridge")


@pytest.mark.usefixtures("endpoint")
async def test_nexus_and_the_bridge_serve_one_contract_at_once(teams: Teams) -> None:
    """First next to the team's own Nexus operation, then in place of it."""
    async with teams.order_worker():
        async with teams.payment_worker(nexus=[Payments()]):
            await teams.pay("paid_over_nexus")
            await teams.pay("paid_over_the_bridge")
        async with teams.payment_worker(teams.native_plugin):
            await teams.pay("paid_over_nexus")
            await teams.pay("paid_over_either")
            await teams.pay("paid_over_the_bridge")


async def test_two_handlers_of_one_nexus_service_are_refused_when_the_worker_is_made(teams: Teams) -> None:
    """With `nexus = true` the team's own handler of the service has to go."""
    with pytest.raises(RuntimeError, match="PaymentService"):
        teams.payment_worker(teams.native_plugin, nexus=[Payments()])


@pytest.mark.usefixtures("endpoint")
async def test_an_operation_outlives_the_handler_that_started_it_but_is_canceled_only_by_it(teams: Teams) -> None:
    """The plugin knows no token of the team's own handler. A call over the bridge does not join such a run."""
    orders = [uuid.uuid4().hex, uuid.uuid4().hex]
    async with teams.order_worker():
        async with teams.payment_worker(nexus=[Payments()]):
            ends, canceled = [await teams.start(each, "paid_over_nexus", amount=5000.0) for each in orders]
            for each in (ends, canceled):
                await assert_eventually(partial(_has_a_token, each))
        async with teams.payment_worker(teams.native_plugin):
            await teams.client.get_workflow_handle(f"payment-{orders[0]}").signal(PaymentWorkflow.approve)
            assert (await ends.result()).status == "approved"
            await canceled.cancel()
            await assert_eventually(partial(_refused_the_cancel, canceled))
            joining = await teams.start(orders[1], "paid_over_the_bridge", amount=5000.0)
            with pytest.raises(WorkflowFailureError) as raised:
                await joining.result()
    assert "the workflow id that this input leads to is taken" in repr(raised.value.cause.__cause__)
    await canceled.terminate()


async def _pending(handle: WorkflowHandle[Any, Any]) -> Sequence[Any]:
    return (await handle.describe()).raw_description.pending_nexus_operations


async def _has_a_token(handle: WorkflowHandle[Any, Any]) -> None:
    assert [bool(each.operation_token) for each in await _pending(handle)] == [True]


async def _refused_the_cancel(handle: WorkflowHandle[Any, Any]) -> None:
    assert ["no such operation" in str(each.cancellation_info) for each in await _pending(handle)] == [True]
