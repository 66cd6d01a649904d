"""The shared parts of all commands: logging, the options of `serve`, and how a process ends.

The commands are in `bridge.admin.root` and in the `admin` package of each side.
"""

import asyncio
import io
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from aiohttp import web
from cyclopts import CycloptsError, Parameter, validators
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.errors import BridgeError
from bridge.http.listener import bind, listening, stop_on_signals
from bridge.runtime.event_log import LogFormat
from bridge.runtime.settings import CONFIG_VARIABLE, PREFIX, BridgeSettings, SettingsError, load
from bridge.temporal import rpc_status
from bridge.temporal.connection import connect

NAME = "callback-bridge"

SettingsT = TypeVar("SettingsT", bound=BridgeSettings)


class CommandError(Exception):
    """A command cannot be carried out. The text names the reason and a remedy. The process ends with code 1."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The options of both `serve` commands."""

    host: str | None = None
    """Address to listen on. By default the address in the settings."""
    port: Annotated[int | None, Parameter(validator=validators.Number(gte=0, lte=65535))] = None
    """Port to listen on, 0 for a free one. By default the port in the settings."""
    reuse_port: bool = False
    """Let several processes share the port (SO_REUSEPORT)."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""
    log_format: LogFormat | None = None
    """Form of the log lines. By default text on a terminal, and JSON elsewhere."""

    def bind(self, host: str, port: int) -> list[socket.socket]:
        """Bind the address of the options. For what they leave out, the settings name *host* and *port*."""
        cure = "; stop what listens there, or choose a free address by --host and --port, or in the settings"
        port = port if self.port is None else self.port
        return bind(self.host or host, port, cure=cure, reuse_port=self.reuse_port)


async def serve(service: str, app: web.Application, sockets: Sequence[socket.socket]) -> None:
    """Serve *app* until a signal comes. Print one JSON line on standard output when it listens."""
    async with listening(app, sockets) as url:
        # Until here a signal cancels: Temporal may be silent while the service starts.
        stop = stop_on_signals()
        print(json.dumps({"service": service, "url": url, "pid": os.getpid()}), flush=True)
        await stop.wait()


@asynccontextmanager
async def connected(model: type[SettingsT]) -> AsyncIterator[tuple[Client, SettingsT | None]]:
    """Connect as the service of the side does. The settings are None if neither BRIDGE_CONFIG nor BRIDGE_NAME is set.

    Raises:
        CommandError: Temporal or a reader of the bridge refused what was asked for.
    """
    # Without a file the variables hold all settings, of which `name` is required.
    settings = load(model) if os.environ.get(CONFIG_VARIABLE) or os.environ.get(f"{PREFIX}NAME") else None
    client = await connect(settings)
    try:
        yield client, settings
    except (BridgeError, RPCError) as error:
        raise CommandError(refusal(error)) from None


def refusal(error: BridgeError | RPCError) -> str:
    """Say why a command was not carried out."""
    return rpc_status.refusal(error) if isinstance(error, RPCError) else str(error)


def run(main: Callable[[], Coroutine[Any, Any, None]], *, name: str = NAME) -> NoReturn:
    """Run *main* and end the process with an exit code.

    The codes: 0 for success, 1 if a command cannot be carried out, 2 for bad usage or settings, 130 if interrupted.

    When everything is closed and flushed, `os._exit` ends the process. On CPython 3.11 a process that used the SDK may
    otherwise abort while the interpreter shuts down (temporalio/sdk-python issue 300), which would look like a crash.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # If the terminal cannot show a character, print its code instead of raising an error.
            stream.reconfigure(errors="backslashreplace")
    code, problem = 0, ""
    try:
        try:
            asyncio.run(_interruptible(main))
        finally:
            # A command may print a report before it fails.
            if sys.stdout is not None:
                sys.stdout.flush()
    except (SettingsError, CycloptsError) as error:
        code, problem = 2, str(error)
    except CommandError as error:
        code, problem = 1, str(error)
    except BrokenPipeError:
        code, problem = 1, "standard output was closed before everything was written"
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, problem = 1, f"{where}{error.strerror or type(error).__name__}"
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 130
    logging.shutdown()
    if problem and sys.stderr is not None:
        print(f"{name}: {problem}", file=sys.stderr, flush=True)
    os._exit(code)


async def _interruptible(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Let SIGTERM end *main* like Ctrl-C, until *main* installs its own signal handlers."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await main()
