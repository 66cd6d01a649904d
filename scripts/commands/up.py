"""Start the whole example and keep it up until Ctrl-C or SIGTERM.

When everything is ready, standard error shows commands to try. Standard output has one line of JSON, for machines, that
says where everything is.
"""

import argparse
import asyncio
import json
from typing import NoReturn

from scripts.environment import temporal_cli
from scripts.environment.command_end import STOPPED, end, until_stopped
from scripts.environment.progress import say
from scripts.environment.stack import (
    CALLER_NAMESPACE,
    HANDLER_NAMESPACE,
    ORDER_QUEUE,
    Stack,
    StackOptions,
    running_stack,
)

PORT = 7243
"""Where the server of `scripts/up` listens: not on 7233, where a developer's own server often runs."""


_ORDERS = ('{"order_id": "7", "amount": 12.5}', '{"order_id": "8", "amount": 2500}')
_COUNTS = ("receivers", "handlers", "order-workers", "payment-workers")


def add_stack_options(
    parser: argparse.ArgumentParser, *, first_lease: float, renewal: float, clusters: int, port: int | None = None
) -> None:
    """Add the options that `demo` and `up` share, with the defaults in which they differ."""
    temporal_cli.add_address_option(parser)
    temporal_cli.add_server_option(parser)
    parser.add_argument(
        "--clusters",
        type=int,
        choices=[1, 2],
        help=f"1: one server for both teams; 2: one for each, {temporal_cli.OLDEST} and {temporal_cli.NEWEST} unless "
        f"--server names another (default: {clusters}, or 1 with --temporal)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=port,
        help="port of the first server that is started; its UI is 1000 higher, a second server has the next port "
        f"(default: {port or 'a free one'})",
    )
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
    parser.add_argument(
        "--separate",
        action="store_true",
        help="run receiver, handler service and both workers as four processes, not one process for each team",
    )
    for name in _COUNTS:
        parser.add_argument(f"--{name}", type=int, default=1, metavar="N", help="with --separate: how many, default 1")
    parser.add_argument("--keep", action="store_true", help="keep generated settings and logs")
    parser.set_defaults(default_clusters=clusters)


def stack_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> StackOptions:
    """The options as given. Ends the process with a usage error where they contradict each other."""
    if arguments.temporal is not None and arguments.clusters == 2:
        parser.error("--temporal and TEMPORAL_ADDRESS name one server: with them, --clusters can only be 1")
    if not arguments.separate and any(getattr(arguments, name.replace("-", "_")) != 1 for name in _COUNTS):
        parser.error(f"{', '.join(f'--{name}' for name in _COUNTS)} need --separate")
    return StackOptions(
        temporal=arguments.temporal,
        clusters=arguments.clusters or (1 if arguments.temporal is not None else arguments.default_clusters),
        server=arguments.server,
        port=arguments.port,
        first_lease=arguments.first_lease,
        renewal=arguments.renewal,
        renewal_maximum=arguments.renewal_maximum,
        settlement=arguments.settlement,
        separate=arguments.separate,
        receivers=arguments.receivers,
        handlers=arguments.handlers,
        order_workers=arguments.order_workers,
        payment_workers=arguments.payment_workers,
        keep=arguments.keep,
    )


async def _up(options: StackOptions) -> int:
    async def work() -> int:
        async with running_stack(options) as stack:
            say(instructions(stack))
            print(json.dumps(stack.description()), flush=True)
            await asyncio.gather(*(_report_end(name, process) for name, process in stack.processes.items()))
            await asyncio.Event().wait()
        return 0

    code = await until_stopped(work)
    return 0 if code == STOPPED else code


def instructions(stack: Stack) -> str:
    """What a person can do with a running *stack*: commands to copy, and where the UI is."""
    caller, handler = stack.servers["caller"], stack.servers["handler"]
    temporal = str(caller.program or "temporal")
    order = f"--namespace {CALLER_NAMESPACE} --task-queue {ORDER_QUEUE} --type OrderWorkflow --input"
    approval = f"--namespace {HANDLER_NAMESPACE} --workflow-id payment-8 --name approve"
    lines = [
        "",
        f"Temporal's command line: {temporal}",
        *(f"Temporal's UI: {url}" for url in dict.fromkeys((caller.ui, handler.ui)) if url is not None),
        "",
        "Send an order, which is paid at once:",
        f"  {temporal} workflow execute --address {caller.address} {order} '{_ORDERS[0]}'",
        "Send one that waits for a reviewer, then approve its payment in the other namespace:",
        f"  {temporal} workflow start --address {caller.address} {order} '{_ORDERS[1]}'",
        f"  {temporal} workflow signal --address {handler.address} {approval}",
        "",
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)


async def _report_end(name: str, process: asyncio.subprocess.Process) -> None:
    code = await process.wait()
    say(f"{name} (process {process.pid}) ended by itself with code {code}")


def main() -> NoReturn:
    """Parse the command line and keep the stack up."""
    parser = argparse.ArgumentParser(prog="scripts/up", description=__doc__.partition("\n\n")[0] if __doc__ else None)
    add_stack_options(parser, first_lease=30.0, renewal=60.0, clusters=1, port=PORT)
    end(_up(stack_options(parser, parser.parse_args())))


if __name__ == "__main__":
    main()
