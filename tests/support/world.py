"""Both sides of the bridge on a real server and real sockets. A test can stop and start each part."""

import asyncio
import contextlib
import dataclasses
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from aiohttp import web
from multidict import CIMultiDict
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.nexus.v1 import EndpointSpec, EndpointTarget
from temporalio.api.operatorservice.v1 import CreateNexusEndpointRequest
from temporalio.client import Client, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError
from temporalio.runtime import Runtime
from temporalio.service import RPCError
from temporalio.worker import Worker
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner, SandboxRestrictions

import caller
import handler
from bridge.http.application import AccessLogger
from bridge.http.listener import ServiceRunner
from bridge.security.signatures import MessageKind, MessageVerifier
from bridge.workflow.call import Transport
from bridge.workflow.targets import Target, Targets
from caller.plugin import CallerPlugin
from caller.settings import CallerSettings
from examples.payments.orders import OrderWorkflow
from examples.payments.payments import PaymentWorkflow
from handler.authorization import Authorize
from handler.plugin import HandlerPlugin
from handler.settings import HandlerSettings
from handler.sweep.activity import start_sweep
from handler.user_code.threads import BoundedThreads
from scripts.environment.server import Server, free_ports
from tests.support.callers import CALLERS, CallingWorkflow, CallPlan
from tests.support.helpers import CALLER, HANDLER, Keys, assert_eventually, caller_settings, handler_settings
from tests.support.targets import TARGETS, Ask, Reply

# The sandbox would import the modules of the tests' workflows again for each of them, at every start of a worker and in
# every run: that took most of the suite's CPU. The sandbox with its default has tests of its own (test_sandbox.py).
RUNNER = SandboxedWorkflowRunner(
    restrictions=SandboxRestrictions.default.with_passthrough_modules("tests.support", "examples.payments")
)

_ECHO = re.compile(r"(/bridge)?(/c/[^/]+|/callbacks)")

Before = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


def clock() -> datetime:
    return datetime.now(UTC)


