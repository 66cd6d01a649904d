"""The whole example as separate processes, as in production: server, receiver, handler service, both workers.

Settings and keys are generated into a folder of their own, one file for each side. Every process logs into that folder.
"""

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridge.admin.init import local_settings
from bridge.admin.pair import write_new
from scripts.environment import temporal_cli
from scripts.environment.processes import stop_process
from scripts.environment.progress import say, with_ticker
from scripts.environment.server import Server, free_ports, running_server

ROOT = Path(__file__).resolve().parent.parent.parent

CALLER_NAMESPACE, HANDLER_NAMESPACE = "order-prod", "payment-prod"
ORDER_QUEUE, PAYMENT_QUEUE = "order-queue", "payment-queue"


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What can be chosen about a stack."""

    temporal: str | None = None
    """Address of a server that runs already. None: servers are started."""
    clusters: int = 1
    """1: both namespaces are on one server. 2: each side has a server of its own, which knows nothing of the other."""
    server: str | None = None
    """Version of the servers that are started. None: the default, or two different ones for two clusters."""
    port: int | None = None
    """Port of the first server that is started; the second has the next one. Its UI is 1 000 higher."""
    ui: bool = True
    first_lease: float = 30.0
    """Seconds."""
    renewal: float = 60.0
    """Seconds until the first renewal."""
    renewal_maximum: float = 3600.0
    settlement: float = 5.0
    """Seconds that a payment of the middle kind takes."""
    separate: bool = False
    """Receiver, handler service and both workers are processes of their own. Else each team runs one process, which
    hosts its worker and its service."""
    receivers: int = 1
    """This and the next four count processes where they are separate."""
    handlers: int = 1
    order_workers: int = 1
    payment_workers: int = 1
    handlers_with_worker: int = 0
    """How many of the handler services host a worker too, and start targets eagerly."""
    public_receiver_url: str | None = None
    """Where handlers reach the receivers, if something stands before them."""
    public_service_url: str | None = None
    """Where callers reach the handler services, if something stands before them."""
    durable: bool = False
    """Give our own server a database file, so that it can be restarted."""
    keep: bool = False
    """Keep settings and logs afterwards."""
    environment: dict[str, str] = field(default_factory=dict)
    """More for every process."""
    own_environment: Callable[[Path, str, str], dict[str, str]] = lambda _folder, _side, _name: {}
    """More for one process, by the stack's folder, its side, and its name."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What is appended to the settings file of a side."""
    payments: str = "examples.payments.payments"
    """Module that the handler services serve."""
    order_worker: tuple[str, ...] = ("examples.payments.workers", "orders")
    """Command of an order worker after `python -m`, where it is a process of its own."""
    payment_worker: tuple[str, ...] = ("examples.payments.workers", "payments")
    """Command of a payment worker after `python -m`, where it is a process of its own."""


@dataclass(kw_only=True)
class Stack:
    """A running stack."""

    folder: Path
    servers: Mapping[str, Server]
    """By side, "caller" and "handler". One cluster: the same server twice."""
    receiver_url: str
    """Where the receivers listen."""
    service_url: str
    """Where the handler services listen."""
    processes: dict[str, asyncio.subprocess.Process]

    def description(self) -> dict[str, Any]:
        """What `scripts/up` prints."""
        caller, handler = self.servers["caller"], self.servers["handler"]
        pids = {name: part.pid for name, part in caller.parts.items()}
        if caller is not handler:
            pids |= {f"{name}-2": part.pid for name, part in handler.parts.items()}
        return {
            "caller": {
                "namespace": CALLER_NAMESPACE,
                "task_queue": ORDER_QUEUE,
                "receiver": self.receiver_url,
                "temporal": caller.address,
                "ui": caller.ui,
            },
            "handler": {
                "namespace": HANDLER_NAMESPACE,
                "task_queue": PAYMENT_QUEUE,
                "service": self.service_url,
                "temporal": handler.address,
                "ui": handler.ui,
            },
            "cli": None if caller.program is None else str(caller.program),
            "settings": str(self.folder),
            "processes": pids | {name: process.pid for name, process in self.processes.items()},
        }

    def log_lines(self) -> list[dict[str, Any]]:
        """The structured log lines of our processes."""
        lines: list[dict[str, Any]] = []
        for name in self.processes:
            for line in (self.folder / f"{name}.log").read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    entry = json.loads(line)
                    if isinstance(entry, dict):
                        lines.append(entry)
        return lines


def port_of(url: str) -> int:
    """The port of a URL as we write it: explicit, without a path."""
    return int(url.rpartition(":")[2])


def write_local_settings(
    folder: Path,
    *,
    receiver_url: str,
    service_url: str,
    receiver_port: int | None = None,
    service_port: int | None = None,
) -> None:
    """Write the two sides' settings, with fresh keys.

    The ports are those to listen on, where they are not the URLs' own.
    """
    settings = local_settings(
        receiver_url=receiver_url,
        service_url=service_url,
        receiver_port=receiver_port or port_of(receiver_url),
        service_port=service_port or port_of(service_url),
        task_queue=PAYMENT_QUEUE,
    )
    write_new(folder, settings)


