"""The processes that the bridge is measured against, and its order worker on a queue of its own.

`python -m scripts.benchmark.workers ROLE QUEUE`.

Both patterns of activity wrapper are written as a careful team writes them: one HTTP session kept alive, a bearer
token, access logs, and the API in the same process as the workflow's worker. Therefore the API starts workflows
eagerly, like the bridge's handler. All workers have the SDK's default options, and a sandbox that shares the same
modules.
"""

import argparse
import asyncio
import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import aiohttp
import nexusrpc
from aiohttp import web
from temporalio import activity, nexus
from temporalio.client import Client, WorkflowExecutionStatus, WorkflowFailureError
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

from bridge.admin import command
from bridge.http.application import AccessLogger
from bridge.http.listener import stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.runtime.user_modules import import_module
from bridge.temporal.connection import connect
from bridge.temporal.worker_plugin import WORKFLOW_SAFE_MODULES
from bridge.workflow.targets import Targets
from caller import CallerPlugin
from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService
from examples.payments.orders import OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from handler import HandlerPlugin
from scripts.benchmark.order_workflows.child import ChildOrderWorkflow
from scripts.benchmark.order_workflows.nexus import NexusOrderWorkflow
from scripts.benchmark.order_workflows.wrapper import PAY_ACTIVITY, WrapperOrderWorkflow

POLL_INTERVAL_S = 5.0
TOKEN_VARIABLE = "BENCH_API_TOKEN"
"""Environment variable of the bearer token between a wrapper and its API."""


@nexusrpc.handler.service_handler(service=PaymentService)
class NexusPayments:
    """The payment team's native Nexus service."""

    def __init__(self, *, is_eager: bool) -> None:
        """*is_eager*: start payments eagerly, as the bridge's handler does where it hosts their worker."""
        self._is_eager = is_eager

    @nexus.workflow_run_operation
    async def process(
        self, ctx: nexus.WorkflowRunOperationContext, request: PaymentRequest
    ) -> nexus.WorkflowHandle[PaymentResponse]:
        """Back the operation by a payment."""
        return await ctx.start_workflow(
            PaymentWorkflow.run, request, id=f"payment-{request.order_id}", request_eager_start=self._is_eager
        )


class PaymentApi:
    """The HTTP API in front of the payments, for both wrappers."""

    def __init__(self, client: Client, *, queue: str, token: str, is_eager: bool) -> None:
        self._client = client
        self._queue = queue
        self._authorization = f"Bearer {token}".encode()
        self._is_eager = is_eager

    def app(self) -> web.Application:
        """Its application."""
        app = web.Application(middlewares=[self._authenticate])
        app.router.add_post("/payments", self._start)
        app.router.add_post("/payments/result", self._execute)
        app.router.add_get("/payments/{id}", self._status)
        return app

    @web.middleware
    async def _authenticate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._authorization):
            raise web.HTTPUnauthorized
        return await handler(request)

    async def _begin(self, request: web.Request) -> Any:
        payment = PaymentRequest(**await request.json())
        return await self._client.start_workflow(
            PaymentWorkflow.run,
            payment,
            id=f"payment-{payment.order_id}",
            task_queue=self._queue,
            request_eager_start=self._is_eager,
        )

    async def _execute(self, request: web.Request) -> web.Response:
        """Pattern 1A: answer when the payment has ended."""
        handle = await self._begin(request)
        return await _result(handle)

    async def _start(self, request: web.Request) -> web.Response:
        """Pattern 1B: answer at once."""
        handle = await self._begin(request)
        return web.json_response({"id": handle.id}, status=202)

    async def _status(self, request: web.Request) -> web.Response:
        handle = self._client.get_workflow_handle(request.match_info["id"], result_type=PaymentResponse)
        try:
            status = (await handle.describe()).status
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                raise web.HTTPNotFound from None
            raise
        if status is WorkflowExecutionStatus.RUNNING:
            return web.json_response({"status": "running"}, status=202)
        return await _result(handle)


async def _result(handle: Any) -> web.Response:
    try:
        return web.json_response(asdict(await handle.result()))
    except WorkflowFailureError as error:
        return web.json_response({"error": str(error.cause)}, status=424)


