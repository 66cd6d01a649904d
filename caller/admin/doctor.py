"""The command `callback-bridge receiver doctor`: what keeps the caller's side from working, and what to do."""

from bridge.admin.doctor import examine
from bridge.admin.output import JsonOutput
from caller.settings import CallerSettings


async def doctor(*, task_queue: str | None = None, peer: str | None = None, as_json: JsonOutput = False) -> None:
    """Check this side where it runs, step by step: settings, Temporal, namespace, limits, workers, and every endpoint.

    The handler tries our receiver. Nothing is started or completed. Exit code 1 if a check failed.

    Args:
        task_queue: Task queue of the workflows that make calls, to check its workers.
        peer: Check only this handler, in both directions.
    """
    queues: dict[str, str | None] = {} if task_queue is None else {task_queue: "CallerPlugin"}
    await examine(
        CallerSettings,
        queues=lambda _: queues,
        probes=lambda settings, namespace: settings.probes(namespace, peer),
        as_json=as_json,
    )
