"""The two teams' workers: `python -m examples.payments.workers orders` and `… payments`.

In production each team has its own file. Here they share one, because the workers differ in three names. The connection
comes from TEMPORAL_ADDRESS and TEMPORAL_NAMESPACE, the bridge's settings come from the file that BRIDGE_CONFIG names.
"""

import argparse
import json
import os
from datetime import timedelta

from temporalio.client import Client
from temporalio.worker import Worker

from bridge.admin import command
from bridge.http.listener import stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.temporal.connection import connect
from caller import CallerPlugin
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from examples.payments.payments import PAYMENT_QUEUE, PaymentWorkflow
from handler import HandlerPlugin

STOP_TIMEOUT = timedelta(seconds=10)
"""Time for activities that run when a worker stops. Without it the SDK cancels them at once."""


def order_worker(client: Client, *, serve_receiver: bool) -> Worker:
    """The order team's worker: its workflows may call through the bridge, and it may host the receiver too."""
    plugin = CallerPlugin(serve_receiver=serve_receiver)
    return Worker(
        client,
        task_queue=ORDER_QUEUE,
        workflows=[OrderWorkflow],
        plugins=[plugin],
        graceful_shutdown_timeout=STOP_TIMEOUT,
    )


def payment_worker(client: Client) -> Worker:
    """The payment team's worker: the outcomes of its workflows are delivered to their callers."""
    return Worker(
        client,
        task_queue=PAYMENT_QUEUE,
        workflows=[PaymentWorkflow],
        plugins=[HandlerPlugin()],
        graceful_shutdown_timeout=STOP_TIMEOUT,
    )


async def run_worker(arguments: argparse.Namespace) -> None:
    """Run one team's worker until it is asked to stop."""
    configure_logging("info")
    client = await connect()
    stop = stop_on_signals()
    is_order = arguments.team == "orders"
    worker = order_worker(client, serve_receiver=arguments.serve_receiver) if is_order else payment_worker(client)
    async with worker:
        print(json.dumps({"worker": arguments.team, "pid": os.getpid()}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.payments.workers", description=run_worker.__doc__)
    parser.add_argument("team", choices=["orders", "payments"])
    parser.add_argument(
        "--serve-receiver", action="store_true", help="orders: receive the callbacks in this process too"
    )
    parsed = parser.parse_args()
    command.run(lambda: run_worker(parsed), name=parser.prog)
