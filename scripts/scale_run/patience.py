"""Waits for numbers that grow, and ends a run in which nothing goes on."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from scripts.environment.progress import say

PATIENCE_S = 120.0
"""Longest time without any progress."""
_SAY_S = 10.0


class NoProgressError(RuntimeError):
    """The run does not get on."""


class Progress:
    """Reports how many are done, and ends a run in which nothing goes on."""

    def __init__(self, what: str, total: int, *, patience_s: float = PATIENCE_S) -> None:
        self._what, self._total, self._patience_s = what, total, patience_s
        self._done, self._at = -1, time.monotonic()
        self._said = time.monotonic()

    def report(self, done: int) -> None:
        """Take note that *done* are done now.

        Raises:
            NoProgressError: The number has not grown for longer than the patience.
        """
        now = time.monotonic()
        if done > self._done:
            self._done, self._at = done, now
        elif now - self._at > self._patience_s:
            message = f"{done} of {self._total} {self._what}, and no more for {self._patience_s:g} s"
            raise NoProgressError(message)
        if now - self._said > _SAY_S:
            self._said = now
            say(f"  {done} of {self._total} {self._what}")


async def until_all(
    what: str, total: int, read: Callable[[], Awaitable[int]], *, pause_s: float, patience_s: float = PATIENCE_S
) -> None:
    """Wait until *read* returns *total* or more, with a pause between two readings.

    Raises:
        NoProgressError: The number has not grown for longer than the patience.
    """
    progress = Progress(what, total, patience_s=patience_s)
    while (done := await read()) < total:
        progress.report(done)
        await asyncio.sleep(pause_s)
