"""Start the whole example and keep it up until Ctrl-C or SIGTERM.

When all is ready, one line of JSON on standard output tells where everything is; all else goes to standard error.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn

from bridge.runtime.http_server import stop_on_signals
from scripts.environment.server import NoServerError, say
from scripts.environment.stack import StackOptions, running_stack

STOPPED = 130
"""What a shell calls a command that Ctrl-C ended."""


def add_stack_options(parser: argparse.ArgumentParser, *, first_lease: float, renewal: float) -> None:
    """The options that `demo` and `up` share."""
    parser.add_argument(
        "--temporal",
        metavar="HOST:PORT",
        default=os.environ.get("TEMPORAL_ADDRESS"),
        help="use this server instead of starting one (default: TEMPORAL_ADDRESS)",
    )
    parser.add_argument("--port", type=int, help="port for the server that is started (default: a free one)")
    parser.add_argument(
        "--first-lease", type=float, default=first_lease, metavar="S", help="seconds, default %(default)s"
    )
    parser.add_argument(
        "--renewal", type=float, default=renewal, metavar="S", help="first renewal delay, default %(default)s"
    )
    parser.add_argument(
        "--renewal-maximum", type=float, default=3600.0, metavar="S", help="longest delay, default %(default)s"
    )
    parser.add_argument(
        "--settlement",
        type=float,
        default=5.0,
        metavar="S",
        help="how long a mid-size payment takes, default %(default)s",
    )
    for name in ("receivers", "handlers", "order-workers", "payment-workers"):
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="how many, default %(default)s")
    parser.add_argument("--keep", action="store_true", help="keep generated settings and logs")


def stack_options(arguments: argparse.Namespace) -> StackOptions:
    """The options as given."""
    return StackOptions(
        temporal=arguments.temporal,
        port=arguments.port,
        first_lease=arguments.first_lease,
        renewal=arguments.renewal,
        renewal_maximum=arguments.renewal_maximum,
        settlement=arguments.settlement,
        receivers=arguments.receivers,
        handlers=arguments.handlers,
        order_workers=arguments.order_workers,
        payment_workers=arguments.payment_workers,
        keep=arguments.keep,
    )


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


async def _up(options: StackOptions) -> int:
    async def work() -> int:
        async with running_stack(options) as stack:
            say("ready; Ctrl-C stops everything")
            print(json.dumps(stack.description()), flush=True)
            await asyncio.gather(*(_report_end(name, process) for name, process in stack.processes.items()))
            await asyncio.Event().wait()
        return 0

    code = await until_stopped(work)
    return 0 if code == STOPPED else code


async def _report_end(name: str, process: asyncio.subprocess.Process) -> None:
    code = await process.wait()
    say(f"{name} (process {process.pid}) ended by itself with code {code}")


def main() -> NoReturn:
    """Parse the command line and keep the stack up."""
    parser = argparse.ArgumentParser(prog="scripts/up", description=__doc__.partition("\n\n")[0] if __doc__ else None)
    add_stack_options(parser, first_lease=30.0, renewal=60.0)
    end(_up(stack_options(parser.parse_args())))


if __name__ == "__main__":
    main()
