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
from datetime import timedelta
from typing import NoReturn

from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import (
    AsyncActivityCancelledError,
    Client,
    WorkflowExecution,
    WorkflowExecutionStatus,
)
from temporalio.common import RawValue, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from bridge.outcomes import Outcome, too_large
from handler.calls import MEMO_KEY, CallMemo, Delivery
from handler.deliveries import DELIVERY_WORKFLOW
from handler.outcomes import read_outcome
from handler.runs import Runs
from handler.sweeps import SWEEP_ACTIVITY, SweepPlace, SweepPlan, milliseconds

SWEPT = "bridge.Swept"
TEMPORAL_AWAY = "bridge.TemporalAway"

_PAGE = 50
"""Runs told at once."""

_AWAY = frozenset(
    {
        *(RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED),
        *(RPCStatusCode.ABORTED, RPCStatusCode.CANCELLED, RPCStatusCode.UNKNOWN),
        *(RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED),
    }
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
            since = plan.since_ms if plan.since_ms is not None else milliseconds(info.scheduled_time)
            place = SweepPlace(until_ms=since)
        try:
            seen, is_complete = await self._sweep(plan, place)
            if is_complete:
                # By the server's clock, and before the query: nothing that closes later is taken for seen.
                place = place.moved_to(info.current_attempt_scheduled_time)
            await self._record(place)
        except RPCError as error:
            _end(plan, TEMPORAL_AWAY, f"Temporal did not answer: {error.status.name}")
        if not is_complete:
            _end(plan, TEMPORAL_AWAY, "Temporal did not answer for every run")
        _end(plan, SWEPT, f"{seen} new endings looked at")

    async def _sweep(self, plan: SweepPlan, place: SweepPlace) -> tuple[int, bool]:
        """Look at all that is new since *place*, which learns what was handled. False: something is left to do."""
        seen, is_complete = 0, True
        closed_since = place.since.isoformat().replace("+00:00", "Z")
        pages = self._client.list_workflows(f"CloseTime >= '{closed_since}' AND ({plan.query})", page_size=_PAGE)
        while True:
            await pages.fetch_next_page()
            new = [
                run
                for run in pages.current_page or ()
                if MEMO_KEY in run.raw_info.memo.fields and run.run_id not in place.handled
            ]
            seen += len(new)
            for run, error in zip(
                new, await asyncio.gather(*map(self._tell, new), return_exceptions=True), strict=True
            ):
                if error is None:
                    place.handled[run.run_id] = milliseconds(run.close_time or run.start_time)
                    continue
                # One bad run must not stop the others. It is tried again: by itself while it is inside the window, or,
                # if it is Temporal that did not answer, with all the rest.
                is_away = isinstance(error, RPCError) and error.status in _AWAY
                is_complete = is_complete and not is_away
                _log.warning(
                    "bridge.sweep_run_failed",
                    extra={"bridge.target": run.id, "bridge.run_id": run.run_id, "bridge.error": type(error).__name__},
                )
            if not pages.next_page_token:
                return seen, is_complete
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
            content = _failure_payload(outcome.failure or Failure())
        delivery = Delivery(
            caller=call.caller,
            request_id=call.request_id,
            operation_token=call.operation_token,
            callback_url=call.callback_url,
            callback_headers=call.callback_headers,
            deadline_ms=call.deadline_ms,
            state=outcome.state.value,
            workflow_id=run.id,
            run_id=run.run_id,
            start_time_ms=milliseconds(run.start_time),
            close_time_ms=milliseconds(run.close_time or run.start_time),
        )
        try:
            await self._client.start_workflow(
                DELIVERY_WORKFLOW,
                args=[delivery, RawValue(content)],
                id=delivery.workflow_id_of_delivery,
                task_queue=activity.info().task_queue,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                static_summary=f"{delivery.state} to {delivery.caller}",
            )
        except WorkflowAlreadyStartedError:
            # By an earlier sweep, or by the target itself: it is being told.
            return
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
        payload = info.memo.fields.get(MEMO_KEY)
        if payload is None:
            return None
        [memo] = await self._client.data_converter.decode([payload], [CallMemo])
        return memo if isinstance(memo, CallMemo) else None

    async def _content(self, outcome: Outcome) -> Payload:
        """The outcome as a delivery's content: without the codec, which the client and the delivery put on again."""
        codec = self._client.data_converter.payload_codec
        if outcome.failure is not None:
            if codec is not None:
                await codec.decode_failure(outcome.failure)
            return _failure_payload(outcome.failure)
        if outcome.result is None:
            return Payload(metadata={"encoding": b"binary/null"})
        return outcome.result if codec is None else (await codec.decode([outcome.result]))[0]

    async def _record(self, place: SweepPlace) -> None:
        # By an explicit call: what the SDK records in the background may be lost with the attempt.
        try:
            await self._client.get_async_activity_handle(task_token=activity.info().task_token).heartbeat(
                place.trimmed()
            )
        except AsyncActivityCancelledError:
            raise asyncio.CancelledError from None


def _failure_payload(failure: Failure) -> Payload:
    return Payload(
        metadata={"encoding": b"binary/protobuf", "messageType": Failure.DESCRIPTOR.full_name.encode()},
        data=failure.SerializeToString(deterministic=True),
    )


def _end(plan: SweepPlan, kind: str, message: str) -> NoReturn:
    raise ApplicationError(
        message,
        type=kind,
        category=ApplicationErrorCategory.BENIGN,
        next_retry_delay=timedelta(seconds=plan.interval_s),
    ) from None
