"""The sweep: find closed targets whose outcome no worker delivers, and deliver it.

Workers do not deliver the outcome of a run that was terminated or timed out, or of any run if they have no plugin. If a
worker is killed before it delivers, callers that do not renew depend on the sweep. For operations that such a caller
may start, the sweep therefore looks at every closed run. It sends one visibility query per target and interval.

The heartbeat details of the sweep's only activity keep the sweep's place, so that the place survives every restart. The
place is an instant of the server's clock. Each query looks back by a window, because visibility may show a run late.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, timedelta
from functools import partial

from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.common.v1 import WorkflowExecution as RunName
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import AsyncActivityCancelledError, Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError

from bridge.errors import UnavailableError
from bridge.runtime.event_log import event_logger
from bridge.temporal.server import describe, is_open, is_temporary, keeping_inline
from bridge.workflow.targets import Target
from handler.delivery.calls import read_call, read_memo
from handler.delivery.close_event import CloseEvent, close_event_of, read_close_event
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_HEADER, MEMO_KEY, CallMemo, deliveries, milliseconds
from handler.settings import HandlerSettings
from handler.start.runs import find_run
from handler.sweep.workflow import SWEEP_ACTIVITY, SWEEP_WORKFLOW, SweepPlace, SweepPlan, sweep_plans

NEXT_SWEEP = "bridge.NextSweep"
"""Type of the error that ends every attempt. Its message states the result of the query."""

_PAGE = 50
"""Number of runs handled at once."""

_PLAN_MEMO = "bridge-sweep"

_FORCED = {WorkflowExecutionStatus.TERMINATED, WorkflowExecutionStatus.TIMED_OUT}

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
        message = "all newly closed runs were handled"
        try:
            if unread := await self._handle_closed_runs(plan, place):
                message = f"{len(unread)} closed runs could not be read or delivered"
            # The attempt was scheduled before the query, by the server's clock. No closing is skipped.
            place = place.moved_to(info.current_attempt_scheduled_time, unread)
            await self._record(place)
        except RPCError as error:
            message = f"Temporal did not answer: {error.status.name}"
        raise ApplicationError(
            message,
            type=NEXT_SWEEP,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=timedelta(seconds=plan.interval_s),
        )

    async def _handle_closed_runs(self, plan: SweepPlan, place: SweepPlace) -> dict[str, int]:
        """Handle the runs that closed since *place*, and add them to it. Return those that failed, as `unread`."""
        unread: dict[str, int] = {}
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
            await self._record(place)

    async def _deliver(self, plan: SweepPlan, run: WorkflowExecution) -> None:
        # If the codec fails, this raises, and the next sweep looks at the run again.
        starter = await read_memo(activity.client().data_converter, run.raw_info)
        of_run = partial(deliveries, workflow_id=run.id, run_id=run.run_id, start_time=run.start_time)
        if starter is None or any(map(self._dispatcher.has_taken, of_run([starter]))):
            return
        if await _is_continued(run, starter):
            return
        is_ordinary = run.status not in _FORCED
        if not plan.is_instrumented:
            # A worker without the plugin handles no attach signal, therefore no call is attached.
            closed, calls = await read_close_event(activity.client(), run.id, run.run_id), [starter]
        else:
            closed, attached = await read_run(activity.client(), run.id, run.run_id)
            found = [starter, *[await _attached(each, run) for each in attached]]
            calls = [call for call in found if call is not None and not (is_ordinary and call.renews)]
        waiting = of_run(calls)
        if closed is None or not waiting:
            return
        await self._dispatcher.deliver(waiting, closed)
        extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.calls": len(waiting)}
        _log.info("bridge.ending_swept", extra=extra)

    async def _record(self, place: SweepPlace) -> None:
        # An explicit call, because a heartbeat that the SDK sends in the background may be lost with the attempt.
        handle = activity.client().get_async_activity_handle(task_token=activity.info().task_token)
        try:
            await handle.heartbeat(place.trimmed().text)
        except AsyncActivityCancelledError:
            raise asyncio.CancelledError from None


async def read_run(client: Client, workflow_id: str, run_id: str) -> tuple[CloseEvent | None, list[Payload]]:
    """Return the close event of a run (None if it is open) and its attached calls, each an encoded `CallMemo`."""
    attached: list[Payload] = []
    last = HistoryEvent()
    handle = client.get_workflow_handle(workflow_id, run_id=run_id)
    async for last in handle.fetch_history_events():
        header = last.workflow_execution_started_event_attributes.header.fields
        attached += [header[name] for name in sorted(header) if name.startswith(ATTACHED_HEADER)]
        if last.workflow_execution_signaled_event_attributes.signal_name == ATTACH_SIGNAL:
            attached += last.workflow_execution_signaled_event_attributes.input.payloads
    return close_event_of(last, client.namespace, RunName(workflow_id=workflow_id, run_id=run_id)), attached


async def _attached(payload: Payload, run: WorkflowExecution) -> CallMemo | None:
    try:
        return await read_call(activity.client().data_converter, payload, target=run.id)
    except UnavailableError:
        # The codec has decoded the memo of the run. Another program has written this signal.
        return None


async def _is_continued(run: WorkflowExecution, call: CallMemo) -> bool:
    """Whether another run continues the call, because a reset terminates the run that it replaces."""
    if run.status is not WorkflowExecutionStatus.TERMINATED:
        return False
    current = await find_run(activity.client(), run.id)
    if current is None or current.memo is None or current.ref.run_id == run.run_id:
        return False
    return (current.memo.caller, current.memo.request_id) == (call.caller, call.request_id)


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
        if is_open(info):
            [old] = await decode([info.memo.fields[_PLAN_MEMO]], [dict])
            if old["is_instrumented"] == plan.is_instrumented and len(old["query"]) > len(plan.query):
                # The plan of another service of this task queue, which has callers that do not renew.
                plan = replace(plan, query=old["query"])
            if old == asdict(plan):
                return
            conflict = WorkflowIDConflictPolicy.TERMINATE_EXISTING
        # Continue from the place of the old sweep. If its place is no longer known, continue from its end.
        since_ms = milliseconds(info.close_time.ToDatetime(UTC)) if info.HasField("close_time") else None
        for pending in existing.pending_activities:
            if pending.heartbeat_details.payloads:
                [text] = await decode(pending.heartbeat_details.payloads, [str])
                since_ms = SweepPlace.read(text).earliest_ms
    await client.start_workflow(
        SWEEP_WORKFLOW,
        replace(plan, since_ms=since_ms),
        id=workflow_id,
        task_queue=task_queue,
        id_conflict_policy=conflict,
        memo={_PLAN_MEMO: asdict(plan)},
        static_summary="delivers the outcomes that no worker delivers",
    )
