"""How a command of this repository ends: in order after a signal, and with an exit code."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from bridge.http.listener import stop_on_signals
from scripts.environment.progress import say
from scripts.environment.temporal_cli import NoServerError

STOPPED = 130
"""Exit code of a command that Ctrl-C ended, as shells name it."""


async def until_stopped(work: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run *work*; Ctrl-C or SIGTERM ends it in order, closing what it opened."""
    stop = asyncio.ensure_future(stop_on_signals().wait())
    task = asyncio.ensure_future(work())
    await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        say("stopping …")
        task.cancel()
        await asyncio.wait({task})
    stop.cancel()
    return STOPPED if task.cancelled() else task.result()


def end(main: Awaitable[int]) -> NoReturn:
    """Run *main* and end the process with its code.

    By `os._exit`, after everything is closed and flushed: on CPython 3.11 a process that used the SDK may abort while
    the interpreter shuts down (temporalio/sdk-python issue 300), which would turn a good run red.
    """

    async def run() -> int:
        return await main

    try:
        code = asyncio.run(run())
    except (NoServerError, RuntimeError) as error:
        say(str(error))
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
