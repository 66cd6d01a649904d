"""A worker for the calling workflow, as a process of its own: `python -m tests.support.calling_worker QUEUE`."""

import asyncio
import sys

from temporalio.worker import Worker

from bridge.admin import command
from caller import CallerPlugin
from tests.support.workflows import CALLERS


async def main() -> None:
    client = await command.connect(data_converter=None)
    async with Worker(client, task_queue=sys.argv[1], workflows=CALLERS, plugins=[CallerPlugin()]):
        print("ready", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
