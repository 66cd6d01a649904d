"""Progress for people, on standard error. Standard output is for machines."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def say(text: str) -> None:
    """Print one line for the user."""
    print(text, file=sys.stderr, flush=True)


def conclude(faults: Sequence[str], unjudged: Sequence[str], figures: Mapping[str, Any] | None) -> int:
    """Say what a run found wrong and what it did not judge, print its *figures* as JSON, and return the exit code."""
    for each in unjudged:
        say(f"not judged {each}")
    for fault in faults:
        say(f"NOT right  {fault}")
    say(f"{len(faults)} checks failed" if faults else "all checks passed")
    if figures is not None:
        print(json.dumps(figures), flush=True)
    return 1 if faults else 0


async def with_ticker(what: str, work: Awaitable[T]) -> T:
    """Await *work*. Announce it first, and report every five seconds that it still runs."""
    task = asyncio.ensure_future(work)
    began = time.monotonic()
    say(f"{what} …")
    while not (await asyncio.wait({task}, timeout=5))[0]:
        say(f"{what} … {time.monotonic() - began:.0f} s")
    return task.result()
