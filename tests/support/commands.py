"""The command `callback-bridge` as a process."""

import asyncio
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from scripts.environment.processes import stop_process
from scripts.environment.stack import ROOT

BRIDGE = (sys.executable, "-m", "bridge")
"""The command as run from a checkout."""


@functools.cache
def _server() -> "subprocess.Popen[str]":
    """It ends with this process, when its standard input does."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.command_server"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `callback-bridge` with *arguments* to its end, in a process that is forked from one that has imported it.

    A test of what happens while Python starts runs `BRIDGE` itself.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory(prefix="callback-bridge-command-") as folder:
        streams = [os.devnull, *(f"{folder}/{name}" for name in ("stdout", "stderr"))]
        command = {
            "arguments": arguments,
            "environment": {**os.environ, "PYTHONPATH": str(ROOT), **environment},
            "cwd": str(cwd or Path.cwd()),
            "streams": streams,
        }
        server.stdin.write(json.dumps(command) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (Path(path).read_text() for path in streams[1:])
    return subprocess.CompletedProcess([*BRIDGE, *arguments], code, out, err)


@contextlib.asynccontextmanager
async def process(
    *command: str, cwd: Path | None = None, **environment: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Any]]:
    """A process, and the JSON line that it prints when it is ready."""
    started = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 20,
    )
    assert started.stdout is not None
    assert started.stderr is not None
    drain = asyncio.create_task(started.stderr.read())
    try:
        line = await asyncio.wait_for(started.stdout.readline(), 120)
        assert line, (await drain).decode()
        yield started, json.loads(line)
    finally:
        # A command that started others ends them first.
        await stop_process(started)
        await drain
