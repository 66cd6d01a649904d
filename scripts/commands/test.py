"""Run the tests against a real Temporal server, several at a time; further arguments go to pytest.

TEMPORAL_ADDRESS=HOST:PORT names a server to use. Without it every test process starts a server of its own.
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from scripts.environment import production_server, temporal_cli
from scripts.environment.progress import say
from scripts.environment.stack import ROOT

SOME_FAILED, NO_TESTS = 1, 5
"""Exit codes of pytest. It has the second where the arguments leave no test."""


def main() -> NoReturn:
    """Make sure that there is a server, with progress, then run pytest."""
    parser = argparse.ArgumentParser(prog="scripts/test", description=__doc__, allow_abbrev=False)
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument(
        "--all",
        action="store_const",
        const="all",
        dest="tier",
        help="add what is slow or needs more; without --server also the suite on the newest server, and its core on "
        "those between",
    )
    tier.add_argument(
        "--short", action="store_const", const="short", dest="tier", help="only one short case of each part of --all"
    )
    temporal_cli.add_server_option(parser)
    chosen, arguments = parser.parse_known_args()
    every_server = chosen.server is None and "TEMPORAL_ADDRESS" not in os.environ
    runs = plan(chosen.tier or "suite", None if every_server else chosen.server or temporal_cli.OLDEST)
    os.chdir(ROOT)
    failed = [f"{tier} on {server}" for server, tier in runs if not passes(server, tier, arguments)]
    if len(runs) > 1:
        say(f"failed: {', '.join(failed)}" if failed else "passed on every server")
    raise SystemExit(1 if failed else 0)


def plan(tier: str, server: str | None) -> list[tuple[str, str]]:
    """Server and tier of each run. *server* is None where the user named none."""
    if tier != "all" or server is not None:
        return [(server or temporal_cli.OLDEST, tier)]
    oldest, *between, newest = temporal_cli.versions()
    return [(oldest, "all"), (newest, "suite"), *((version, "core") for version in between)]


def passes(server: str, tier: str, arguments: Sequence[str]) -> bool:
    """Whether the tests of *tier* pass on *server*.

    If pytest was interrupted or refuses the arguments, the whole run ends with the exit code of pytest.
    """
    os.environ[temporal_cli.CHOICE_VARIABLE] = server
    if "TEMPORAL_ADDRESS" not in os.environ:
        try:
            if server == temporal_cli.POSTGRES:
                production_server.require_possible()
                asyncio.run(production_server.server_programs())
            say(f"Temporal server: {asyncio.run(temporal_cli.find(server))}")
        except (temporal_cli.NoServerError, RuntimeError) as error:
            say(str(error))
            return False
    # The tests wait more than they compute: two processes for each core keep it busy. The parts compute.
    processes = "1" if tier == "short" else str(2 * (os.cpu_count() or 1))
    pytest = ["-m", "pytest", "--tier", tier, "-n", processes, "--dist", "worksteal", *arguments]
    with subprocess.Popen([sys.executable, *pytest]) as process:
        # A terminal interrupts pytest too, which then ends its servers.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        ended = process.wait()
    if ended == 0 or (ended == NO_TESTS and tier == "core"):
        return True
    if ended == SOME_FAILED:
        return False
    raise SystemExit(ended)


if __name__ == "__main__":
    main()
