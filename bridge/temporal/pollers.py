"""Whether workers poll a task queue, and whether they have the plugin of their side.

A plugin adds its name to the worker's identity, because that is what every version of Temporal's server lists. Without
such workers calls wait, or their outcomes come late, and no call fails. Both sides therefore log it when they start.
"""

import asyncio
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import PollerInfo, TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.runtime.event_log import event_logger
from bridge.security.redaction import plain
from bridge.temporal.rpc_status import refusal

_PATIENCE_S = 5.0
"""Workers often start with the service."""
_LONG_POLL = timedelta(seconds=90)
"""A worker polls again within this time. The server lists a worker for five minutes after its last poll."""
_SHOWN = 5

_log = event_logger(__name__)


async def check_workers(client: Client, queues: Mapping[str, str | None], *, after_s: float = _PATIENCE_S) -> None:
    """Log a warning for every task queue without a worker that runs workflows and activities and has the plugin."""
    await asyncio.sleep(after_s)
    for queue, plugin in queues.items():
        extra = {"bridge.task_queue": queue, "bridge.namespace": client.namespace}
        try:
            problem, _ = await workers_seen(client, queue, plugin)
        except RPCError as error:
            problem = refusal(error)
        if problem is None:
            _log.info("bridge.workers_ready: workers poll task queue %s", queue, extra=extra)
        else:
            _log.warning("bridge.workers_not_ready: %s", problem, extra=extra)


async def workers_seen(client: Client, task_queue: str, plugin: str | None) -> tuple[str | None, datetime | None]:
    """Return what is wrong with the workers of *task_queue*, and when the server last saw one. None stands for neither.

    Args:
        client: Its namespace is the one of the task queue.
        task_queue: Name of the task queue.
        plugin: Name of the plugin that its workers need; None for workers in other languages.

    Raises:
        temporalio.service.RPCError: Temporal did not describe the task queue.
    """
    pollers = await _pollers(client, task_queue, TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW)
    active = await _pollers(client, task_queue, TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY) if plugin is not None else []
    if not pollers:
        message = (
            f"no worker polls task queue {task_queue} in namespace {client.namespace}: start one, or correct the name "
            "of the task queue or the namespace of this process or of the worker"
        )
        return message, None
    newest = max(each.last_access_time.ToDatetime(UTC) for each in pollers + active)
    polling, acting = _recent(pollers, newest), _recent(active, newest)
    without = [
        plain(each) for each in sorted(polling | acting) if plugin is not None and f"bridge.{plugin}" not in each
    ]
    if not without and (acting or plugin is None):
        return None, newest
    if not without:
        activities = f"no worker of task queue {task_queue} runs activities, which {plugin} needs"
        return f"{activities}: start one with the plugin and without no_remote_activities", newest
    names = ", ".join(without[:_SHOWN])
    message = f"a worker of task queue {task_queue} has no {plugin}: {names}; add it: Worker(..., plugins=[{plugin}()])"
    return message, newest


async def _pollers(client: Client, task_queue: str, kind: TaskQueueType.ValueType) -> list[PollerInfo]:
    request = DescribeTaskQueueRequest(
        namespace=client.namespace, task_queue=TaskQueue(name=task_queue), task_queue_type=kind
    )
    return list((await client.workflow_service.describe_task_queue(request)).pollers)


def _recent(pollers: Iterable[PollerInfo], newest: datetime) -> set[str]:
    """Return the identities of those that have polled within the last long poll before *newest*."""
    return {each.identity for each in pollers if newest - each.last_access_time.ToDatetime(UTC) < _LONG_POLL}
