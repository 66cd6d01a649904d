"""What became of a target: its state now, and its outcome from the event that closed it.

Payloads and failures are passed on as they stand in history, codec and all.
"""

import asyncio
import contextlib
from datetime import timedelta

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType, HistoryEventFilterType, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import GetWorkflowExecutionHistoryRequest
from temporalio.client import Client

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import CANCELED_MESSAGE, Outcome

_LONG_POLL = timedelta(seconds=30)
"""Longer than the server holds a poll (20 s). It answers with nothing a second before the deadline that it is told: the
time that we wait for would so end in a second of polls without a pause."""


async def read_outcome(client: Client, workflow_id: str, run_id: str) -> Outcome | None:
    """The outcome of a closed run; None if its last event is no ending (it continued as new, or still runs)."""
    response = await client.workflow_service.get_workflow_execution_history(
        GetWorkflowExecutionHistoryRequest(
            namespace=client.namespace,
            execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id),
            history_event_filter_type=HistoryEventFilterType.HISTORY_EVENT_FILTER_TYPE_CLOSE_EVENT,
        ),
        retry=True,
    )
    return outcome_of(response.history.events[-1]) if response.history.events else None


async def wait_for_outcome(
    client: Client, target: WorkflowRef, *, within: timedelta
) -> tuple[Outcome, WorkflowRef] | None:
    """The outcome of *target*, or of the run that carries it on, with that run; None if it does not end in time."""
    run_id, page_token = target.run_id, b""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within.total_seconds()):
            while run_id:
                response = await client.workflow_service.get_workflow_execution_history(
                    GetWorkflowExecutionHistoryRequest(
                        namespace=client.namespace,
                        execution=WorkflowExecution(workflow_id=target.workflow_id, run_id=run_id),
                        history_event_filter_type=HistoryEventFilterType.HISTORY_EVENT_FILTER_TYPE_CLOSE_EVENT,
                        wait_new_event=True,
                        next_page_token=page_token,
                    ),
                    timeout=_LONG_POLL,
                )
                page_token = response.next_page_token
                if not response.history.events:
                    continue
                event = response.history.events[-1]
                if (outcome := outcome_of(event)) is not None:
                    ref = WorkflowRef(namespace=client.namespace, workflow_id=target.workflow_id, run_id=run_id)
                    return outcome, ref
                run_id, page_token = _next_run_id(event), b""
    return None


def outcome_of(event: HistoryEvent) -> Outcome | None:
    """The outcome that a closing event tells; None for any other event, and where another run carries on."""
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
            failure = Failure(message=f"operation terminated by {terminated.identity or 'somebody'}{reason}")
            failure.terminated_failure_info.SetInParent()
            return Outcome.failed(failure)
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT:
            # The event does not tell whose time was out, the run's or the execution's; to the caller it is the same.
            failure = Failure(message="operation exceeded internal timeout")
            failure.timeout_failure_info.timeout_type = TimeoutType.TIMEOUT_TYPE_START_TO_CLOSE
            return Outcome.failed(failure)
        case _:
            return None


def _next_run_id(event: HistoryEvent) -> str:
    """The run that comes next, by continue-as-new, a retry policy or cron; empty if the event names none."""
    attributes = getattr(event, event.WhichOneof("attributes") or "", None)
    return str(getattr(attributes, "new_execution_run_id", ""))
