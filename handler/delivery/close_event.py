"""The close event of a target. Every delivery sends the outcome that this event holds.

Payloads and failures are sent as history has them, encoded by codec and converter. A reference to external storage is
the exception: `inlined` replaces it by the value that it refers to.
"""

import asyncio
import contextlib
import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.enums.v1 import EventType, HistoryEventFilterType, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryRequest, GetWorkflowExecutionHistoryResponse
from temporalio.client import Client
from temporalio.common import RawValue
from temporalio.converter import DataConverter
from temporalio.service import RPCError, RPCStatusCode

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import CANCELED_MESSAGE, Outcome
from bridge.protocol.payload import holds_reference
from bridge.temporal.executions import newest_events
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_HEADER
from handler.settings import CallerPeer

_LONG_POLL = timedelta(seconds=30)
"""Longer than the server holds a poll (20 s). The server returns an empty answer one second before the deadline of a
request. If the deadline were the remaining time, the last second would be polls without a pause."""
_FILTERED_READ = timedelta(seconds=2)
_TERMINATED = "operation terminated"
"""The whole message that Temporal's server sends for a terminated target."""
_TERMINATED_BY = f"{_TERMINATED} by "
"""Beginning of our message, which names identity and reason."""
_FORCED = (
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
)


@dataclass(frozen=True, kw_only=True)
class CloseEvent:
    """How a run closed."""

    outcome: Outcome
    """As history has it."""
    target: WorkflowRef
    """The run that closed."""
    close_time: datetime
    """By the server's clock."""
    is_forced: bool
    """Whether the run was terminated or timed out. A reset terminates the run that it replaces."""


async def read_close_event(client: Client, workflow_id: str, run_id: str) -> CloseEvent | None:
    """Return the close event of a run; None if the run is open, or if another run continues it.

    Raises what `read_last_event` raises.
    """
    return (await read_last_event(client, workflow_id, run_id))[0]


async def read_last_event(client: Client, workflow_id: str, run_id: str) -> tuple[CloseEvent | None, str]:
    """Return the close event of a run as `read_close_event` does, and the id of the run that continues it, or "".

    This reads the last event, because the close event filter blocks for 20 s if the run is open.

    Raises:
        temporalio.service.RPCError: NOT_FOUND if there is no such run, or its retention has passed.
    """
    execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
    try:
        events = list((await newest_events(client, execution, size=1)).history.events)
    except RPCError as error:
        if error.status is not RPCStatusCode.UNIMPLEMENTED:
            raise
        # The time-skipping test server cannot read in reverse.
        events = await _read_filtered(client, execution)
    if not events:
        return None, ""
    return close_event_of(events[0], client.namespace, execution), _next_run_id(events[0])


def close_event_of(event: HistoryEvent, namespace: str, run: WorkflowExecution) -> CloseEvent | None:
    """Return *event* of *run* as a close event; None for any other event, and if another run continues *run*."""
    outcome = _outcome(event)
    if outcome is None:
        return None
    return CloseEvent(
        outcome=outcome,
        target=WorkflowRef(namespace=namespace, workflow_id=run.workflow_id, run_id=run.run_id),
        close_time=event.event_time.ToDatetime(UTC),
        is_forced=event.event_type in _FORCED,
    )


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
    return close_event_of(last, client.namespace, WorkflowExecution(workflow_id=workflow_id, run_id=run_id)), attached


async def wait_for_close_event(client: Client, target: WorkflowRef, *, within: timedelta) -> CloseEvent | None:
    """Return the close event of *target* or of the run that continues it; None if it does not close *within*."""
    execution, page_token = WorkflowExecution(workflow_id=target.workflow_id, run_id=target.run_id), b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within.total_seconds()):
            while execution.run_id:
                response = await _filtered(client, execution, within=_LONG_POLL, waits=True, token=page_token)
                page_token = response.next_page_token
                if not response.history.events:
                    continue
                event = response.history.events[-1]
                if (found := close_event_of(event, client.namespace, execution)) is not None:
                    return found
                execution.run_id, page_token = _next_run_id(event), b""
    return None


