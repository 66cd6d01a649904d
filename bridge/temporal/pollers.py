"""Whether workers poll a task queue, and whether they have the plugin of their side.

A plugin adds its name to the worker's identity, because that is what every version of Temporal's server lists.
"""

from datetime import UTC, datetime, timedelta

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client

from bridge.security.redaction import plain

_LONG_POLL = timedelta(seconds=90)
"""A worker polls again within this time. The server lists a worker for five minutes after its last poll."""
_SHOWN = 5


async def worker_problem(client: Client, task_queue: str, plugin: str | None) -> str | None:
    """Say what is wrong with the workers of *task_queue*, and what to do; None if nothing is. See `workers_seen`."""
    return (await workers_seen(client, task_queue, plugin))[0]


async def workers_seen(client: Client, task_queue: str, plugin: str | None) -> tuple[str | None, datetime | None]:
    """Return what is wrong with the workers of *task_queue*, and when the server last saw one. None stands for neither.

    Args:
        client: Its namespace is the one of the task queue.
        task_queue: Name of the task queue.
        plugin: Name of the plugin that its workers need; None for workers in other languages.

    Raises:
        temporalio.service.RPCError: Temporal did not describe the task queue.
    """
    request = DescribeTaskQueueRequest(
        namespace=client.namespace,
        task_queue=TaskQueue(name=task_queue),
        task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW,
    )
    pollers = (await client.workflow_service.describe_task_queue(request)).pollers
    if not pollers:
        message = (
            f"no worker polls task queue {task_queue} in namespace {client.namespace}: start one, or correct the name "
            "of the task queue or the namespace of this process or of the worker"
        )
        return message, None
    newest = max(each.last_access_time.ToDatetime(UTC) for each in pollers)
    present = {each.identity for each in pollers if newest - each.last_access_time.ToDatetime(UTC) < _LONG_POLL}
    without = [plain(each) for each in sorted(present) if plugin is not None and f"bridge.{plugin}" not in each]
    if not without:
        return None, newest
    names = ", ".join(without[:_SHOWN])
    message = f"a worker of task queue {task_queue} has no {plugin}: {names}; add it: Worker(..., plugins=[{plugin}()])"
    return message, newest
