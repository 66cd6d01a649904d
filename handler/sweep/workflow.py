"""The sweep workflow: what it looks for, and how far it has come. Workflow-safe."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy, VersioningBehavior
from temporalio.exceptions import ActivityError, is_cancelled_exception

from bridge.workflow.targets import Target
from handler.delivery.records import milliseconds
from handler.delivery.workflow import MAX_ATTEMPTS

SWEEP_ACTIVITY = "bridge.sweep"
SWEEP_WORKFLOW = "bridge.Sweep"

WINDOW = timedelta(minutes=2)
"""How late visibility may show a closed run."""

_MAX_REMEMBERED = 5000
"""Runs in a place, 200 kB. A run that drops out is looked at again; its delivery workflow id prevents a second one."""

_FORCED = ("Terminated", "TimedOut")
"""Endings that no worker decides."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What to sweep for. Field names stand in histories: never rename."""

    query: str
    """Visibility query for the runs of one target that closed in a way that the sweep looks at, without their time."""
    is_instrumented: bool
    """Whether the target's workers deliver. If so, the sweep delivers ordinary endings only to callers that do not
    renew."""
    interval_s: float
    since_ms: int | None = None
    """Where an earlier sweep had arrived, Unix time in milliseconds; None: begin with this workflow's own start."""


@dataclass(frozen=True, kw_only=True)
class SweepPlace:
    """How far a sweep has come. Field names stand in heartbeat details: never rename."""

    until_ms: int
    """All that had closed by then was looked at, as far as visibility showed it. Unix time in milliseconds."""
    handled: dict[str, int] = field(default_factory=dict)
    """Run ids inside the window that need no second look, with the time of their closing."""

    @property
    def since(self) -> datetime:
        """From where to look: visibility may show late what closed before."""
        return datetime.fromtimestamp(self.until_ms / 1000, UTC) - WINDOW

    def moved_to(self, instant: datetime) -> "SweepPlace":
        return replace(self, until_ms=max(self.until_ms, milliseconds(instant)))

    def trimmed(self) -> "SweepPlace":
        """Without the runs that no later query shows, and never too large to be recorded."""
        first = milliseconds(self.since)
        kept = sorted((closed, run_id) for run_id, closed in self.handled.items() if closed >= first)
        return replace(self, handled={run_id: closed for closed, run_id in kept[-_MAX_REMEMBERED:]})


# Outside the sandbox: it is our own code, and does nothing but wait.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False)
class SweepWorkflow:
    """Sweeps for ever in one activity: every interval is an attempt of it, so the history stays at five events."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        try:
            await workflow.execute_activity(
                SWEEP_ACTIVITY,
                plan,
                result_type=type(None),
                # An attempt takes milliseconds, but after a long absence it may have much to do.
                start_to_close_timeout=timedelta(hours=1),
                # An attempt records its place after every page. If its worker is killed, the next begins after this.
                heartbeat_timeout=timedelta(seconds=30),
                # For attempts whose worker was killed. All others name the delay until the next attempt.
                retry_policy=RetryPolicy(
                    initial_interval=timedelta(seconds=1),
                    maximum_interval=timedelta(minutes=1),
                    maximum_attempts=MAX_ATTEMPTS,
                ),
                summary=f"every {plan.interval_s:g} s",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            # It cannot end by itself, but the worker ends it where its place cannot be decoded. Go on from a little
            # earlier: the ids of delivery workflows prevent a second delivery.
            await workflow.sleep(WINDOW)
            workflow.continue_as_new(replace(plan, since_ms=milliseconds(workflow.now() - timedelta(hours=1))))


# A versioned worker refuses workflows without a behavior, and on an unversioned one (server 1.29) they would hang.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False, versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class VersionedSweepWorkflow(SweepWorkflow):
    """The same, for versioned workers: a new version takes the sweep over."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        await super().run(plan)


def sweep_plans(
    targets: Iterable[Target], *, task_queue: str, interval_s: float, is_renewed: Callable[[Target], bool]
) -> dict[str, SweepPlan]:
    """The sweep of each target, by the name of its workflow. A target has a sweep of its own.

    Handlers on one task queue may serve different targets, as replicas of two versions do during a deploy. Each starts
    the sweeps of its own targets and leaves the others alone.

    Args:
        targets: Operations that lead to one workflow share its sweep.
        task_queue: That of targets that name none, and of the sweeps.
        interval_s: Seconds between two looks.
        is_renewed: Whether every caller that may start the target renews.

    Raises:
        ValueError: A target's name cannot stand in a query.
    """
    plans: dict[str, SweepPlan] = {}
    for target in sorted(targets, key=lambda each: (each.instrumented, is_renewed(each))):
        queue = target.task_queue or task_queue
        statuses = (
            _FORCED if target.instrumented and is_renewed(target) else ("Canceled", "Completed", "Failed", *_FORCED)
        )
        names = f"TaskQueue = {_quoted(queue)} AND WorkflowType = {_quoted(target.workflow_type)}"
        plan = SweepPlan(
            query=f"{names} AND ExecutionStatus IN ({', '.join(map(_quoted, statuses))})",
            is_instrumented=target.instrumented,
            interval_s=interval_s,
        )
        # Of the operations of one workflow, the one comes first for which there is most to do.
        plans.setdefault("-".join(dict.fromkeys(("bridge-sweep", task_queue, queue, target.workflow_type))), plan)
    return plans


def _quoted(text: str) -> str:
    # The server's query language finds none of these, however they are written (seen on 1.29.1).
    if not text.isprintable() or '"' in text or "\\" in text:
        message = f"{text!r}: a target with a double quote, a backslash or a control character cannot be swept for"
        raise ValueError(message)
    return "'" + text.replace("'", "''") + "'"
