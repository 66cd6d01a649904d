"""Runs `callback-bridge` in forked processes: `python -m tests.support.command_server`.

The server has imported the command and every side of it, which takes a new process most of a second. Standard input has
a JSON object for each command, with the arguments, the environment, the folder, and the file of each standard stream.
Standard output has a line with the exit code. Nothing has connected to Temporal before a fork: no thread is lost.
"""

import importlib
import json
import os
import signal
import sys
from typing import Any

from bridge.admin.root import COMMANDS, main

LIMIT_S = 60
"""A command that takes longer is ended by SIGALRM."""


def _become(command: dict[str, Any]) -> None:
    """Turn this forked process into the one of *command*. It does not return."""
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["environment"])
    for descriptor, path in enumerate(command["streams"]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    # As `python -m bridge` has them.
    sys.path[0] = command["cwd"]
    sys.argv = ["callback-bridge", *command["arguments"]]
    signal.alarm(LIMIT_S)
    main()


if __name__ == "__main__":
    for path in COMMANDS.values():
        importlib.import_module(path.partition(":")[0])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
