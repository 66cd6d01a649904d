"""The sweep: find closed targets whose outcome no worker delivers, and deliver it.

These are runs that were terminated or timed out, and all runs of a target whose workers have no plugin. If a worker is
killed before it delivers, callers that do not renew depend on the sweep. For operations that such a caller may start,
the sweep therefore looks at every closed run. It sends one visibility query per target and interval.

The heartbeat details of the sweep's only activity keep its place, which therefore survives every restart. The place
moves by the server's clock. Each query looks back by a window, because visibility may show a run late.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import timedelta

from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.common.v1 import WorkflowExecution as RunName
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import AsyncActivityCancelledError, Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError, RPCStatusCode

from bridge.runtime.event_log import event_logger
from bridge.runtime.temporal import describe, keeping_inline
from bridge.workflow.targets import Target
from handler.delivery.close_event import CloseEvent, close_event_of, read_close_event
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_HEADER, MEMO_KEY, CallMemo, Delivery, milliseconds
from handler.settings import HandlerSettings
from handler.sweep.workflow import SWEEP_ACTIVITY, SWEEP_WORKFLOW, SweepPlace, SweepPlan, sweep_plans

NEXT_SWEEP = "bridge.NextSweep"
"""Type of the error that ends every attempt. Its message states the result of the query."""

_UNAVAILABLE = (
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED}
    | {RPCStatusCode.ABORTED, RPCStatusCode.CANCELLED, RPCStatusCode.UNKNOWN}
    | {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED}
)
"""Statuses of a call to Temporal that may succeed later. Refused credentials are a fault of ours."""
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
            place = SweepPlace(**info.heartbeat_details[0])
        else:
            place = SweepPlace(until_ms=milliseconds(info.scheduled_time) if plan.since_ms is None else plan.since_ms)
        message = "all new endings were looked at"
        try:
            if await self._look(plan, place):
                # This time is by the server's clock and before the query. No later closing is skipped.
                place = place.moved_to(info.current_attempt_scheduled_time)
            else:
                message = "Temporal did not answer for every run"
            await self._record(place)
        except RPCError as error:
            message = f"Temporal did not answer: {error.status.name}"
        raise ApplicationError(
            message,
            type=NEXT_SWEEP,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=timedelta(seconds=plan.interval_s),
        )

    async def _look(self, plan: SweepPlan, place: SweepPlace) -> bool:
        """Handle the runs that closed since *place*, and note them in it. False if Temporal did not always answer."""
        is_complete = True
        closed_since = place.since.isoformat().replace("+00:00", "Z")
        pages = activity.client().list_workflows(f"CloseTime >= '{closed_since}' AND ({plan.query})", page_size=_PAGE)
        while True:
            await pages.fetch_next_page()
            runs = [run for run in pages.current_page or () if MEMO_KEY in run.raw_info.memo.fields]
            new = [run for run in runs if run.run_id not in place.handled]
            errors = await asyncio.gather(*(self._deliver(plan, run) for run in new), return_exceptions=True)
            for run, error in zip(new, errors, strict=True):
                if error is None:
                    place.handled[run.run_id] = milliseconds(run.close_time or run.start_time)
                    continue
                # One bad run must not stop the others. While it is inside the window, every sweep repeats it. If
                # Temporal did not answer, the place does not move either.
                is_complete &= not (isinstance(error, RPCError) and error.status in _UNAVAILABLE)
                extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.error": type(error).__name__}
                _log.warning("bridge.sweep_run_failed", extra=extra)
            if not pages.next_page_token:
                return is_complete
            await self._record(place)

    async def _deliver(self, plan: SweepPlan, run: WorkflowExecution) -> None:
        own = await self._call(run.raw_info)
        if own is None or self._dispatcher.has_taken(_delivery(own, run)) or await self._lives_on(run, own):
            return
        is_ordinary = run.status not in _FORCED
        if not plan.is_instrumented:
            # A worker without the plugin handles no attach signal, therefore no call is attached.
            closed, calls = await read_close_event(activity.client(), run.id, run.run_id), [own]
        else:
            closed, attached = await read_run(activity.client(), run.id, run.run_id)
            calls = [own, *[call for each in attached if (call := await self._attached(each, run)) is not None]]
            calls = [call for call in calls if not (is_ordinary and call.renews)]
        first = {call.request_id: call for call in reversed(calls) if call.callback_url is not None}
        if closed is None or not first:
            return
        await self._dispatcher.deliver([_delivery(call, run) for call in first.values()], closed)
        extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.calls": len(first)}
        _log.info("bridge.ending_swept", extra=extra)

    async def _lives_on(self, run: WorkflowExecution, call: CallMemo) -> bool:
        """Whether another run continues the call, because a reset terminates the run that it replaces."""
        if run.status is not WorkflowExecutionStatus.TERMINATED:
            return False
        described = await describe(activity.client(), run.id)
        if described is None or described.workflow_execution_info.execution.run_id == run.run_id:
            return False
        other = await self._call(described.workflow_execution_info)
        return other is not None and (other.caller, other.request_id) == (call.caller, call.request_id)

    async def _call(self, info: WorkflowExecutionInfo) -> CallMemo | None:
        # If a memo cannot be read, raise. The next sweep repeats it: the codec may be unavailable.
        return await self._decoded(info.memo.fields[MEMO_KEY]) if MEMO_KEY in info.memo.fields else None

    async def _attached(self, payload: Payload, run: WorkflowExecution) -> CallMemo | None:
        try:
            return await self._decoded(payload)
        except Exception as error:  # noqa: BLE001 - any error that converter and codec raise on a foreign value
            extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.error": type(error).__name__}
            _log.warning("bridge.signal_unreadable", extra=extra)
            return None

    async def _decoded(self, payload: Payload) -> CallMemo:
        [call] = await activity.client().data_converter.decode([payload], [CallMemo])
        if not isinstance(call, CallMemo):
            message = "not a call"
            raise TypeError(message)
        return call

    async def _record(self, place: SweepPlace) -> None:
        # An explicit call, because a heartbeat that the SDK sends in the background may be lost with the attempt.
        handle = activity.client().get_async_activity_handle(task_token=activity.info().task_token)
        try:
            await handle.heartbeat(place.trimmed())
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


def _delivery(call: CallMemo, run: WorkflowExecution) -> Delivery:
    return Delivery(call=call, workflow_id=run.id, run_id=run.run_id, start_time_ms=milliseconds(run.start_time))


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
    try:
        found = await client.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    else:
        if found.status is WorkflowExecutionStatus.RUNNING:
            if await found.memo_value(_PLAN_MEMO, default=None) == asdict(plan):
                return
            conflict = WorkflowIDConflictPolicy.TERMINATE_EXISTING
        # Continue from the place of the old sweep. If its place is no longer known, continue from its end.
        since_ms = None if found.close_time is None else milliseconds(found.close_time)
        for pending in found.raw_description.pending_activities:
            if pending.heartbeat_details.payloads:
                [place] = await client.data_converter.decode(pending.heartbeat_details.payloads, [SweepPlace])
                since_ms = place.until_ms
    await client.start_workflow(
        SWEEP_WORKFLOW,
        replace(plan, since_ms=since_ms),
        id=workflow_id,
        task_queue=task_queue,
        id_conflict_policy=conflict,
        memo={_PLAN_MEMO: asdict(plan)},
        static_summary="delivers the outcomes that no worker delivers",
    )
