"""Run the tests against a real Temporal server; further arguments go to pytest.

TEMPORAL_ADDRESS=host:port names a server to use; otherwise one is found, downloaded or built, and started for the run.
"""

import asyncio
import os
import sys
from typing import NoReturn

from scripts.environment.server import NoServerError, find_binary, say
from scripts.environment.stack import ROOT


def main() -> NoReturn:
    """Make sure of a server, with progress, then hand over to pytest."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--help"]:
        print(f"usage: scripts/test [PYTEST ARGUMENT …]\n\n{__doc__}")
        raise SystemExit(0)
    if "TEMPORAL_ADDRESS" not in os.environ:
        try:
            say(f"Temporal server: {asyncio.run(find_binary())}")
        except NoServerError as error:
            say(str(error))
            raise SystemExit(1) from None
    os.chdir(ROOT)
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    main()
