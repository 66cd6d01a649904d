"""What is measured, as separate processes on one server: every mode with workers, queues and services of its own."""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from temporalio.api.nexus.v1 import EndpointSpec, EndpointTarget
from temporalio.api.operatorservice.v1 import CreateNexusEndpointRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from scripts.benchmark.order_workflows.nexus import nexus_endpoint
from scripts.benchmark.results import STATELESS, frontend_requests, http_requests
from scripts.benchmark.workers import TOKEN_VARIABLE
from scripts.environment.processes import stop_process
from scripts.environment.progress import with_ticker
from scripts.environment.server import Server, free_ports, running_server
from scripts.environment.stack import CALLER_NAMESPACE, HANDLER_NAMESPACE, ROOT, write_local_settings

EAGER_ACTIVITIES = "system.enableActivityEagerExecution"
POLL_RATE = "history.transferProcessorMaxPollRPS"

PAYMENTS = "examples.payments.payments"
"""Module of a bridge's target."""
_IDLE_S = 3.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the server runs, and whether workflows are started eagerly."""

    name: str
    is_eager: bool
    """Eager dispatch of activities (server), and targets started eagerly by the process that hosts their worker."""
    has_raised_poll_rate: bool

    @property
    def dynamic_config(self) -> tuple[str, ...]:
        """The server's flags."""
        eager = f"{EAGER_ACTIVITIES}={str(self.is_eager).lower()}"
        return (eager, *([f"{POLL_RATE}=10000"] if self.has_raised_poll_rate else []))


DEFAULT_EAGER = Setting(name="default, eager", is_eager=True, has_raised_poll_rate=False)
RAISED_EAGER = Setting(name="raised, eager", is_eager=True, has_raised_poll_rate=True)
DEFAULT = Setting(name="default, not eager", is_eager=False, has_raised_poll_rate=False)
RAISED = Setting(name="raised, not eager", is_eager=False, has_raised_poll_rate=True)


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way to have an order paid."""

    name: str
    workflow: str
    """Type of its order workflow."""
    deployment: str
    """Which processes it has, for the report."""
    target_namespace: str = HANDLER_NAMESPACE
    is_eager: bool = True
    """Whether it asks for its targets to be started eagerly, where the setting allows that."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """What differs in the settings, for a bridge: a line's beginning, and what stands there instead."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """More for its processes."""
    is_traced: bool = False
    """Whether its processes make spans."""
    service_options: Sequence[str] = ()
    """More for the commands of its receiver and its handler service."""
    is_separate: bool = False
    """Whether a bridge's receiver is a process of its own, and not a part of the order worker's."""

    @property
    def order_queue(self) -> str:
        """Task queue of the calling workflows."""
        return f"orders-{self.name}"

    @property
    def payment_queue(self) -> str:
        """Task queue of the targets."""
        return f"payments-{self.name}"

    @property
    def is_bridge(self) -> bool:
        """Whether the bridge carries the calls of this mode."""
        return self.workflow == "OrderWorkflow"


