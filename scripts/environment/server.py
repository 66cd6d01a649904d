"""A real Temporal server for demo, tests and benchmark: one that the user names, or one that is started here."""

import asyncio
import contextlib
import functools
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest, RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from scripts.environment import temporal_cli
from scripts.environment.processes import ServerPart
from scripts.environment.production_server import running_production_server
from scripts.environment.progress import say, with_ticker
from scripts.environment.temporal_cli import OLDEST, POSTGRES, NoServerError

DEV_SERVER = "temporal"
"""Name of the only part of a dev server."""


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
    parts: Mapping[str, ServerPart] = field(default_factory=dict)
    """Its processes by name. None of them: the server was there before us."""
    program: Path | None = None
    """The `temporal` command line that holds the server. None: the user named a server."""
    metrics: Sequence[str] = ()
    """URLs of its Prometheus metrics, as far as we know them."""
    http: str | None = None
    """Base URL of its HTTP port, where completions of Nexus operations arrive, where we know of one."""

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor, *_ = _numbers(self.version)
        return major, minor


async def check_version(address: str) -> str:
    """Return the version of the server at *address*, and print it. Warn if it is older than the oldest tested one."""
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

    *choice* names the server's version, or production's server; None leaves it to the environment. A port that is not
    given is a free one. *database* is for the dev server; production's has PostgreSQL, and no UI.

    Raises:
        NoServerError: The server cannot be run, or one of the ports is in use.
        RuntimeError: Production's server cannot be built.
    """
    if address is not None:
        version = await check_version(address)
        await ensure_namespaces(address, namespaces)
        yield Server(address=address, ui=None, version=version)
        return
    choice = choice or temporal_cli.chosen()
    program = await temporal_cli.find(choice)
    free_port, free_ui_port, http_port, metrics_port = free_ports(4)
    own_port, own_ui_port = port or free_port, ui_port or free_ui_port
    for number in (own_port, own_ui_port):
        require_free(number)
    own_address, has_ui = f"127.0.0.1:{own_port}", ui and choice != POSTGRES
    flags = {**_default_flags(http_port), **dict(each.split("=", 1) for each in dynamic_config)}
    async with contextlib.AsyncExitStack() as stack:
        if choice == POSTGRES:
            running = running_production_server(
                port=own_port, http_port=http_port, flags=flags, log_folder=log and log.parent
            )
            cluster = await stack.enter_async_context(running)
            await ensure_namespaces(own_address, namespaces)
            await asyncio.gather(*(_until_known(node, namespaces) for node in cluster.frontends))
            parts, metrics = cluster.parts, cluster.metrics
        else:
            arguments = [str(program), "server", "start-dev", "--ip", "127.0.0.1", "--port", str(own_port)]
            arguments += ["--ui-port", str(own_ui_port)] if has_ui else ["--headless"]
            arguments += ["--http-port", str(http_port), "--metrics-port", str(metrics_port), "--log-level", "error"]
            if database is not None:
                # For servers that are killed, on machines that are not: what was written stays with the operating
                # system, and a sync of every transaction would make a busy disk stall all of it.
                pragmas = ("journal_mode=wal", "synchronous=off")
                arguments += ["--db-filename", str(database), *(f"--sqlite-pragma={pragma}" for pragma in pragmas)]
            for name in namespaces:
                arguments += ["--namespace", name]
            for name, value in flags.items():
                arguments += ["--dynamic-config-value", f"{name}={value}"]
            process = ServerPart(
                DEV_SERVER, arguments, is_ready=functools.partial(_knows, own_address, namespaces), log=log
            )
            stack.push_async_callback(process.stop)
            await with_ticker("starting the Temporal server", process.start())
            parts, metrics = {DEV_SERVER: process}, [f"http://127.0.0.1:{metrics_port}/metrics"]
        yield Server(
            address=own_address,
            ui=f"http://127.0.0.1:{own_ui_port}" if has_ui else None,
            version=await check_version(own_address),
            program=program,
            parts=parts,
            metrics=metrics,
            http=f"http://127.0.0.1:{http_port}",
        )


def _default_flags(http_port: int) -> dict[str, str]:
    """The dynamic configuration of every server that we start, each value as JSON."""
    http = f"127.0.0.1:{http_port}"
    return {
        # As on Temporal Cloud; off by default in the open-source server. It saves a hop per call.
        "system.enableActivityEagerExecution": "true",
        # The dev server sets it up to version 1.30. An operation of an endpoint with a URL needs it.
        "component.nexusoperations.callback.endpoint.template": json.dumps(
            f"http://{http}/namespaces/{{{{.NamespaceName}}}}/nexus/callback"
        ),
    }


async def _until_known(address: str, namespaces: Sequence[str]) -> None:
    """Wait until the node at *address* has read that there are *namespaces*, which it does every few seconds."""
    async with asyncio.timeout(60):
        while True:
            if await _knows(address, namespaces):
                return
            await asyncio.sleep(0.1)


async def _knows(address: str, namespaces: Sequence[str]) -> bool:
    """Whether the server at *address* lists the workflows of all *namespaces*."""
    try:
        for name in namespaces:
            client = await Client.connect(address, namespace=name)
            await client.count_workflows()
    except (RuntimeError, RPCError):
        return False
    return True
