"""The code of docs/migration.md: one order that waits for its payment in several ways."""

import asyncio
from dataclasses import asdict
from datetime import timedelta

from aiohttp import ClientSession, web
from nexusrpc.handler import service_handler
from temporalio import activity, nexus, workflow
from temporalio.client import Client
from temporalio.common import RetryPolicy, WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError

import bridge
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
from examples.payments.payments import PaymentWorkflow


class PaymentApi:
    def __init__(self, url: str) -> None:
        self._url = url

    @activity.defn
    async def wait_for_payment(self, request: PaymentRequest) -> PaymentResponse:
        place = f"{self._url}/payments/{request.order_id}"
        async with ClientSession(raise_for_status=True) as http:
            await http.put(place, json=asdict(request))
            while True:
                activity.heartbeat()
                async with http.get(place) as answer:
                    payment = await answer.json()
                if payment["status"] == "declined":
                    raise ApplicationError(payment["reason"], type="CardDeclined")
                if payment["status"] != "pending":
                    return PaymentResponse(payment_id=payment["payment_id"], status=payment["status"])
                await asyncio.sleep(1)


async def paid_by_polling(request: PaymentRequest) -> PaymentResponse:
    return await workflow.execute_activity_method(
        PaymentApi.wait_for_payment,
        request,
        start_to_close_timeout=timedelta(days=7),
        heartbeat_timeout=timedelta(seconds=30),
        retry_policy=RetryPolicy(non_retryable_error_types=["CardDeclined"]),
    )


async def paid_over_the_bridge(request: PaymentRequest) -> PaymentResponse:
    payments = bridge.create_client(service=PaymentService, endpoint="payments")
    return await payments.execute_operation(
        PaymentService.process, request, schedule_to_close_timeout=timedelta(days=7)
    )


@workflow.defn(name="PaidOrder")
class PaidOrder:
    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        if workflow.patched("payments-over-the-bridge"):
            return await paid_over_the_bridge(request)
        return await paid_by_polling(request)


async def paid_by_a_child(request: PaymentRequest) -> PaymentResponse:
    return await workflow.execute_child_workflow(
        PaymentWorkflow.run,
        request,
        id=f"payment-{request.order_id}",
        task_queue="payment-queue",
        execution_timeout=timedelta(days=7),
    )


@service_handler(service=PaymentService)
class Payments:
    @nexus.workflow_run_operation
    async def process(
        self, ctx: nexus.WorkflowRunOperationContext, request: PaymentRequest
    ) -> nexus.WorkflowHandle[PaymentResponse]:
        return await ctx.start_workflow(PaymentWorkflow.run, request, id=f"payment-{request.order_id}")


async def paid_over_nexus(request: PaymentRequest) -> PaymentResponse:
    payments = workflow.create_nexus_client(service=PaymentService, endpoint="payments")
    return await payments.execute_operation(
        PaymentService.process, request, schedule_to_close_timeout=timedelta(days=7)
    )


async def paid_over_either(request: PaymentRequest) -> PaymentResponse:
    payments = bridge.create_client(service=PaymentService, endpoint="payments", transport="nexus")
    return await payments.execute_operation(
        PaymentService.process, request, schedule_to_close_timeout=timedelta(days=7)
    )


WAYS = {each.__name__: each for each in (paid_by_a_child, paid_over_the_bridge, paid_over_nexus, paid_over_either)}


@workflow.defn
class AnyOrder:
    """Has an order paid in one of the `WAYS`."""

    @workflow.run
    async def run(self, way: str, request: PaymentRequest) -> PaymentResponse:
        return await WAYS[way](request)


@workflow.defn(name="PaidOrder")
class PollingOrder:
    """The order before the migration."""

    @workflow.run
    async def run(self, request: PaymentRequest) -> PaymentResponse:
        return await paid_by_polling(request)


def payment_api(client: Client) -> web.Application:
    """The routes of the payment team before the migration."""

    async def start(request: web.Request) -> web.Response:
        payment = PaymentRequest(**await request.json())
        await client.start_workflow(
            PaymentWorkflow.run,
            payment,
            id=f"payment-{payment.order_id}",
            task_queue="payment-queue",
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        )
        return web.Response(status=202)

    async def state(request: web.Request) -> web.Response:
        handle = client.get_workflow_handle_for(PaymentWorkflow.run, f"payment-{request.match_info['order']}")
        return web.json_response(asdict(await handle.result()))

    app = web.Application()
    app.add_routes([web.put("/payments/{order}", start), web.get("/payments/{order}", state)])
    return app