class Listener:
    """An application on a fixed port that can stop and start again, and that counts its requests.

    With *mount* it is part of another application, below that prefix; its listener has aiohttp's default limits.
    """

    def __init__(self, port: int, make: Callable[[], web.Application], *, mount: str = "") -> None:
        self.port = port
        self.mount = mount
        self.url = f"http://127.0.0.1:{port}{mount}"
        self.requests: list[tuple[str, int]] = []
        """Path with query, and status, of every request that was answered."""
        self.before: Before | None = None
        """Called before the service; its return value replaces the answer."""
        self.after: Callable[[], Awaitable[None]] | None = None
        """Called after the service has acted on a request, before the answer."""
        self.change: Callable[[web.Request, web.StreamResponse], web.StreamResponse] | None = None
        """Turns the service's answer into the one that is sent."""
        self._make = make
        self._runner: web.AppRunner | None = None
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        app = self._make()
        app.middlewares.insert(0, self._count)
        if self.mount:
            parent = web.Application()
            parent.add_subapp(self.mount, app)
            self._runner = web.AppRunner(parent, shutdown_timeout=1)
        else:
            self._runner = ServiceRunner(
                app, access_log_class=AccessLogger, auto_decompress=False, shutdown_timeout=1, max_field_size=16380
            )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    @web.middleware
    async def _count(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if _ECHO.fullmatch(request.path):
            # The worker's check at its start does not belong to the test.
            return await handler(request)
        self._open += 1
        self._idle.clear()
        try:
            answer = await self._answer(request, handler)
            self.requests.append((request.raw_path, answer.status))
            return answer
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        answer = await self.before(request) if self.before is not None else None
        if answer is None:
            answer = await handler(request)
            if self.after is not None:
                await self.after()
            if self.change is not None:
                answer = self.change(request, answer)
        return answer

    async def answered(self) -> list[int]:
        """Return the statuses of all answers, once no request is open.

        The outcome of a call can be seen before the receiver, which has recorded it, has answered.
        """
        await self._idle.wait()
        return self.statuses

    @property
    def statuses(self) -> list[int]:
        return [status for _, status in self.requests]


class World:
    """One caller and one handler; all parts are started except those that a test leaves out."""

    def __init__(self, server: Server, *, converters: tuple[DataConverter, DataConverter], mount: str = "") -> None:
        self.server = server
        self.handler_server = server
        """The handler's server: another one if the two sides are on separate clusters."""
        self.id = uuid.uuid4().hex[:12]
        self.keys = Keys()
        self.handler_keys: Keys | None = None
        """The keys in the handler's settings, if they are not those of `keys`."""
        self.order_queue, self.payment_queue = f"orders-{self.id}", f"payments-{self.id}"
        self.handler_runtime: Runtime | None = None
        self.worker_options: dict[str, Any] = {}
        self.caller_worker_options: dict[str, Any] = {}
        """Further arguments of the caller's worker."""
        self.caller_client_options: dict[str, Any] = {}
        """Further arguments of the caller's client."""
        self.caller_clock = clock
        self.targets: list[type[Any] | Target] = [PaymentWorkflow, *TARGETS]
        """The targets of the service; the worker has only the first few."""
        self.services: list[Any] = []
        """Service handlers in addition to the targets."""
        self.authorize: Authorize | None = None
        self.executor: Executor | None = BoundedThreads(threads=4)
        self._converters = converters
        self._handler_settings: HandlerSettings | None = None
        self.caller_options: dict[str, Any] = {}
        """Further settings of the caller."""
        self.endpoint_options: dict[str, Any] = {}
        """Further settings of the caller's endpoint."""
        self.peer_options: dict[str, Any] = {}
        """Further settings of the caller on the handler's side."""
        self.handler_options: dict[str, Any] = {}
        """Further settings of the handler."""
        self.nexus_endpoint = f"native-{self.id}"
        receiver_port, service_port = free_ports(2)
        self.receiver = Listener(receiver_port, self._make_receiver, mount=mount)
        self.service = Listener(service_port, self._make_service, mount=mount)
        self.endpoint_url = self.service.url
        self._workers: dict[str, AsyncExitStack] = {}
        self.workers: dict[str, Worker] = {}
        """The workers that were started last, by side."""
        self.caller_client: Client
        self.handler_client: Client

    async def connect(self) -> None:
        self.caller_client = await Client.connect(
            self.server.address,
            namespace=CALLER,
            data_converter=self._converters[0],
            **self.caller_client_options,
        )
        self.handler_client = await Client.connect(
            self.handler_server.address,
            namespace=HANDLER,
            data_converter=self._converters[1],
            runtime=self.handler_runtime,
        )

    # Settings are made at every start, so that a test may change keys in between.
    @property
    def caller_settings(self) -> CallerSettings:
        return caller_settings(
            self.keys,
            receiver_url=self.receiver.url,
            endpoint_url=self.endpoint_url,
            endpoint=self.endpoint_options,
            **self.caller_options,
        )

    @property
    def handler_settings(self) -> HandlerSettings:
        if self._handler_settings is not None:
            return self._handler_settings
        return handler_settings(
            self.handler_keys or self.keys,
            receiver_url=self.receiver.url,
            service_url=self.service.url,
            caller=self.peer_options,
            task_queue=self.payment_queue,
            **{"sweep": False, **self.handler_options},
        )

    def override_handler_settings(self, settings: HandlerSettings) -> None:
        """Takes effect at the next start."""
        self._handler_settings = settings

    def _make_receiver(self) -> web.Application:
        return caller.create_app(self.caller_settings, client=self.caller_client)

    def _make_service(self) -> web.Application:
        module = ModuleType("served")
        for number, each in enumerate([*self.targets, *self.services]):
            setattr(module, f"served_{number}", each)
        if self.authorize is not None:
            vars(module)["authorize"] = self.authorize
        return handler.create_app(self.handler_settings, module, client=self.handler_client, executor=self.executor)

    async def start_worker(self, side: str) -> None:
        """*side* is "caller" or "handler"."""
        stack = self._workers[side] = AsyncExitStack()
        if side == "caller":
            worker = Worker(
                self.caller_client,
                task_queue=self.order_queue,
                workflows=[OrderWorkflow, *CALLERS],
                plugins=[CallerPlugin(self.caller_settings, clock=self.caller_clock)],
                **{"workflow_runner": RUNNER, **self.caller_worker_options},
            )
        else:
            worker = Worker(
                self.handler_client,
                task_queue=self.payment_queue,
                workflows=[PaymentWorkflow, *TARGETS],
                plugins=[HandlerPlugin(self.handler_settings, authorize=self.authorize)],
                **{"workflow_runner": RUNNER, **self.worker_options},
            )
        await stack.enter_async_context(worker)
        self.workers[side] = worker

    async def create_nexus_endpoint(self, target: EndpointTarget | None = None) -> None:
        """Register `nexus_endpoint` on the server with our handler's worker or *target*."""
        worker = EndpointTarget.Worker(namespace=HANDLER, task_queue=self.payment_queue)
        spec = EndpointSpec(name=self.nexus_endpoint, target=target or EndpointTarget(worker=worker))
        await self.caller_client.operator_service.create_nexus_endpoint(CreateNexusEndpointRequest(spec=spec))

    def plan(self, transport: Transport, **options: Any) -> CallPlan:
        """The plan of a call by *transport*."""
        endpoint = self.nexus_endpoint if transport == "nexus" else "payments"
        return CallPlan(transport=transport, endpoint=endpoint, **options)

    async def stop_waiting(self, handle: WorkflowHandle[Any, Any]) -> None:
        """Fail the waiting activity of *handle* as an operator does. Temporal takes a failure while an attempt runs."""

        async def fails() -> None:
            waiting = self.caller_client.get_async_activity_handle(
                workflow_id=handle.id,
                run_id=handle.first_execution_run_id,
                activity_id=(await self.pending(handle)).activity_id,
            )
            try:
                await waiting.fail(ApplicationError("stopped by hand", non_retryable=True))
            except RPCError as error:
                raise AssertionError("no attempt runs") from error

        await assert_eventually(fails)

    async def start_sweep(self) -> None:
        """Start the sweep like every replica of the service."""
        await start_sweep(self.handler_client, targets=Targets(self.targets), settings=self.handler_settings)

    @property
    def sweep(self) -> WorkflowHandle[Any, Any]:
        """The sweep of the target that most tests use."""
        return self.handler_client.get_workflow_handle(f"bridge-sweep:{self.payment_queue}:ProbeWorkflow")

    @property
    def sweeps(self) -> list[WorkflowHandle[Any, Any]]:
        """The sweeps of all targets that the service serves."""
        queue = self.payment_queue
        ids = [dict.fromkeys((queue, each.task_queue or queue, each.workflow_type)) for each in Targets(self.targets)]
        return [self.handler_client.get_workflow_handle(":".join(("bridge-sweep", *each))) for each in ids]

    async def stop_worker(self, side: str) -> None:
        stack = self._workers.pop(side, None)
        if stack is not None:
            await stack.aclose()

    async def close(self) -> None:
        for side in list(self._workers):
            await self.stop_worker(side)
        await self.receiver.stop()
        await self.service.stop()
        if self.executor is not None:
            self.executor.shutdown(wait=False)

    def signed_response(
        self, request: web.Request, status: int, headers: dict[str, str] | None = None, body: bytes = b""
    ) -> web.Response:
        """An answer to *request*, signed with the keys of the service that it is for."""
        kind, key_set, base = MessageKind.START, self.keys.start, self.service.url
        if request.path.startswith("/callbacks"):
            kind, key_set, base = MessageKind.COMPLETION, self.keys.completion, self.receiver.url
        elif request.path.endswith("/cancel"):
            kind = MessageKind.CANCEL
        verified = MessageVerifier(key_set, public_base=base).verify(
            kind, method=request.method, raw_path=request.raw_path, headers=request.headers
        )
        signed = CIMultiDict(headers or {})
        verified.proof.sign_answer(status, signed, body)
        return web.Response(status=status, headers=signed, body=body or None)

    # Calls and waits of the tests.
    def key(self, name: str = "") -> str:
        return f"{self.id}-{name or uuid.uuid4().hex[:6]}"

    async def call(
        self, ask: Ask, plan: CallPlan | None = None, **options: Any
    ) -> WorkflowHandle[CallingWorkflow, Reply]:
        """Start a workflow that makes one call; *options* are those of `start_workflow`."""
        return await self.caller_client.start_workflow(
            CallingWorkflow.run,
            args=[ask, plan or CallPlan()],
            id=f"calling-{ask.key}-{uuid.uuid4().hex[:6]}",
            task_queue=self.order_queue,
            **options,
        )

    def target(self, ask: Ask) -> WorkflowHandle[Any, Any]:
        return self.handler_client.get_workflow_handle(f"probe-{ask.key}")

    async def until_started(self, ask: Ask) -> WorkflowHandle[Any, Any]:
        """Wait until the target of *ask* runs."""
        target = self.target(ask)

        async def check() -> None:
            assert [each async for each in _history(target)], "the target has not started"

        await assert_eventually(check)
        return target

    async def pending(self, handle: WorkflowHandle[Any, Any]) -> Any:
        """The waiting activity as describe shows it, or None."""
        described = await handle.describe()
        activities = described.raw_description.pending_activities
        return activities[0] if activities else None

    async def until_attempt(self, handle: WorkflowHandle[Any, Any], attempt: int, *, in_backoff: bool = False) -> None:
        """Wait until the waiting activity is at *attempt*, or, *in_backoff*, waits for it."""

        async def check() -> None:
            activity = await self.pending(handle)
            assert activity is not None, "nothing is pending"
            assert activity.attempt >= attempt
            if in_backoff:
                assert activity.state == 1, "not between attempts"  # SCHEDULED
                assert activity.HasField("last_failure")

        await assert_eventually(check)


async def _history(handle: WorkflowHandle[Any, Any]) -> AsyncIterator[HistoryEvent]:
    try:
        async for event in handle.fetch_history_events():
            yield event
    except RPCError:
        return


EVENTS_OF_A_CALL = [
    "WORKFLOW_EXECUTION_STARTED",
    "WORKFLOW_TASK_SCHEDULED",
    "WORKFLOW_TASK_STARTED",
    "WORKFLOW_TASK_COMPLETED",
    "ACTIVITY_TASK_SCHEDULED",
    "ACTIVITY_TASK_STARTED",
    "ACTIVITY_TASK_COMPLETED",
    "WORKFLOW_TASK_SCHEDULED",
    "WORKFLOW_TASK_STARTED",
    "WORKFLOW_TASK_COMPLETED",
    "WORKFLOW_EXECUTION_COMPLETED",
]
"""History of a workflow that makes one call and returns its result."""


async def events(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """Names of the events of a history, in order."""
    return [
        EventType.Name(event.event_type).removeprefix("EVENT_TYPE_") async for event in handle.fetch_history_events()
    ]


def with_codec(codec: Any) -> DataConverter:
    return dataclasses.replace(DataConverter.default, payload_codec=codec)


@contextlib.asynccontextmanager
async def running_world(
    server: Server,
    *,
    without: tuple[str, ...] = (),
    converters: tuple[DataConverter, DataConverter] = (DataConverter.default, DataConverter.default),
    prepare: Callable[[World], None] = lambda _: None,
    mount: str = "",
) -> AsyncIterator[World]:
    """A world, without the parts named in *without*: receiver, service, caller, handler.

    With *mount*, receiver and service are parts of other applications, below that prefix.
    """
    world = World(server, converters=converters, mount=mount)
    prepare(world)
    await world.connect()
    try:
        if "receiver" not in without:
            await world.receiver.start()
        if "service" not in without:
            await world.service.start()
        for side in ("handler", "caller"):
            if side not in without:
                await world.start_worker(side)
        yield world
    finally:
        await world.close()
