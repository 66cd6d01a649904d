"""A real Temporal server for demo, tests and benchmark: one that the user names, or one that is started here."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest, RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from scripts.environment import temporal_cli
from scripts.environment.progress import say, with_ticker
from scripts.environment.temporal_cli import OLDEST, NoServerError

_STARTUP_TIMEOUT = timedelta(seconds=60)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def require_free(port: int) -> None:
    """Refuse a port on which another program listens. Without this, clients would reach that program.

    Raises:
        NoServerError: It is in use.
    """
    with socket.socket() as probe:
        # As the server does it: a port that a stopped server has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            message = f"port {port} is in use: stop what listens there, or choose another one with --port"
            raise NoServerError(message) from None


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    address: str
    ui: str | None
    """Base URL of its web UI, where we know of one."""
    version: str
    pid: int | None
    """Of its first process. None: it was there before us."""
    program: Path | None = None
    """The `temporal` command line that holds the server. None: the user named a server."""
    metrics: str | None = None
    """URL of its Prometheus metrics, where we know of one."""
    http: str | None = None
    """Base URL of its HTTP port, where completions of Nexus operations arrive, where we know of one."""
    restart: Callable[[float], Awaitable[None]] | None = None
    """Kill it, and start it again after so many seconds, on the same ports and with its database file if it has one."""

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor, *_ = _numbers(self.version)
        return major, minor


async def check_version(address: str) -> str:
    """The version of the server at *address*, said; with a warning where it is older than the oldest tested."""
    client = await Client.connect(address, lazy=False)
    version = (await client.workflow_service.get_system_info(GetSystemInfoRequest())).server_version
    say(f"Temporal server {version} at {address}")
    if _numbers(version) < _numbers(OLDEST):
        say(f"warning: older than {OLDEST}, the oldest version that this was tested with")
    return version


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version)[:3]]


async def ensure_namespaces(address: str, namespaces: Sequence[str]) -> None:
    """Register what is missing on a server that was not started by us, and wait until it is known."""
    client = await Client.connect(address)
    for name in namespaces:
        try:
            await client.workflow_service.register_namespace(
                RegisterNamespaceRequest(namespace=name, workflow_execution_retention_period=Duration(seconds=86400))
            )
        except RPCError as error:
            if error.status is not RPCStatusCode.ALREADY_EXISTS:
                raise


@contextlib.asynccontextmanager
async def running_server(
    *,
    namespaces: Sequence[str],
    address: str | None = None,
    ui: bool = False,
    log: Path | None = None,
    port: int | None = None,
    ui_port: int | None = None,
    choice: str | None = None,
    database: Path | None = None,
    dynamic_config: Sequence[str] = (),
) -> AsyncIterator[Server]:
    """A server with *namespaces*: the one at *address*, or one that is started and ends with this context.

    *choice* names the server's version; None leaves it to the environment. A port that is not given is a free one.

    Raises:
        NoServerError: The server cannot be run, or one of the ports is in use.
    """
    if address is not None:
        version = await check_version(address)
        await ensure_namespaces(address, namespaces)
        yield Server(address=address, ui=None, version=version, pid=None)
        return
    program = await temporal_cli.find(choice or temporal_cli.chosen())
    free_port, free_ui_port, http_port, metrics_port = free_ports(4)
    own_port, own_ui_port = port or free_port, ui_port or free_ui_port
    for number in (own_port, own_ui_port):
        require_free(number)
    arguments = [str(program), "server", "start-dev", "--ip", "127.0.0.1", "--port", str(own_port)]
    arguments += ["--ui-port", str(own_ui_port)] if ui else ["--headless"]
    arguments += ["--http-port", str(http_port), "--metrics-port", str(metrics_port), "--log-level", "error"]
    if database is not None:
        # For servers that are killed, on machines that are not: what was written stays with the operating system, and
        # a sync of every transaction would make a busy disk stall all of it.
        pragmas = ("journal_mode=wal", "synchronous=off")
        arguments += ["--db-filename", str(database), *(f"--sqlite-pragma={pragma}" for pragma in pragmas)]
    for name in namespaces:
        arguments += ["--namespace", name]
    # As on Temporal Cloud; off by default in the open-source server. It saves a hop per call.
    eager = "system.enableActivityEagerExecution"
    if not any(each.startswith(f"{eager}=") for each in dynamic_config):
        arguments += ["--dynamic-config-value", f"{eager}=true"]
    # The dev server sets it up to version 1.30. An operation of an endpoint with a URL needs it.
    template = f"http://127.0.0.1:{http_port}/namespaces/{{{{.NamespaceName}}}}/nexus/callback"
    template_name = "component.nexusoperations.callback.endpoint.template"
    for each in (f"{template_name}={json.dumps(template)}", *dynamic_config):
        arguments += ["--dynamic-config-value", each]
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else subprocess.DEVNULL
        own_address = f"127.0.0.1:{own_port}"

        async def start() -> asyncio.subprocess.Process:
            return await asyncio.create_subprocess_exec(
                *arguments, stdout=output, stderr=output, start_new_session=True
            )

        process = await start()

        async def restart(pause: float) -> None:
            nonlocal process
            process.kill()
            await process.wait()
            await asyncio.sleep(pause)
            process = await start()
            await _until_ready(own_address, namespaces, process)

        try:
            await with_ticker("starting the Temporal server", _until_ready(own_address, namespaces, process))
            version = await check_version(own_address)
            yield Server(
                address=own_address,
                ui=f"http://127.0.0.1:{own_ui_port}" if ui else None,
                version=version,
                program=program,
                pid=process.pid,
                metrics=f"http://127.0.0.1:{metrics_port}/metrics",
                http=f"http://127.0.0.1:{http_port}",
                restart=restart,
            )
        finally:
            await stop_process(process)


async def stop_process(process: asyncio.subprocess.Process, *, patience: float = 15) -> None:
    """End a process that we started: ask, then insist."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), patience)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _until_ready(address: str, namespaces: Sequence[str], process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + _STARTUP_TIMEOUT.total_seconds()
    while True:
        try:
            for name in namespaces:
                client = await Client.connect(address, namespace=name)
                await client.count_workflows()
        except (RuntimeError, RPCError):
            if process.returncode is not None:
                message = f"the Temporal server ended at once with code {process.returncode}"
                raise NoServerError(message) from None
            if time.monotonic() > deadline:
                message = "the Temporal server did not become ready"
                raise NoServerError(message) from None
            await asyncio.sleep(0.1)
        else:
            return
