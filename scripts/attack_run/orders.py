"""The order team's worker, with the workflow that calls the bad handler too: `python -m scripts.attack_run.orders`."""

import json
import os
from datetime import timedelta

from temporalio.worker import Worker

from bridge.admin import command
from bridge.http.listener import stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.temporal.connection import connect
from caller import CallerPlugin
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from scripts.attack_run.calls import BadOrderWorkflow


async def run_worker() -> None:
    """Run the worker until it is asked to stop."""
    configure_logging("info")
    client, stop = await connect(), stop_on_signals()
    worker = Worker(
        client,
        task_queue=ORDER_QUEUE,
        workflows=[OrderWorkflow, BadOrderWorkflow],
        plugins=[CallerPlugin()],
        graceful_shutdown_timeout=timedelta(seconds=10),
    )
    async with worker:
        print(json.dumps({"worker": "orders", "pid": os.getpid()}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    command.run(run_worker, name="python -m scripts.attack_run.orders")
