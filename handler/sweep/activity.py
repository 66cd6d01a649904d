"""The sweep: find closed targets whose outcome no worker delivers, and deliver it.

Workers do not deliver the outcome of a run that was terminated or timed out, or of any run if they have no plugin. If a
worker is killed before it delivers, callers that do not renew depend on the sweep. For operations that such a caller
may start, the sweep therefore looks at every closed run. It sends one visibility query per target and interval.

The heartbeat details of the sweep's only activity keep the sweep's place, so that the place survives every restart. The
place is an instant of the server's clock. Each query looks back by a window, because visibility may show a run late.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import timedelta

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.client import AsyncActivityCancelledError, Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError

from bridge.runtime.event_log import event_logger
from bridge.temporal.connection import keeping_inline
from bridge.temporal.executions import describe, is_open
from bridge.temporal.rpc_status import is_temporary
from bridge.workflow.targets import Target
from handler.delivery.calls import read_call, read_memo
from handler.delivery.close_event import read_close_event, read_run
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.records import MEMO_KEY, CallMemo, deliveries, milliseconds
from handler.settings import HandlerSettings
from handler.start.runs import find_run
from handler.sweep.place import WINDOW, SweepPlace
from handler.sweep.plan import SweepPlan, sweep_plans
from handler.sweep.workflow import SWEEP_ACTIVITY, SWEEP_WORKFLOW

NEXT_SWEEP = "bridge.NextSweep"
"""Type of the error that ends every attempt. Its message states the result of the query."""

_PAGE = 50
"""Number of runs handled at once."""

_RECORD_S = 5.0
"""Time between two heartbeats of one sweep, well below the heartbeat timeout."""
_PLAN_MEMO = "bridge-sweep"

_log = event_logger(__name__)


class SweepActivities:
    """The sweep, for one worker."""

    def __init__(self, *, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    @activity.defn(name=SWEEP_ACTIVITY)
    async def sweep(self, plan: SweepPlan) -> None:
        """Sweep once. The activity never completes: its next attempt is the next sweep.

        Raises:
            ApplicationError: Always. Retryable, with the interval as its delay.
        """
        info = activity.info()
        if info.heartbeat_details:
            place = SweepPlace.read(info.heartbeat_details[0])
        else:
            place = SweepPlace(until_ms=milliseconds(info.scheduled_time) if plan.since_ms is None else plan.since_ms)
        message, interval = "all newly closed runs were handled", timedelta(seconds=plan.interval_s)
        try:
            if unread := await self._handle_closed_runs(plan, place):
                message = f"{len(unread)} closed runs could not be read or delivered"
            # The attempt was scheduled before the query, by the server's clock. No closing is skipped.
            place = place.moved_to(info.current_attempt_scheduled_time, unread)
            await self._record(place)
            if place.is_full:
                # The next queries show runs that the place has forgotten. They must not be delivered in each of them.
                interval = max(interval, WINDOW)
        except RPCError as error:
            message = f"Temporal did not answer: {error.status.name}"
        raise ApplicationError(
            message,
            type=NEXT_SWEEP,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=interval,
        )

    async def _handle_closed_runs(self, plan: SweepPlan, place: SweepPlace) -> dict[str, int]:
        """Handle the runs that closed since *place*, and add them to it. Return those that failed, as `unread`."""
        unread, recorded = dict[str, int](), time.monotonic()
        pages = activity.client().list_workflows(f"{place.query} AND ({plan.query})", page_size=_PAGE)
        while True:
            await pages.fetch_next_page()
            runs = [run for run in pages.current_page or () if MEMO_KEY in run.raw_info.memo.fields]
            new = [run for run in runs if run.run_id not in place.handled]
            errors = await asyncio.gather(*(self._deliver(plan, run) for run in new), return_exceptions=True)
            for run, error in zip(new, errors, strict=True):
                closed_ms = milliseconds(run.close_time or run.start_time)
                if error is None:
                    place.handled[run.run_id] = closed_ms
                    continue
                # One bad run must not stop the others. Temporal, the codec and the storage may be unavailable for long.
                # What Temporal refuses for good is repeated only while it is inside the window.
                if not isinstance(error, RPCError) or is_temporary(error):
                    unread[run.run_id] = closed_ms
                extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.error": type(error).__name__}
                _log.warning("bridge.sweep_run_failed", extra=extra)
            if not pages.next_page_token:
                return unread
            if time.monotonic() - recorded >= _RECORD_S:
                # A place may have 300 kB. A page takes a fraction of a second.
                await self._record(place)
                recorded = time.monotonic()

    async def _deliver(self, plan: SweepPlan, run: WorkflowExecution) -> None:
        # If the codec fails, this raises, and the next sweep looks at the run again.
        starter = await read_memo(activity.client().data_converter, run.raw_info)
        if starter is None or self._dispatcher.has_taken(run.run_id):
            return
        if await _is_continued(run, starter):
            return
        unread = None
        if not plan.is_instrumented:
            # A worker without the plugin handles no attach signal, therefore no call is attached.
            closed, calls = await read_close_event(activity.client(), run.id, run.run_id), [starter]
        else:
            closed, attached = await read_run(activity.client(), run.id, run.run_id)
            found, unread = await self._read_calls(run, attached)
            is_forced = closed is not None and closed.is_forced
            calls = [call for call in (starter, *found) if is_forced or not call.renews]
        waiting = deliveries(calls, run.id, run.run_id, run.start_time)
        if closed is not None and waiting:
            await self._dispatcher.deliver(waiting, closed)
            extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.calls": len(waiting)}
            _log.info("bridge.ending_swept", extra=extra)
        if unread is not None:
            # The calls that could be read have their outcome. The next sweep reads the others.
            raise unread
        self._dispatcher.remember(run.run_id)

    async def _read_calls(
        self, run: WorkflowExecution, payloads: Iterable[Payload]
    ) -> tuple[list[CallMemo], HandlerError | None]:
        """Return the attached calls in *payloads*, and the error of the codec if it could not decode all of them."""
        calls: list[CallMemo] = []
        failed: HandlerError | None = None
        for payload in payloads:
            try:
                call = await read_call(activity.client().data_converter, payload, target=run.id)
            except HandlerError as error:
                failed = error
            else:
                calls += [] if call is None else [call]
        return calls, failed

    async def _record(self, place: SweepPlace) -> None:
        text = place.trimmed().text
        # The worker stops an attempt of which it hears no heartbeat.
        activity.heartbeat(text)
        # An explicit call too, because a heartbeat that the SDK sends in the background may be lost with the attempt.
        handle = activity.client().get_async_activity_handle(task_token=activity.info().task_token)
        try:
            await handle.heartbeat(text)
        except AsyncActivityCancelledError:
            raise asyncio.CancelledError from None


async def _is_continued(run: WorkflowExecution, call: CallMemo) -> bool:
    """Whether another run continues the call, because a reset terminates the run that it replaces."""
    if run.status is not WorkflowExecutionStatus.TERMINATED:
        return False
    current = await find_run(activity.client(), run.id)
    if current is None or current.memo is None or current.ref.run_id == run.run_id:
        return False
    return current.memo.identity == call.identity


async def start_sweep(client: Client, *, targets: Iterable[Target], settings: HandlerSettings) -> None:
    """Make sure that each of *targets* has one sweep on the handler's task queue.

    The sweep's workflow id is fixed, so that several replicas start one sweep. If a running sweep has another plan, a
    new one replaces it and continues from its place. If a sweep cannot be started, the error is logged and the handler
    serves without it. The next replica that starts tries again.

    Raises:
        ValueError: A target's name cannot stand in a query.
    """

    def is_renewed(target: Target) -> bool:
        callers = settings.callers.values()
        return all(peer.is_renewing for peer in callers if peer.may_start(target.service, target.operation))

    plans = sweep_plans(
        targets, task_queue=settings.task_queue, interval_s=settings.sweep_interval_s, is_renewed=is_renewed
    )
    starting = [_start(keeping_inline(client), name, plan, settings.task_queue) for name, plan in plans.items()]
    for error in await asyncio.gather(*starting, return_exceptions=True):
        if isinstance(error, BaseException):
            # Temporal or the codec is unavailable. The handler can still serve starts.
            _log.error("bridge.sweep_not_started", extra={"bridge.error": type(error).__name__})


async def _start(client: Client, workflow_id: str, plan: SweepPlan, task_queue: str) -> None:
    # If another replica starts the sweep at the same time, its plan is the same. Replace only a plan that differs.
    conflict, since_ms = WorkflowIDConflictPolicy.USE_EXISTING, None
    if (existing := await describe(client, workflow_id)) is not None:
        info, decode = existing.workflow_execution_info, client.data_converter.decode
        # Continue from the place of the old sweep. If its place is no longer known, continue from its end.
        since_ms = info.close_time.ToMilliseconds()
        if is_open(info):
            [old] = await decode([info.memo.fields[_PLAN_MEMO]], [SweepPlan])
            if old.is_instrumented == plan.is_instrumented and len(old.query) > len(plan.query):
                # The plan of another service of this task queue, which has callers that do not renew.
                plan = replace(plan, query=old.query)
            if replace(old, since_ms=None) == plan:
                return
            conflict = WorkflowIDConflictPolicy.TERMINATE_EXISTING
            # If no worker has run it yet, it has no place.
            since_ms = old.since_ms or info.start_time.ToMilliseconds()
        for pending in existing.pending_activities:
            if pending.heartbeat_details.payloads:
                [text] = await decode(pending.heartbeat_details.payloads, [str])
                since_ms = SweepPlace.read(text).earliest_ms
    plan = replace(plan, since_ms=since_ms)
    await client.start_workflow(
        SWEEP_WORKFLOW,
        plan,
        id=workflow_id,
        task_queue=task_queue,
        id_conflict_policy=conflict,
        memo={_PLAN_MEMO: asdict(plan)},
        static_summary="delivers the outcomes that no worker delivers",
    )
