"""Which closed runs a sweep looks for. Pure, and workflow-safe."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bridge.temporal.visibility import quoted
from bridge.workflow.targets import Target

_FORCED = ("Terminated", "TimedOut")
"""Statuses of runs that no worker closed."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What to sweep for. Never rename a field: histories hold the names."""

    query: str
    """Visibility query for the closed runs of one target, by status. The sweep adds the condition on the close time."""
    is_instrumented: bool
    """Whether the target's workers deliver. If so, the sweep delivers the outcomes of completed, failed and canceled
    runs only to callers that do not renew."""
    interval_s: float
    """Seconds between two sweeps."""
    since_ms: int | None = None
    """`until_ms` of an earlier sweep from which to continue; None to begin with this workflow's start."""


def sweep_plans(
    targets: Iterable[Target], *, task_queue: str, interval_s: float, is_renewed: Callable[[Target], bool]
) -> dict[str, SweepPlan]:
    """Return the plan of each sweep, by the id of its workflow. Each workflow type of *targets* has one sweep.

    Handlers on one task queue may serve different targets, as replicas of two versions do during a deploy. Each handler
    starts the sweeps of its own targets and does not touch the others.

    Args:
        targets: Operations with the same workflow share a sweep.
        task_queue: Task queue of the sweeps, and of targets that name none.
        interval_s: Seconds between two sweeps.
        is_renewed: Whether every caller that may start the target renews.

    Raises:
        ValueError: A query cannot contain the workflow type or the task queue of a target.
    """
    plans: dict[str, SweepPlan] = {}
    for target in sorted(targets, key=lambda each: (each.instrumented, is_renewed(each))):
        queue = target.task_queue or task_queue
        statuses = (
            _FORCED if target.instrumented and is_renewed(target) else ("Canceled", "Completed", "Failed", *_FORCED)
        )
        try:
            names = f"TaskQueue = {quoted(queue)} AND WorkflowType = {quoted(target.workflow_type)}"
        except ValueError as error:
            message = f"the sweep cannot look for a target: {error}; rename it, or set sweep = false"
            raise ValueError(message) from None
        plan = SweepPlan(
            query=f"{names} AND ExecutionStatus IN ({', '.join(map(quoted, statuses))})",
            is_instrumented=target.instrumented,
            interval_s=interval_s,
        )
        # If several operations have the same workflow, the first one in this order has the widest query.
        queues = dict.fromkeys((task_queue, queue))
        plans.setdefault(":".join(["bridge-sweep", *map(_escaped, (*queues, target.workflow_type))]), plan)
    return plans


def _escaped(name: str) -> str:
    """The name without a colon. Two different targets never share a sweep, which would leave one of them out."""
    return name.replace("%", "%25").replace(":", "%3A")
