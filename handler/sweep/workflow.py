"""The sweep workflow, its plan (what to sweep for) and its place (how far the sweep has come). Workflow-safe."""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

from temporalio import workflow
from temporalio.common import VersioningBehavior
from temporalio.exceptions import ActivityError, is_cancelled_exception

from bridge.workflow.targets import Target
from handler.delivery.records import milliseconds
from handler.delivery.workflow import start_activity

SWEEP_ACTIVITY = "bridge.sweep"
SWEEP_WORKFLOW = "bridge.Sweep"

WINDOW = timedelta(minutes=2)
"""Longest time after which visibility shows a closed run. Each query looks back by this time."""

_MAX_REMEMBERED = 5000
"""Maximum number of run ids in a place (about 200 kB). A run that drops out is looked up again; its delivery workflow
id prevents a second delivery."""

_MAX_UNREAD = 100
"""Maximum number of runs for which a query asks by id. If more cannot be read, the place does not move."""

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


@dataclass(frozen=True, kw_only=True)
class SweepPlace:
    """How far a sweep has come. Never rename a field: heartbeat details hold the names.

    The details hold one text, because the SDK decodes them without a type hint, and converters then differ.
    """

    until_ms: int
    """The sweep has handled all runs that closed before this time and were visible. Unix time in milliseconds."""
    handled: dict[str, int] = field(default_factory=dict)
    """Ids of the handled runs that the next query may show again, with their close time, Unix time in milliseconds."""
    unread: dict[str, int] = field(default_factory=dict)
    """Ids of the runs that could not be read or delivered yet, with their close time. Every query asks for them, until
    their retention ends."""

    @classmethod
    def read(cls, text: str) -> "SweepPlace":
        """Return the place that `text` has spelled."""
        return cls(**json.loads(text))

    @property
    def text(self) -> str:
        """The place as JSON."""
        return json.dumps(asdict(self))

    @property
    def since(self) -> datetime:
        """Earliest close time in the next query: `until_ms` minus `WINDOW`, because visibility may show a run late."""
        return datetime.fromtimestamp(self.until_ms / 1000, UTC) - WINDOW

    @property
    def query(self) -> str:
        """Visibility query for the runs that may not be handled yet."""
        query = f"CloseTime >= '{self.since.isoformat().replace('+00:00', 'Z')}'"
        ids = ", ".join(f"'{each}'" for each in self.unread)
        return f"({query} OR RunId IN ({ids}))" if ids else query

    @property
    def earliest_ms(self) -> int:
        """A time before which all runs are handled, without `unread`."""
        return min([self.until_ms, *self.unread.values()])

    @property
    def is_full(self) -> bool:
        """Whether the place may forget runs that a later query shows."""
        return len(self.trimmed().handled) >= _MAX_REMEMBERED

    def moved_to(self, instant: datetime, unread: dict[str, int]) -> "SweepPlace":
        """Return the place at *instant* with the runs that are *unread*, or at the old time if it is later.

        If too many runs are unread, the time stays, and the place has the runs that closed first.
        """
        first = dict(sorted(unread.items(), key=lambda each: each[1])[:_MAX_UNREAD])
        until_ms = self.until_ms if len(first) < len(unread) else max(self.until_ms, milliseconds(instant))
        return replace(self, until_ms=until_ms, unread=first)

    def trimmed(self) -> "SweepPlace":
        """Return the place without the runs that no later query shows, and with at most `_MAX_REMEMBERED` runs."""
        first = milliseconds(self.since)
        kept = sorted((closed, run_id) for run_id, closed in self.handled.items() if closed >= first)
        return replace(self, handled={run_id: closed for closed, run_id in kept[-_MAX_REMEMBERED:]})


# Not sandboxed, because this is our own code and it only waits.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False)
class SweepWorkflow:
    """Sweeps forever. Each sweep is an attempt of one activity, so that the history stays at five events."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        """Sweep until the workflow is canceled, or a sweep with another plan replaces it."""
        try:
            await start_activity(
                *(SWEEP_ACTIVITY, plan),
                # An attempt takes milliseconds, but after a long outage it may have many runs to handle.
                attempt=timedelta(hours=1),
                # Each attempt heartbeats every few seconds. After a worker was killed, the next attempt begins so late.
                heartbeat_timeout=timedelta(seconds=30),
                summary=f"every {plan.interval_s:g} s",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            # The activity never ends by itself, but the worker fails it if its heartbeat details cannot be decoded. The
            # place is then lost. Continue from an hour ago: the ids of delivery workflows prevent a second delivery.
            # Take the time now, because the codec may fail for longer than an hour.
            since_ms = milliseconds(workflow.now() - timedelta(hours=1))
            await workflow.sleep(WINDOW)
            workflow.continue_as_new(replace(plan, since_ms=since_ms))


# A versioned worker refuses a workflow without a versioning behavior. On an unversioned worker with server 1.29 a
# workflow with a versioning behavior would hang.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False, versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class VersionedSweepWorkflow(SweepWorkflow):
    """The same workflow, for versioned workers. A new version continues the sweep."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        """Run as the base class does. The SDK requires a `run` in the decorated class."""
        await super().run(plan)


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
        names = f"TaskQueue = {quoted(queue)} AND WorkflowType = {quoted(target.workflow_type)}"
        plan = SweepPlan(
            query=f"{names} AND ExecutionStatus IN ({', '.join(map(quoted, statuses))})",
            is_instrumented=target.instrumented,
            interval_s=interval_s,
        )
        # If several operations have the same workflow, the first one in this order has the widest query.
        plans.setdefault("-".join(dict.fromkeys(("bridge-sweep", task_queue, queue, target.workflow_type))), plan)
    return plans


def quoted(text: str) -> str:
    """Return *text* as a string of a visibility query.

    Raises:
        ValueError: No query can contain *text*.
    """
    # Server 1.29.1 finds no run by a name with one of these characters, with any form of escape.
    if not text.isprintable() or '"' in text or "\\" in text:
        characters = "a double quote, a backslash or a control character"
        message = f"the sweep cannot find a name with {characters}: rename {text!r}, or set sweep = false"
        raise ValueError(message)
    return "'" + text.replace("'", "''") + "'"
