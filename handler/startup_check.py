"""The check at the start of a handler service: whether workers with the plugin poll the task queues of the targets.

Without such workers calls wait, or their outcomes come late, and no call fails. The check therefore logs it.
"""

import asyncio
from collections.abc import Mapping

from temporalio.client import Client
from temporalio.service import RPCError

from bridge.runtime.event_log import event_logger
from bridge.temporal.pollers import worker_problem
from bridge.temporal.rpc_status import refusal
from bridge.workflow.targets import Targets
from handler.settings import HandlerSettings

PLUGIN = "HandlerPlugin"
_PATIENCE_S = 5.0
"""Workers often start with the service."""

_log = event_logger(__name__)


def task_queues(targets: Targets, settings: HandlerSettings) -> dict[str, str | None]:
    """The task queues of *targets*, with the plugin that their workers need; None if only other languages use it."""
    queues: dict[str, str | None] = {}
    for target in targets:
        queue = target.task_queue or settings.task_queue
        queues[queue] = PLUGIN if target.workflow_class is not None else queues.get(queue)
    return queues


async def check_workers(client: Client, queues: Mapping[str, str | None], *, after_s: float = _PATIENCE_S) -> None:
    """Log a warning for every task queue that no worker polls, or a worker without the plugin."""
    await asyncio.sleep(after_s)
    for queue, plugin in queues.items():
        extra = {"bridge.task_queue": queue, "bridge.namespace": client.namespace}
        try:
            problem = await worker_problem(client, queue, plugin)
        except RPCError as error:
            problem = refusal(error)
        if problem is None:
            _log.info("bridge.workers_ready: workers poll task queue %s", queue, extra=extra)
        else:
            _log.warning("bridge.workers_not_ready: %s", problem, extra=extra)
