"""The sweep: find closed targets whose outcome the interceptor cannot have told, and have it delivered.

Those are runs that were terminated or timed out, failed runs that a retry policy might have followed by another, and
every run of a target whose workers have no interceptor. One visibility query per interval asks for just these, so
neither open runs nor runs that were told cost anything. What is found goes to a delivery workflow, whose id keeps it
from being told twice.

The place is kept as heartbeat details of the sweep's only activity: it survives every restart. It moves by the server's
clock, and looks back by a window, because visibility may show a run late.
"""

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta

from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import AsyncActivityCancelledError, Client, WorkflowExecution, WorkflowExecutionStatus
from temporalio.common import RawValue, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from bridge.protocol.outcome import Outcome, too_large
from bridge.workflow.targets import Target
from handler.delivery.close_event import read_outcome
from handler.delivery.records import MEMO_KEY, CallMemo, Delivery, milliseconds
from handler.delivery.workflow import DELIVERY_WORKFLOW
from handler.settings import HandlerSettings
from handler.start.runs import Runs
from handler.sweep.workflow import SWEEP_ACTIVITY, SWEEP_WORKFLOW, SweepPlace, SweepPlan, sweep_query

NEXT_SWEEP = "bridge.NextSweep"
"""Type of the error that ends every attempt; its message tells how it went."""

_PAGE = 50
"""Runs told at once."""

_PLAN_MEMO = "bridge-sweep"

_AWAY = (
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED}
    | {RPCStatusCode.ABORTED, RPCStatusCode.CANCELLED, RPCStatusCode.UNKNOWN}
    | {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED}
)

_log = logging.getLogger(__name__)


