"""The sweep workflow: what it looks for, and how far it has come. Workflow-safe."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, is_cancelled_exception

from bridge.workflow.targets import Target
from handler.delivery.records import milliseconds

SWEEP_ACTIVITY = "bridge.sweep"
SWEEP_WORKFLOW = "bridge.Sweep"

WINDOW = timedelta(minutes=2)
"""How late visibility may show a closed run."""

_MAX_REMEMBERED = 5000
"""Runs in a place, 200 kB; one that is forgotten costs two calls to Temporal again, and tells nobody."""

_UNTOLD = ("Terminated", "TimedOut")
"""Endings that no interceptor can tell."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What to sweep for. Field names stand in histories: never rename."""

    query: str
    """Visibility query for the endings that the interceptor cannot have told, without their time."""
    interval_s: float
    since_ms: int | None = None
    """Where an earlier sweep had come to, Unix time in milliseconds; None: begin with this workflow's own start."""


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
        """Without the runs that nobody will ask about again, and never too large to be recorded."""
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
                # It tells its place after every page; one whose worker was killed is followed by another after this.
                heartbeat_timeout=timedelta(seconds=30),
                # For attempts that end without a word; the others name their own delay. 0 attempts would mean the
                # cluster's default.
                retry_policy=RetryPolicy(
                    initial_interval=timedelta(seconds=1),
                    maximum_interval=timedelta(minutes=1),
                    maximum_attempts=2**31 - 1,
                ),
                summary=f"every {plan.interval_s:g} s",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            # It cannot end by itself, but the worker ends it where its place cannot be decoded: go on from a little
            # earlier. What was told by then is not told twice.
            await workflow.sleep(WINDOW)
            workflow.continue_as_new(replace(plan, since_ms=milliseconds(workflow.now() - timedelta(hours=1))))


def sweep_query(targets: Iterable[Target], task_queue: str) -> str:
    """Ask for the endings of *targets* that the interceptor cannot have told; the same text for the same targets.

    Raises:
        ValueError: A target's name cannot stand in a query.
    """
    return " OR ".join(sorted({_query(target, target.task_queue or task_queue) for target in targets}))


def _query(target: Target, task_queue: str) -> str:
    statuses: tuple[str, ...] = _UNTOLD if target.retry_policy is None else ("Failed", *_UNTOLD)
    if not target.instrumented:
        statuses = ("Canceled", "Completed", "Failed", *_UNTOLD)
    names = f"TaskQueue = {_quoted(task_queue)} AND WorkflowType = {_quoted(target.workflow_type)}"
    return f"({names} AND ExecutionStatus IN ({', '.join(map(_quoted, statuses))}))"


def _quoted(text: str) -> str:
    # The server's query language finds none of these, however they are written (seen on 1.29.1).
    if not text.isprintable() or '"' in text or "\\" in text:
        message = f"{text!r}: a target with a double quote, a backslash or a control character cannot be swept for"
        raise ValueError(message)
    return "'" + text.replace("'", "''") + "'"
