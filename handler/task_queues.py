"""The task queues of the targets, and the plugin that their workers need."""

from bridge.workflow.targets import Targets
from handler.settings import HandlerSettings

PLUGIN = "HandlerPlugin"


def task_queues(targets: Targets, settings: HandlerSettings) -> dict[str, str | None]:
    """The task queues of *targets*, with the plugin that their workers need; None if only other languages use it."""
    queues: dict[str, str | None] = {}
    for target in targets:
        queue = target.task_queue or settings.task_queue
        queues[queue] = PLUGIN if target.workflow_class is not None else queues.get(queue)
    return queues