class SweepActivities:
    """The sweep, for one worker."""

    def __init__(self, *, client: Client, max_outcome_bytes: int) -> None:
        """*max_outcome_bytes*: a larger outcome is told as a failure, as the interceptor does."""
        self._client = client
        self._runs = Runs(client)
        self._max_outcome_bytes = max_outcome_bytes

    @activity.defn(name=SWEEP_ACTIVITY)
    async def sweep(self, plan: SweepPlan) -> None:
        """Sweep once. It never returns: the next attempt is the next sweep.

        Raises:
            ApplicationError: Retryable, with the interval as its delay.
        """
        info = activity.info()
        if info.heartbeat_details:
            place = SweepPlace(**info.heartbeat_details[0])
        else:
            place = SweepPlace(until_ms=milliseconds(info.scheduled_time) if plan.since_ms is None else plan.since_ms)
        message = "all new endings were looked at"
        try:
            if await self._look(plan, place):
                # By the server's clock, and before the query: nothing that closes later is taken for seen.
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
        """Look at all that is new since *place*, which learns what was handled. False: something is left to do."""
        is_complete = True
        closed_since = place.since.isoformat().replace("+00:00", "Z")
        pages = self._client.list_workflows(f"CloseTime >= '{closed_since}' AND ({plan.query})", page_size=_PAGE)
        while True:
            await pages.fetch_next_page()
            runs = [run for run in pages.current_page or () if MEMO_KEY in run.raw_info.memo.fields]
            new = [run for run in runs if run.run_id not in place.handled]
            errors = await asyncio.gather(*map(self._tell, new), return_exceptions=True)
            for run, error in zip(new, errors, strict=True):
                if error is None:
                    place.handled[run.run_id] = milliseconds(run.close_time or run.start_time)
                    continue
                # One bad run must not stop the others. It is tried again: by itself while it is inside the window, or,
                # if it is Temporal that did not answer, with all the rest.
                is_complete &= not (isinstance(error, RPCError) and error.status in _AWAY)
                extra = {"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.error": type(error).__name__}
                _log.warning("bridge.sweep_run_failed", extra=extra)
            if not pages.next_page_token:
                return is_complete
            await self._record(place)

    async def _tell(self, run: WorkflowExecution) -> None:
        call = await self._call(run.raw_info)
        if call is None or call.callback_url is None or await self._lives_on(run, call):
            return
        outcome = await read_outcome(self._client, run.id, run.run_id)
        if outcome is None:
            return
        content = await self._content(outcome)
        if content.ByteSize() > self._max_outcome_bytes:
            outcome = too_large(content.ByteSize(), self._max_outcome_bytes)
            content = await self._content(outcome)
        delivery = Delivery.of(
            call,
            state=outcome.state.value,
            workflow_id=run.id,
            run_id=run.run_id,
            start_time=run.start_time,
            close_time=run.close_time or run.start_time,
        )
        # Already started by an earlier sweep, or by the target itself: it is being told.
        with suppress(WorkflowAlreadyStartedError):
            await self._client.start_workflow(
                DELIVERY_WORKFLOW,
                args=[delivery, RawValue(content)],
                id=delivery.workflow_id_of_delivery,
                task_queue=activity.info().task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                static_summary=f"{delivery.state} to {delivery.caller}",
            )
            extra = {"bridge.request_id": call.request_id, "bridge.target": run.id, "bridge.state": delivery.state}
            _log.info("bridge.ending_swept", extra=extra)

    async def _lives_on(self, run: WorkflowExecution, call: CallMemo) -> bool:
        """Whether another run carries the call on: a reset terminates the run that it replaces."""
        if run.status is not WorkflowExecutionStatus.TERMINATED:
            return False
        current = await self._runs.describe(run.id)
        if current is None or current.execution.run_id == run.run_id:
            return False
        other = await self._call(current)
        return other is not None and (other.caller, other.request_id) == (call.caller, call.request_id)

    async def _call(self, info: WorkflowExecutionInfo) -> CallMemo | None:
        # A memo that cannot be read is an error here, and tried again: it may be the codec that is away.
        if MEMO_KEY not in info.memo.fields:
            return None
        [memo] = await self._client.data_converter.decode([info.memo.fields[MEMO_KEY]], [CallMemo])
        return memo if isinstance(memo, CallMemo) else None

    async def _content(self, outcome: Outcome) -> Payload:
        """The outcome as a delivery's content: without the codec, which the client and the delivery put on again."""
        codec = self._client.data_converter.payload_codec
        if outcome.failure is not None:
            if codec is not None:
                await codec.decode_failure(outcome.failure)
            return Payload(
                metadata={"encoding": b"binary/protobuf", "messageType": Failure.DESCRIPTOR.full_name.encode()},
                data=outcome.failure.SerializeToString(deterministic=True),
            )
        if outcome.result is None:
            return Payload(metadata={"encoding": b"binary/null"})
        return outcome.result if codec is None else (await codec.decode([outcome.result]))[0]

    async def _record(self, place: SweepPlace) -> None:
        # By an explicit call: what the SDK records in the background may be lost with the attempt.
        handle = self._client.get_async_activity_handle(task_token=activity.info().task_token)
        try:
            await handle.heartbeat(place.trimmed())
        except AsyncActivityCancelledError:
            raise asyncio.CancelledError from None


async def start_sweep(client: Client, *, targets: Iterable[Target], settings: HandlerSettings) -> None:
    """See to it that the one sweep of the handler's task queue runs, and looks for all of *targets*.

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
        await _start(client, plan, settings.task_queue)
    except Exception as error:  # noqa: BLE001 - Temporal or the codec is away, and starts can be served all the same
        _log.error("bridge.sweep_not_started", extra={"bridge.error": type(error).__name__})


async def _start(client: Client, plan: SweepPlan, task_queue: str) -> None:
    workflow_id = f"bridge-sweep-{task_queue}"
    # Whoever starts the same at the same time means the same; only a plan that was seen to differ is replaced.
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
        # Where it had come to; where that is not known any more, the instant of its own end.
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
        static_summary="tells the endings that nobody else tells",
    )
