"""What both command lines share: connecting to Temporal, logging, `keys new`, and clean ends."""

import argparse
import asyncio
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from temporalio.client import Client
from temporalio.converter import DataConverter

from bridge.runtime.settings import SettingsError
from bridge.runtime.temporal import connect_config
from bridge.security.keys import new_key


class CommandError(Exception):
    """What was asked for cannot be done. The text says why, and what to do; the process ends with code 1."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, event, and the fields given as `extra` under `bridge.…`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry |= {name: value for name, value in vars(record).items() if name.startswith("bridge.")}
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_logging(level: str) -> None:
    """JSON lines on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its core warns of reports that came after a completion, and prints the task token with it.
    logging.getLogger("temporalio.worker").setLevel(max(logging.ERROR, logging.getLevelName(level.upper())))


async def connect(data_converter: str | None) -> Client:
    """Connect as the environment says (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`, TLS, API key, profiles).

    Raises:
        SettingsError: The data converter cannot be imported, or Temporal cannot be reached.
    """
    config = connect_config()
    config.setdefault("target_host", "localhost:7233")
    if data_converter is not None:
        config["data_converter"] = import_attribute(data_converter, DataConverter)
    try:
        return await Client.connect(**config)
    except (RuntimeError, ValueError) as error:
        message = f"cannot connect to Temporal at {config['target_host']}: {error}"
        raise SettingsError(message) from None


def import_module(name: str) -> ModuleType:
    """Import a user's module by its dotted name, also from the current directory.

    Raises:
        SettingsError: There is none, or it does not import.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        message = f"cannot import {name}: {type(error).__name__}: {error}"
        raise SettingsError(message) from error


def import_attribute(name: str, kind: type[Any]) -> Any:
    """Import `module:attribute`, an instance of *kind*.

    Raises:
        SettingsError: It is none.
    """
    module, _, attribute = name.partition(":")
    found = getattr(import_module(module), attribute, None) if attribute else None
    if not isinstance(found, kind):
        message = f"{name} names no {kind.__name__}; the form is module:attribute"
        raise SettingsError(message)
    return found


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default: from the settings)")
    parser.add_argument("--port", type=_port, help="port to listen on, 0 for a free one (default: from the settings)")
    parser.add_argument("--reuse-port", action="store_true", help="let several processes share the port (SO_REUSEPORT)")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        message = f"{port} is not a port; ports are 0 to 65535"
        raise argparse.ArgumentTypeError(message)
    return port


def add_keys_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    keys = commands.add_parser("keys", help="make keys", description="Make keys for the settings.")
    new = keys.add_subparsers(dest="keys_command", required=True).add_parser(
        "new",
        help="print a new key ring",
        description="Print a key ring with one new random key, as TOML. Never give two rings the same key.",
    )
    new.add_argument("--id", default=time.strftime("%Y-%m-%d", time.gmtime()), help="key id (default: today)")
    new.add_argument("--json", action="store_true", help="print JSON instead")
    new.set_defaults(run=_print_new_key)


async def _print_new_key(arguments: argparse.Namespace) -> None:
    ring = {"signing": arguments.id, "keys": {arguments.id: new_key()}}
    if arguments.json:
        print(json.dumps(ring))
    else:
        print(f'signing = "{arguments.id}"\nkeys = {{ "{arguments.id}" = "{ring["keys"][arguments.id]}" }}')


def announce(service: str, url: str) -> None:
    """Tell whoever started us that we listen: one JSON line on standard output."""
    print(json.dumps({"service": service, "url": url, "pid": os.getpid()}), flush=True)


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> NoReturn:
    """Run the chosen command and end the process.

    It ends by `os._exit`, after everything is closed and flushed: on CPython 3.11 a process that used the SDK may abort
    while the interpreter shuts down (temporalio/sdk-python issue 300), and a clean stop must not look like a crash.
    """
    chosen = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace], Awaitable[None]] = chosen.run
    code = 0
    try:
        asyncio.run(_main(command, chosen))
    except SettingsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        code = 2
    except CommandError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        print(f"{parser.prog}: {error.strerror or type(error).__name__}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _main(command: Callable[[argparse.Namespace], Awaitable[None]], chosen: argparse.Namespace) -> None:
    await command(chosen)
