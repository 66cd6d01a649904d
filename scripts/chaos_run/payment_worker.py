"""The payment team's worker, with its plugin or without.

`python -m scripts.chaos_run.payment_worker` replaces the worker of the example.
"""

import json
import os

from temporalio.worker import Worker

from bridge.admin import command
from bridge.http.listener import stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.temporal.connection import connect
from examples.payments.payments import PAYMENT_QUEUE, PaymentWorkflow
from examples.payments.workers import STOP_TIMEOUT
from handler import HandlerPlugin

WITHOUT_PLUGIN = "CHAOS_WITHOUT_PLUGIN"
"""Environment variable that is set for a worker without the plugin."""


async def run_worker() -> None:
    """Run the worker until it is asked to stop."""
    configure_logging("info")
    client = await connect()
    stop = stop_on_signals()
    async with Worker(
        client,
        task_queue=PAYMENT_QUEUE,
        workflows=[PaymentWorkflow],
        plugins=[] if os.environ.get(WITHOUT_PLUGIN) else [HandlerPlugin()],
        graceful_shutdown_timeout=STOP_TIMEOUT,
    ):
        print(json.dumps({"worker": "payments", "pid": os.getpid()}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    command.run(run_worker, name="python -m scripts.chaos_run.payment_worker")
