"""A worker for the calling workflow: `python -m tests.support.calling_worker QUEUE [--serve-receiver] [--debug]`."""

import asyncio
import sys

from temporalio.worker import Worker

from bridge.runtime.event_log import configure_logging
from bridge.temporal.connection import connect
from caller import CallerPlugin
from tests.support.callers import CALLERS


async def main() -> None:
    if "--debug" in sys.argv:
        configure_logging("debug")
    client = await connect()
    plugin = CallerPlugin(serve_receiver="--serve-receiver" in sys.argv)
    async with Worker(client, task_queue=sys.argv[1], workflows=CALLERS, plugins=[plugin]):
        print('"ready"', flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