_BRIDGE = "order worker that serves the receiver; handler service that hosts the worker"
BRIDGE = Mode(name="bridge", workflow="OrderWorkflow", deployment=_BRIDGE)
SEPARATE = Mode(
    name="separate",
    workflow="OrderWorkflow",
    deployment="order worker; receiver; handler service that hosts the worker",
    is_separate=True,
)
WAIT = Mode(
    name="wait",
    workflow="OrderWorkflow",
    deployment=_BRIDGE,
    replace={"[endpoints.payments]": '[endpoints.payments]\ntransport = "wait"'},
)
OBSERVED = Mode(
    name="observed",
    workflow="OrderWorkflow",
    deployment=f"{_BRIDGE}; with metrics, console and spans",
    environment={
        "BRIDGE_METRICS_ADDRESS": "127.0.0.1:0",
        "BRIDGE_CONSOLE": json.dumps({"port": 0, "tokens": {"anna": "0" * 64}}),
    },
    is_traced=True,
)
UNLOGGED = Mode(
    name="unlogged",
    workflow="OrderWorkflow",
    deployment=f"{SEPARATE.deployment}; both services log errors only",
    service_options=("--log-level", "error"),
    is_separate=True,
)
SYNC = Mode(name="sync-1a", workflow="WrapperOrderWorkflow", deployment="order worker; HTTP API that hosts the worker")
POLL = Mode(name="poll-1b", workflow="WrapperOrderWorkflow", deployment=SYNC.deployment)
NEXUS = Mode(
    name="nexus",
    workflow="NexusOrderWorkflow",
    deployment="order worker; payment worker with the Nexus service",
    is_eager=False,
)
NEXUS_EAGER = Mode(
    name="nexus-eager",
    workflow="NexusOrderWorkflow",
    deployment=f"{NEXUS.deployment}, which asks for eager start",
)
CHILD = Mode(
    name="child",
    workflow="ChildOrderWorkflow",
    deployment="order worker; payment worker, all in one namespace",
    target_namespace=CALLER_NAMESPACE,
)

MODES = (BRIDGE, SEPARATE, WAIT, POLL, SYNC, NEXUS, NEXUS_EAGER, CHILD)
NAMED_MODES = (*MODES, OBSERVED, UNLOGGED)
"""With those that are measured only if they are asked for."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What has been used until now: differences of two are what counts."""

    server_cpu_s: float
    client_cpu_s: float
    service_cpu_s: float
    """The part of it that a bridge's receiver and handler service used."""
    http_requests: int
    grpc_requests: float

    def minus(self, earlier: "Usage", *, idle: "Usage | None" = None, seconds: float = 0) -> "Usage":
        """What was used since *earlier*, *seconds* ago, without what an *idle* server uses in a second."""
        server, grpc = (0.0, 0.0) if idle is None else (idle.server_cpu_s, idle.grpc_requests)
        return Usage(
            server_cpu_s=max(0.0, self.server_cpu_s - earlier.server_cpu_s - server * seconds),
            client_cpu_s=self.client_cpu_s - earlier.client_cpu_s,
            service_cpu_s=self.service_cpu_s - earlier.service_cpu_s,
            http_requests=self.http_requests - earlier.http_requests,
            grpc_requests=max(0.0, self.grpc_requests - earlier.grpc_requests - grpc * seconds),
        )


@dataclass(kw_only=True)
class World:
    """A running server with the processes of some modes."""

    folder: Path
    setting: Setting
    server: Server
    caller: Client
    handler: Client
    processes: dict[str, dict[str, asyncio.subprocess.Process]]
    """By mode, by role."""
    idle: Usage | None = None
    """What the server uses in a second in which nothing is called."""

    def client(self, mode: Mode) -> Client:
        """Of the namespace that *mode*'s targets run in."""
        return self.caller if mode.target_namespace == CALLER_NAMESPACE else self.handler

    async def usage(self, mode: Mode) -> Usage:
        """What the server and the processes of *mode* have used so far."""
        grpc = await asyncio.to_thread(self._grpc_requests)
        used = {role: _cpu(process.pid) for role, process in self.processes[mode.name].items()}
        return Usage(
            server_cpu_s=sum(_cpu_of_all(part.pid) for part in self.server.parts.values()),
            client_cpu_s=sum(used.values()),
            service_cpu_s=sum(used.get(role, 0.0) for role in STATELESS) if mode.is_bridge else 0.0,
            http_requests=sum(self.http_requests(mode).values()),
            grpc_requests=grpc,
        )

    async def measure_idle(self, mode: Mode) -> None:
        """Find out what the server uses when nothing is called."""
        before = await self.usage(mode)
        await asyncio.sleep(_IDLE_S)
        used = (await self.usage(mode)).minus(before)
        self.idle = Usage(
            server_cpu_s=used.server_cpu_s / _IDLE_S,
            client_cpu_s=used.client_cpu_s / _IDLE_S,
            service_cpu_s=used.service_cpu_s / _IDLE_S,
            http_requests=0,
            grpc_requests=used.grpc_requests / _IDLE_S,
        )

    def http_requests(self, mode: Mode) -> Counter[str]:
        """Requests that the services of *mode* have logged, by the call's request id ('' where none is logged)."""
        counted: Counter[str] = Counter()
        for path in (self.folder / mode.name).glob("*.log"):
            counted += http_requests(path.read_bytes())
        return counted

    def resident_bytes(self, mode: Mode) -> dict[str, int]:
        """Memory by role."""
        return {role: psutil.Process(each.pid).memory_info().rss for role, each in self.processes[mode.name].items()}

    def _grpc_requests(self) -> float:
        found = 0.0
        for url in self.server.metrics:
            with urllib.request.urlopen(url, timeout=10) as response:
                found += frontend_requests(response.read().decode())
        return found


