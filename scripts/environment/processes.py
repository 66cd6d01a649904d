"""Processes that we start: ended in order, or killed and started again while others use them."""

import asyncio
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.environment.temporal_cli import NoServerError

_STARTUP_S = 60.0
"""Longest time until a started process is ready."""
_AGAIN_S = 0.5
"""Pause before a process that has ended at once is started again."""


class ServerPart:
    """A process of a Temporal server, which can be killed and started again."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        is_ready: Callable[[], Awaitable[bool]],
        log: Path | None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """*options* go to the call that starts the process."""
        self.name = name
        self._command = command
        self._is_ready = is_ready
        self._log = log
        self._options = options or {}
        self._process: asyncio.subprocess.Process | None = None
        self._was_ready = False

    @property
    def pid(self) -> int:
        """Of the process that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None: the process runs, or was never started."""
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        """Start the process, and wait until it is ready.

        A process that was ready once may need another part that is down now. If it ends, it is started again.

        Raises:
            NoServerError: The process is not ready after a minute, or it ends at its first start.
        """
        deadline = time.monotonic() + _STARTUP_S
        while True:
            process = await self._spawn()
            while process.returncode is None:
                if await self._is_ready():
                    self._was_ready = True
                    return
                if time.monotonic() > deadline:
                    message = f"the {self.name} did not become ready within {_STARTUP_S:g} s{self._log_hint()}"
                    raise NoServerError(message)
                await asyncio.sleep(0.1)
            if not self._was_ready or time.monotonic() > deadline:
                message = f"the {self.name} ended at once with code {process.returncode}{self._log_hint()}"
                raise NoServerError(message)
            await asyncio.sleep(_AGAIN_S)

    async def kill(self) -> None:
        """Kill the process if it runs, by SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def restart(self, down_s: float) -> None:
        """Kill the process, and start it again after *down_s* seconds."""
        await self.kill()
        await asyncio.sleep(down_s)
        await self.start()

    async def stop(self) -> None:
        """End the process if it runs."""
        if self._process is not None:
            await stop_process(self._process)

    async def _spawn(self) -> asyncio.subprocess.Process:
        output = subprocess.DEVNULL if self._log is None else self._log.open("ab")
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdout=output, stderr=output, start_new_session=True, **self._options
            )
        finally:
            if not isinstance(output, int):
                output.close()
        return self._process

    def _log_hint(self) -> str:
        said = "" if self._log is None else self._log.read_text(errors="replace").strip()[-1000:]
        return f":\n{said}" if said else ""


async def stop_process(process: asyncio.subprocess.Process, *, patience: float = 15) -> None:
    """End a process that we started. If it is still there after *patience* seconds, kill it."""
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), patience)
    except TimeoutError:
        process.kill()
        await process.wait()
