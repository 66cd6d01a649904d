"""Whether this container's worker polls its task queue: `python -m deploy.worker_health QUEUE`, exit code 0 or 1."""

import asyncio
import os
import socket
import sys

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.service import RPCError

from bridge.runtime.settings import SettingsError
from bridge.temporal.connection import connect


async def polls(queue: str) -> bool:
    """Whether Temporal has seen a poller of *queue* with a plugin on this host within the last minutes."""
    client = await connect()
    described = await client.workflow_service.describe_task_queue(
        DescribeTaskQueueRequest(
            namespace=client.namespace,
            task_queue=TaskQueue(name=queue),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
        )
    )
    # The identity is process@host and the plugin's name, and every container has its own host name.
    return any(f"@{socket.gethostname()} bridge." in poller.identity for poller in described.pollers)


if __name__ == "__main__":
    try:
        is_healthy = asyncio.run(polls(sys.argv[1]))
    except (RPCError, SettingsError):
        is_healthy = False
    # `os._exit`, because the interpreter may abort at its end after the SDK was used (temporalio/sdk-python issue 300).
    os._exit(0 if is_healthy else 1)
