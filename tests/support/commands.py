"""The command `callback-bridge` as a process."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from scripts.environment.processes import stop_process
from scripts.environment.stack import ROOT

BRIDGE = (sys.executable, "-m", "bridge")
"""The command as run from a checkout."""


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `callback-bridge` with *arguments* to its end."""
    return subprocess.run(
        [*BRIDGE, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


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