def _cpu(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _cpu_of_all(pid: int) -> float:
    """Of a process, its children, and those that have ended. PostgreSQL has one process for each connection."""
    process = psutil.Process(pid)
    ended = process.cpu_times()
    used = _cpu(pid) + float(ended.children_user + ended.children_system)
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            used += _cpu(child.pid)
    return used


def commands(mode: Mode, *, is_eager: bool, api_port: int) -> dict[str, tuple[str, Sequence[str]]]:
    """Every process of *mode* by role: its side, and its command after `python -m`.

    Where nothing is started eagerly, a bridge's handler service and worker are apart.
    """
    bench = "scripts.benchmark.workers"
    eager = ["--eager"] if is_eager and mode.is_eager else []
    api = ["--api", f"http://127.0.0.1:{api_port}"]
    orders, payments = mode.order_queue, mode.payment_queue
    match mode.workflow:
        case "OrderWorkflow":
            service = ["handler", "serve", "--module", PAYMENTS, *mode.service_options]
            apart = ("handler", [bench, "bridge-payments", payments, "--module", PAYMENTS])
            receiver = ("caller", ["caller", "serve", *mode.service_options])
            hosted = [] if mode.is_separate else ["--serve-receiver"]
            return {
                **({"receiver": receiver} if mode.is_separate else {}),
                "orders": ("caller", [bench, "bridge-orders", orders, *hosted]),
                "handler": ("handler", [*service, *(["--with-worker"] if is_eager else [])]),
                **({} if is_eager else {"payments": apart}),
            }
        case "NexusOrderWorkflow":
            return {
                "orders": ("caller", [bench, "nexus-orders", orders]),
                "payments": ("handler", [bench, "nexus-payments", payments, *eager]),
            }
        case "ChildOrderWorkflow":
            return {
                "orders": ("caller", [bench, "child-orders", orders]),
                "payments": ("caller", [bench, "payments", payments]),
            }
        case _:
            role = "sync-orders" if mode is SYNC else "poll-orders"
            return {
                "orders": ("caller", [bench, role, orders, *api]),
                "payments": ("handler", [bench, "payments", payments, "--port", str(api_port), *eager]),
            }


@contextlib.asynccontextmanager
async def running_world(
    modes: Sequence[Mode],
    setting: Setting,
    *,
    address: str | None = None,
    is_split: bool = False,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[World]:
    """A server of its own with *setting*, and the processes of *modes*; all of it ends with the context.

    *address*: the server to use instead, whose flags stay as they are.
    *is_split*: handler services and workers are processes of their own, also where targets could be started eagerly.
    """
    folder = Path(tempfile.mkdtemp(prefix="callback-bridge-bench-"))
    try:
        async with running_server(
            namespaces=[CALLER_NAMESPACE, HANDLER_NAMESPACE],
            address=address,
            log=folder / "temporal.log",
            dynamic_config=setting.dynamic_config,
        ) as server:
            world = World(
                folder=folder,
                setting=setting,
                server=server,
                caller=await Client.connect(server.address, namespace=CALLER_NAMESPACE),
                handler=await Client.connect(server.address, namespace=HANDLER_NAMESPACE),
                processes={mode.name: {} for mode in modes},
            )
            try:
                is_eager = setting.is_eager and not is_split
                starting = [_start_mode(world, mode, environment or {}, is_eager=is_eager) for mode in modes]
                await with_ticker(f"starting {len(modes)} modes, {setting.name}", asyncio.gather(*starting))
                yield world
            finally:
                for mode in modes:
                    running = world.processes[mode.name].values()
                    await asyncio.gather(*(stop_process(process, patience=5) for process in running))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _start_mode(world: World, mode: Mode, environment: Mapping[str, str], *, is_eager: bool) -> None:
    folder = world.folder / mode.name
    folder.mkdir()
    receiver_port, service_port, api_port = free_ports(3)
    if mode.is_bridge:
        write_local_settings(
            folder, receiver_url=f"http://127.0.0.1:{receiver_port}", service_url=f"http://127.0.0.1:{service_port}"
        )
        for path in folder.glob("*.toml"):
            path.write_text(adapted(path.read_text(), mode.replace))
        with (folder / "handler.toml").open("a") as file:
            # The last table of the file is the caller's. Measure the bridge and not its default limits.
            file.write("limits = { starts_per_second = 100000, burst = 100000, held_starts = 100 }\n")
    if mode.workflow == "NexusOrderWorkflow":
        await _create_nexus_endpoint(world.handler, mode.payment_queue)
    # The sandbox imports workflow modules anew for every run: without cached byte code it would compile them, too.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    shared = {
        **inherited,
        "PYTHONPATH": str(ROOT),
        "TEMPORAL_ADDRESS": world.server.address,
        TOKEN_VARIABLE: secrets.token_urlsafe(),
        "BRIDGE_TASK_QUEUE": mode.payment_queue,
        **environment,
        **mode.environment,
    }

    async def start(role: str, side: str, command: Sequence[str]) -> None:
        own = {
            "TEMPORAL_NAMESPACE": CALLER_NAMESPACE if side == "caller" else HANDLER_NAMESPACE,
            "BRIDGE_CONFIG": str(folder / f"{side}.toml"),
        }
        with (folder / f"{role}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *(["scripts.benchmark.traced"] if mode.is_traced else []), *command),
                env={**shared, **own},
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        world.processes[mode.name][role] = process
        assert process.stdout is not None
        if not await asyncio.wait_for(process.stdout.readline(), 90):
            said = (folder / f"{role}.log").read_text(errors="replace").strip()
            message = f"{mode.name}: {role} did not start:\n{said[-2000:]}"
            raise RuntimeError(message)

    roles = commands(mode, is_eager=is_eager, api_port=api_port)
    await asyncio.gather(*(start(role, side, command) for role, (side, command) in roles.items()))


def adapted(settings: str, replace: Mapping[str, str]) -> str:
    """*settings* with every line that begins as a key of *replace* replaced by its value."""
    lines = settings.splitlines()
    for begin, instead in replace.items():
        lines = [instead if line.startswith(begin) else line for line in lines]
    return "\n".join(lines) + "\n"


async def _create_nexus_endpoint(client: Client, queue: str) -> None:
    target = EndpointTarget(worker=EndpointTarget.Worker(namespace=HANDLER_NAMESPACE, task_queue=queue))
    request = CreateNexusEndpointRequest(spec=EndpointSpec(name=nexus_endpoint(queue), target=target))
    try:
        await client.operator_service.create_nexus_endpoint(request)
    except RPCError as error:
        # An earlier run on the same server created it.
        if error.status is not RPCStatusCode.ALREADY_EXISTS:
            raise
