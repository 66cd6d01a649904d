"""Run the tests against a real Temporal server, several at a time; further arguments go to pytest.

TEMPORAL_ADDRESS=HOST:PORT names a server to use. Without it every test process starts a server of its own.
"""

import argparse
import asyncio
import os
import sys
from typing import NoReturn

from scripts.environment import temporal_cli
from scripts.environment.progress import say
from scripts.environment.stack import ROOT


def main() -> NoReturn:
    """Make sure that there is a server, with progress, then run pytest."""
    parser = argparse.ArgumentParser(prog="scripts/test", description=__doc__, allow_abbrev=False)
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--all", action="store_const", const="all", dest="tier", help="add what is slow or needs more")
    tier.add_argument(
        "--short", action="store_const", const="short", dest="tier", help="only one short case of each part of --all"
    )
    temporal_cli.add_server_option(parser)
    chosen, arguments = parser.parse_known_args()
    server = os.environ[temporal_cli.CHOICE_VARIABLE] = chosen.server or temporal_cli.OLDEST
    if "TEMPORAL_ADDRESS" not in os.environ:
        try:
            say(f"Temporal server: {asyncio.run(temporal_cli.find(server))}")
        except temporal_cli.NoServerError as error:
            say(str(error))
            raise SystemExit(1) from None
    # The tests wait more than they compute: two processes for each core keep it busy. The parts compute.
    processes = "1" if chosen.tier == "short" else str(2 * (os.cpu_count() or 1))
    os.chdir(ROOT)
    sys.stderr.flush()
    pytest = ["-m", "pytest", "--tier", chosen.tier or "suite", "-n", processes, "--dist", "worksteal", *arguments]
    os.execv(sys.executable, [sys.executable, *pytest])


if __name__ == "__main__":
    main()
