"""A real Temporal server for demo and tests: found, downloaded or built, then started on free ports.

Looked for in this order: an address given by the user (then nothing is started), a `temporal` on PATH, an earlier build
in the user's cache, the download by the SDK, `go install`. Everything said goes to standard error.
"""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import GetSystemInfoRequest, RegisterNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

CLI_VERSION = "1.5.1"
"""Newest version that `go install` takes, and the one the suite was run against."""
OLDEST_TESTED = (1, 29, 1)
"""Server version inside it."""

_GO_PACKAGE = f"github.com/temporalio/cli/cmd/temporal@v{CLI_VERSION}"
_DOWNLOAD_TIMEOUT = timedelta(minutes=3)
_STARTUP_TIMEOUT = timedelta(seconds=60)

NONE_FOUND = f"""\
No Temporal server could be found, downloaded or built. Do one of these and try again:
  - install the Temporal CLI (https://docs.temporal.io/cli) so that `temporal` is on PATH;
  - install Go 1.24 or newer, with access to a module proxy: it is then built by `go install {_GO_PACKAGE}`;
  - start a server yourself and name it: TEMPORAL_ADDRESS=host:port, or --temporal host:port."""

T = TypeVar("T")


class NoServerError(Exception):
    """None of the ways to a server worked; the text says what to do."""


def say(text: str) -> None:
    """Tell the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


async def with_ticker(what: str, work: Awaitable[T]) -> T:
    """Await *work*, saying every few seconds that it goes on."""
    task = asyncio.ensure_future(work)
    began = time.monotonic()
    say(f"{what} …")
    while not (await asyncio.wait({task}, timeout=5))[0]:
        say(f"{what} … {time.monotonic() - began:.0f} s")
    return task.result()


def cached_binary() -> Path:
    """Where a build or download is kept between runs."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "callback-bridge" / f"temporal-{CLI_VERSION}" / "temporal"


async def find_binary() -> Path:
    """A `temporal` to run; downloads or builds it where there is none.

    Raises:
        NoServerError: No way worked.
    """
    on_path = shutil.which("temporal")
    if on_path:
        return Path(on_path)
    cached = cached_binary()
    if cached.is_file():
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    for what, way in (
        (f"downloading the Temporal CLI {CLI_VERSION}", _download),
        (f"building the Temporal CLI {CLI_VERSION} with Go (a few minutes, once)", _build),
    ):
        # Made aside and moved: two runs at once must not see half a binary.
        with tempfile.TemporaryDirectory(dir=cached.parent) as aside:
            try:
                made = await with_ticker(what, way(Path(aside)))
            except NoServerError as error:
                say(f"  not possible: {error}")
                continue
            made.rename(cached)
            return cached
    raise NoServerError(NONE_FOUND)


async def _download(into: Path) -> Path:
    try:
        async with asyncio.timeout(_DOWNLOAD_TIMEOUT.total_seconds()):
            environment = await WorkflowEnvironment.start_local(
                download_dest_dir=str(into), dev_server_download_version=f"v{CLI_VERSION}"
            )
            await environment.shutdown()
    except (RuntimeError, TimeoutError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "no answer in time"
        raise NoServerError(reason) from None
    made = [name for name in os.listdir(into) if name.startswith("temporal")]  # noqa: PTH208 - two entries, no wait
    if not made:
        message = "the SDK downloaded nothing"
        raise NoServerError(message)
    return into / made[0]


async def _build(into: Path) -> Path:
    go = shutil.which("go")
    if go is None:
        message = "no `go` on PATH"
        raise NoServerError(message)
    process = await asyncio.create_subprocess_exec(
        *(go, "install", "-ldflags", "-s -w", _GO_PACKAGE),
        env={**os.environ, "GOBIN": str(into)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, complaints = await process.communicate()
    if process.returncode != 0:
        raise NoServerError(complaints.decode(errors="replace").strip().splitlines()[-1][:200])
    return into / "temporal"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    address: str
    ui: str | None
    """Base URL of its web UI, where we know of one."""
    version: str
    pid: int | None
    """Of its first process. None: it was there before us."""
    metrics: str | None = None
    """URL of its Prometheus metrics, where we know of one."""
    http: str | None = None
    """Base URL of its HTTP port, where completions of Nexus operations arrive, where we know of one."""
    restart: Callable[[float], Awaitable[None]] | None = None
    """Kill it, and start it again after so many seconds, on the same ports and with its database file if it has one."""


async def check_version(address: str) -> str:
    """The version of the server at *address*, said; with a warning where it is older than the oldest tested."""
    client = await Client.connect(address, lazy=False)
    version = (await client.workflow_service.get_system_info(GetSystemInfoRequest())).server_version
    say(f"Temporal server {version} at {address}")
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST_TESTED:
        oldest = ".".join(map(str, OLDEST_TESTED))
        say(f"warning: older than {oldest}, the oldest version that this was tested with")
    return version


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
    database: Path | None = None,
    dynamic_config: Sequence[str] = (),
) -> AsyncIterator[Server]:
    """A server with *namespaces*: the one at *address*, or one that lives as long as this context."""
    if address is not None:
        version = await check_version(address)
        await ensure_namespaces(address, namespaces)
        yield Server(address=address, ui=None, version=version, pid=None)
        return
    binary = await find_binary()
    own_port, ui_port, http_port, metrics_port = free_ports(4)
    own_port = port or own_port
    arguments = [str(binary), "server", "start-dev", "--ip", "127.0.0.1", "--port", str(own_port)]
    arguments += ["--ui-port", str(ui_port)] if ui else ["--headless"]
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
    for each in dynamic_config:
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
                ui=f"http://127.0.0.1:{ui_port}" if ui else None,
                version=version,
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