class SyncWrapper:
    """Pattern 1A: one request, held until the payment has ended."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    @activity.defn(name=PAY_ACTIVITY)
    async def pay(self, request: PaymentRequest) -> PaymentResponse:
        """Ask, and wait for the answer. Heartbeats show the server that this worker is alive."""
        asking = asyncio.ensure_future(self._ask(request))
        while not (await asyncio.wait({asking}, timeout=POLL_INTERVAL_S))[0]:
            activity.heartbeat()
        return await asking

    async def _ask(self, request: PaymentRequest) -> PaymentResponse:
        async with self._session.post("/payments/result", json=asdict(request)) as response:
            response.raise_for_status()
            return PaymentResponse(**await response.json())


class PollWrapper:
    """Pattern 1B: start, then ask every five seconds."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    @activity.defn(name=PAY_ACTIVITY)
    async def pay(self, request: PaymentRequest) -> PaymentResponse:
        """Start, then poll; the payment's id rides on the heartbeats, so that another attempt goes on polling."""
        details = activity.info().heartbeat_details
        payment_id: str = details[0] if details else await self._start(request)
        while True:
            activity.heartbeat(payment_id)
            await asyncio.sleep(POLL_INTERVAL_S)
            async with self._session.get(f"/payments/{payment_id}") as response:
                response.raise_for_status()
                if response.status == 200:
                    return PaymentResponse(**await response.json())

    async def _start(self, request: PaymentRequest) -> str:
        async with self._session.post("/payments", json=asdict(request)) as response:
            response.raise_for_status()
            return str((await response.json())["id"])


def _plain_runner() -> SandboxedWorkflowRunner:
    """The sandbox as the bridge's plugins set it up."""
    return SandboxedWorkflowRunner(
        restrictions=SandboxRestrictions.default.with_passthrough_modules(*WORKFLOW_SAFE_MODULES)
    )


def _bridge_payments(module: str) -> dict[str, Any]:
    targets = Targets.in_module(import_module(module))
    return {"workflows": targets.workflow_classes, "plugins": [HandlerPlugin()]}


def _worker_options(arguments: argparse.Namespace, session: Callable[[], aiohttp.ClientSession]) -> dict[str, Any]:
    """What the worker of a role has in addition to the defaults."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "bridge-orders": lambda: {
            "workflows": [OrderWorkflow],
            "plugins": [CallerPlugin(serve_receiver=arguments.serve_receiver)],
        },
        "bridge-payments": lambda: _bridge_payments(arguments.module),
        "nexus-orders": lambda: {"workflows": [NexusOrderWorkflow]},
        "nexus-payments": lambda: {
            "workflows": [PaymentWorkflow],
            "nexus_service_handlers": [NexusPayments(is_eager=arguments.eager)],
        },
        "child-orders": lambda: {"workflows": [ChildOrderWorkflow]},
        "sync-orders": lambda: {"workflows": [WrapperOrderWorkflow], "activities": [SyncWrapper(session()).pay]},
        "poll-orders": lambda: {"workflows": [WrapperOrderWorkflow], "activities": [PollWrapper(session()).pay]},
        "payments": lambda: {"workflows": [PaymentWorkflow]},
    }
    options = kinds[arguments.role]()
    return options if "plugins" in options else {**options, "workflow_runner": _plain_runner()}


async def _run(arguments: argparse.Namespace) -> None:
    configure_logging("info")
    client = await connect()
    stop = stop_on_signals()
    async with AsyncExitStack() as stack:

        def session() -> aiohttp.ClientSession:
            opened = aiohttp.ClientSession(
                arguments.api,
                headers={"Authorization": f"Bearer {os.environ[TOKEN_VARIABLE]}"},
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, connect=3),
            )
            stack.push_async_callback(opened.close)
            return opened

        options = _worker_options(arguments, session)
        await stack.enter_async_context(Worker(client, task_queue=arguments.queue, **options))
        if arguments.port is not None:
            token = os.environ[TOKEN_VARIABLE]
            api = PaymentApi(client, queue=arguments.queue, token=token, is_eager=arguments.eager)
            await _serve(stack, api, arguments.port)
        print(json.dumps({"role": arguments.role, "pid": os.getpid()}), flush=True)
        await stop.wait()


async def _serve(stack: AsyncExitStack, api: PaymentApi, port: int) -> None:
    runner = web.AppRunner(
        api.app(),
        access_log_class=AccessLogger,
        access_log=logging.getLogger("bridge.access"),
        handler_cancellation=True,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()


ROLES = (
    *("bridge-orders", "bridge-payments", "nexus-orders", "nexus-payments"),
    *("child-orders", "payments", "sync-orders", "poll-orders"),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark.workers", description=__doc__)
    parser.add_argument("role", choices=ROLES)
    parser.add_argument("queue", help="task queue")
    parser.add_argument("--module", default="examples.payments.payments", help="of a bridge's target")
    parser.add_argument("--serve-receiver", action="store_true", help="serve the receiver of a bridge's orders, too")
    parser.add_argument("--port", type=int, help="of the HTTP API that a payment worker serves too")
    parser.add_argument(
        "--eager", action="store_true", help="start payments eagerly, from the API or the Nexus service"
    )
    parser.add_argument("--api", help="base URL of the API that a wrapper calls")
    parsed = parser.parse_args()
    command.run(lambda: _run(parsed), name=parser.prog)