@contextlib.asynccontextmanager
async def running_stack(options: StackOptions) -> AsyncIterator[Stack]:
    """Start everything, yield when all of it is ready, end all of it."""
    folder = Path(tempfile.mkdtemp(prefix="callback-bridge-"))
    try:
        async with _running_servers(options, folder) as servers:
            receiver_port, service_port = free_ports(2)
            stack = Stack(
                folder=folder,
                servers=servers,
                receiver_url=f"http://127.0.0.1:{receiver_port}",
                service_url=f"http://127.0.0.1:{service_port}",
                processes={},
            )
            write_local_settings(
                folder,
                receiver_url=options.public_receiver_url or stack.receiver_url,
                service_url=options.public_service_url or stack.service_url,
                receiver_port=receiver_port,
                service_port=service_port,
            )
            for side, text in options.settings.items():
                with (folder / f"{side}.toml").open("a") as file:
                    file.write(text)
            try:
                await start_all(stack, options)
                yield stack
            finally:
                # Workers first: their activities use the services, and end cleanly while those still answer.
                for name in reversed(list(stack.processes)):
                    await stop_process(stack.processes[name])
    finally:
        if options.keep:
            say(f"settings and logs: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def _running_servers(options: StackOptions, folder: Path) -> AsyncIterator[Mapping[str, Server]]:
    both = [CALLER_NAMESPACE, HANDLER_NAMESPACE]
    if options.clusters == 1:
        async with _running_server(options, folder, number=0, namespaces=both, choice=options.server) as server:
            yield {"caller": server, "handler": server}
        return
    async with (
        _running_server(
            options, folder, number=0, namespaces=both[:1], choice=options.server or temporal_cli.OLDEST
        ) as caller,
        _running_server(
            options, folder, number=1, namespaces=both[1:], choice=options.server or temporal_cli.NEWEST
        ) as handler,
    ):
        yield {"caller": caller, "handler": handler}


def _running_server(
    options: StackOptions, folder: Path, *, number: int, namespaces: Sequence[str], choice: str | None
) -> contextlib.AbstractAsyncContextManager[Server]:
    port = None if options.port is None else options.port + number
    return running_server(
        namespaces=namespaces,
        address=options.temporal,
        port=port,
        ui_port=None if port is None else port + 1000,
        choice=choice,
        ui=options.ui,
        log=folder / f"temporal-{number + 1}.log",
        database=folder / f"temporal-{number + 1}.db" if options.durable else None,
    )


def plan(options: StackOptions) -> dict[str, tuple[str, list[str]]]:
    """Every process by name: its side, and its command after `python -m`."""
    handler = ["bridge", "handler", "serve", "--module", options.payments]
    if not options.separate:
        return {
            "orders": ("caller", ["examples.payments.workers", "orders", "--serve-receiver"]),
            "payments": ("handler", [*handler, "--with-worker"]),
        }
    handler.append("--reuse-port")
    kinds: list[tuple[str, int, str, list[str]]] = [
        ("receiver", options.receivers, "caller", ["bridge", "receiver", "serve", "--reuse-port"]),
        ("handler", options.handlers, "handler", handler),
        ("order-worker", options.order_workers, "caller", [*options.order_worker]),
        ("payment-worker", options.payment_workers, "handler", [*options.payment_worker]),
    ]

    def more(kind: str, number: int) -> list[str]:
        return ["--with-worker"] if kind == "handler" and number <= options.handlers_with_worker else []

    return {
        name if count == 1 else f"{name}-{number}": (side, [*command, *more(name, number)])
        for name, count, side, command in kinds
        for number in range(1, count + 1)
    }


async def start_process(stack: Stack, options: StackOptions, name: str) -> None:
    """Start one process of the plan, or start it again, and wait until it says that it is ready."""
    side, command = plan(options)[name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BRIDGE_CONFIG": str(stack.folder / f"{side}.toml"),
        "TEMPORAL_ADDRESS": stack.servers[side].address,
        "TEMPORAL_NAMESPACE": CALLER_NAMESPACE if side == "caller" else HANDLER_NAMESPACE,
        "ORDER_FIRST_LEASE_SECONDS": str(options.first_lease),
        "ORDER_RENEWAL_SECONDS": str(options.renewal),
        "ORDER_RENEWAL_MAXIMUM_SECONDS": str(max(options.renewal, options.renewal_maximum)),
        "PAYMENT_SETTLEMENT_SECONDS": str(options.settlement),
        **options.environment,
        **options.own_environment(stack.folder, side, name),
    }
    with (stack.folder / f"{name}.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *command),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            # Not in our process group: Ctrl-C reaches us, and we end them in order.
            start_new_session=True,
        )
    stack.processes[name] = process
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), 60)
    if not line:
        said = (stack.folder / f"{name}.log").read_text(errors="replace").strip()
        message = f"{name} did not start:\n{said[-2000:]}"
        raise RuntimeError(message)


async def start_all(stack: Stack, options: StackOptions) -> None:
    """Start all processes of the plan at the same time, or start them again, and wait until all are ready."""
    starting = asyncio.gather(*(start_process(stack, options, name) for name in plan(options)))
    await with_ticker("starting receiver, handler service and workers", starting)
