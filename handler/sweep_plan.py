"""What to sweep for, and that exactly one sweep of a task queue does it: the handler service's part."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, replace

from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.service import RPCError, RPCStatusCode

from bridge.operations import Target
from handler.settings import HandlerSettings
from handler.sweeps import SWEEP_WORKFLOW, SweepPlace, SweepPlan, milliseconds

_log = logging.getLogger(__name__)

_PLAN_MEMO = "bridge-sweep"

_UNTOLD = ("Terminated", "TimedOut")
_UNTOLD_IF_RETRIED = ("Failed", *_UNTOLD)
_UNTOLD_IF_NOT_INSTRUMENTED = ("Canceled", "Completed", *_UNTOLD_IF_RETRIED)


async def start_sweep(client: Client, *, targets: Iterable[Target], settings: HandlerSettings) -> None:
    """See to it that the one sweep of the handler's task queue runs with this plan.

    However many replicas ask for it: its id is fixed. A sweep with another plan is replaced by one that goes on where
    that had come to. If it cannot be started, that is logged: the handler serves without it, and the next replica
    that starts tries again.

    Raises:
        ValueError: A target's name cannot stand in a query.
    """
    plan = SweepPlan(query=sweep_query(targets, settings.task_queue), interval_s=settings.sweep_interval_s)
    if not plan.query:
        return
    try:
        await _start(client, plan, task_queue=settings.task_queue)
    except Exception as error:  # noqa: BLE001 - Temporal or the codec is away, and starts can be served all the same
        _log.error("bridge.sweep_not_started", extra={"bridge.error": type(error).__name__})


async def _start(client: Client, plan: SweepPlan, *, task_queue: str) -> None:
    workflow_id = f"bridge-sweep-{task_queue}"
    # Whoever starts the same at the same time means the same; only a plan that was seen to differ is replaced.
    conflict, since_ms = WorkflowIDConflictPolicy.USE_EXISTING, None
    found = await _describe(client, workflow_id)
    if found is not None:
        if found.status is WorkflowExecutionStatus.RUNNING:
            if await found.memo_value(_PLAN_MEMO, default=None) == asdict(plan):
                return
            conflict = WorkflowIDConflictPolicy.TERMINATE_EXISTING
        since_ms = await _place_of(client, found)
    await client.start_workflow(
        SWEEP_WORKFLOW,
        replace(plan, since_ms=since_ms),
        id=workflow_id,
        task_queue=task_queue,
        id_conflict_policy=conflict,
        memo={_PLAN_MEMO: asdict(plan)},
        static_summary="tells the endings that nobody else tells",
    )


def sweep_query(targets: Iterable[Target], task_queue: str) -> str:
    """Ask for the endings of *targets* that the interceptor cannot have told; the same text for the same targets.

    Raises:
        ValueError: A target's name cannot stand in a query.
    """
    groups: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for target in targets:
        statuses: tuple[str, ...] = _UNTOLD if target.retry_policy is None else _UNTOLD_IF_RETRIED
        if not target.instrumented:
            statuses = _UNTOLD_IF_NOT_INSTRUMENTED
        groups.setdefault((target.task_queue or task_queue, statuses), set()).add(target.workflow_type)
    return " OR ".join(
        f"(TaskQueue = {_quoted(queue)} AND WorkflowType IN ({_listed(sorted(types))})"
        f" AND ExecutionStatus IN ({_listed(statuses)}))"
        for (queue, statuses), types in sorted(groups.items())
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(_quoted, names))


def _quoted(text: str) -> str:
    # The server's query language finds none of these, however they are written (seen on 1.29.1).
    if not text.isprintable() or '"' in text or "\\" in text:
        message = f"{text!r}: a target with a double quote, a backslash or a control character cannot be swept for"
        raise ValueError(message)
    return "'" + text.replace("'", "''") + "'"


async def _describe(client: Client, workflow_id: str) -> WorkflowExecutionDescription | None:
    try:
        return await client.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise


async def _place_of(client: Client, found: WorkflowExecutionDescription) -> int | None:
    """Where *found* had come to; where that is not known any more, the instant of its own end."""
    for pending in found.raw_description.pending_activities:
        if pending.heartbeat_details.payloads:
            [place] = await client.data_converter.decode(pending.heartbeat_details.payloads, [SweepPlace])
            return int(place.until_ms)
    return None if found.close_time is None else milliseconds(found.close_time)