def _outcome(event: HistoryEvent) -> Outcome | None:
    if _next_run_id(event):
        return None
    match event.event_type:
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
            result = event.workflow_execution_completed_event_attributes.result.payloads
            return Outcome.succeeded(result[0] if result else None)
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
            return Outcome.failed(event.workflow_execution_failed_event_attributes.failure)
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
            failure = Failure(message=CANCELED_MESSAGE)
            failure.canceled_failure_info.details.CopyFrom(event.workflow_execution_canceled_event_attributes.details)
            return Outcome.canceled(failure)
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED:
            terminated = event.workflow_execution_terminated_event_attributes
            reason = f": {terminated.reason}" if terminated.reason else ""
            who = terminated.identity or "an unknown client"
            return Outcome.failed(_terminated(f"{_TERMINATED_BY}{who}{reason}"))
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT:
            # The event does not show whether the run's or the execution's timeout passed. Callers need no difference.
            failure = Failure(message="operation exceeded internal timeout")
            failure.timeout_failure_info.timeout_type = TimeoutType.TIMEOUT_TYPE_START_TO_CLOSE
            return Outcome.failed(failure)
        case _:
            return None


async def sendable(converter: DataConverter, outcome: Outcome, peer: CallerPeer) -> Outcome:
    """Return *outcome* in the form in which *peer* may get it."""
    if not peer.shares_storage:
        outcome = await inlined(converter, outcome)
    failure = outcome.failure
    # A target may use the same words in a failure of its own, which must arrive unchanged.
    is_ours = (
        failure is not None
        and failure.HasField("terminated_failure_info")
        and failure.message.startswith(_TERMINATED_BY)
    )
    if is_ours and not peer.shows_terminations:
        outcome = Outcome.failed(_terminated(_TERMINATED))
    return outcome.within_size_limit()


async def inlined(converter: DataConverter, outcome: Outcome) -> Outcome:
    """Return *outcome* with values instead of references to external storage. Other content stays unchanged."""
    part = outcome.result if outcome.failure is None else outcome.failure
    if converter.external_storage is None or part is None or not holds_reference(part):
        return outcome
    if isinstance(part, Payload):
        [value] = await converter.decode([part], [RawValue])
        inline = dataclasses.replace(converter, external_storage=None)
        return dataclasses.replace(outcome, result=(await inline.encode([value]))[0])
    failure = Failure()
    failure.CopyFrom(part)
    # Fetches and decodes the payloads of *failure* in place.
    await converter.decode_failure(failure)
    if converter.payload_codec is not None:
        await converter.payload_codec.encode_failure(failure)
    return dataclasses.replace(outcome, failure=failure)


def _terminated(message: str) -> Failure:
    failure = Failure(message=message)
    failure.terminated_failure_info.SetInParent()
    return failure


async def _filtered(
    client: Client, execution: WorkflowExecution, *, within: timedelta, waits: bool = False, token: bytes = b""
) -> GetWorkflowExecutionHistoryResponse:
    request = GetWorkflowExecutionHistoryRequest(
        namespace=client.namespace,
        execution=execution,
        history_event_filter_type=HistoryEventFilterType.HISTORY_EVENT_FILTER_TYPE_CLOSE_EVENT,
        wait_new_event=waits,
        next_page_token=token,
    )
    return await client.workflow_service.get_workflow_execution_history(request, timeout=within)


async def _read_filtered(client: Client, execution: WorkflowExecution) -> list[HistoryEvent]:
    try:
        return list((await _filtered(client, execution, within=_FILTERED_READ)).history.events[-1:])
    except RPCError as error:
        if error.status in {RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}:
            return []
        raise


def _next_run_id(event: HistoryEvent) -> str:
    """Return the next run (continue-as-new, retry policy, cron) that *event* names; empty if it names none."""
    attributes = getattr(event, event.WhichOneof("attributes") or "", None)
    return str(getattr(attributes, "new_execution_run_id", ""))
