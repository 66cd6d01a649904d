"""Progress for people, on standard error. Standard output is for machines."""

import asyncio
import sys
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    """Print one line for the user."""
    print(text, file=sys.stderr, flush=True)


async def with_ticker(what: str, work: Awaitable[T]) -> T:
    """Await *work*. Announce it first, and report every five seconds that it still runs."""
    task = asyncio.ensure_future(work)
    began = time.monotonic()
    say(f"{what} …")
    while not (await asyncio.wait({task}, timeout=5))[0]:
        say(f"{what} … {time.monotonic() - began:.0f} s")
    return task.result()
