"""Complete a waiting activity with a verified outcome: the one function behind receiver and renewals.

By id in the current run: namespace, workflow id, empty run id, activity id. This form outlives attempts and resets. A
task token belongs to one attempt and is dead after the first lease; an attempt that itself learns the outcome completes
by its own, which is tried first. What is not found is looked up in history. Nothing is remembered here: the closing
event's `identity` carries the receipt by which a repeat is known from a conflict and from a wait that is over.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Any

from temporalio.api.common.v1 import Payloads, WorkflowExecution
from temporalio.api.enums.v1 import EventType, PendingActivityState, RetryState
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionRequest,
    GetWorkflowExecutionHistoryReverseRequest,
    ResetActivityRequest,
    RespondActivityTaskCompletedByIdRequest,
    RespondActivityTaskCompletedRequest,
    RespondActivityTaskFailedByIdRequest,
    RespondActivityTaskFailedRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from bridge.runtime.temporal import is_open
from bridge.workflow.call import OPERATION_UNSUCCESSFUL, UNSUCCESSFUL_MESSAGE

BUDGET = timedelta(seconds=6)
"""For all calls to Temporal that one message may cost; it stays under the sender's 10 seconds."""

_RPC_TIMEOUT = timedelta(seconds=3)
_MAX_IDENTITY_BYTES = 1000
_HISTORY_PAGE = 256

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """One waiting activity, as a callback token names it."""

    workflow_id: str
    run_id: str
    """Run that waited when the callback token was made; a reset or its end may have made it an old one."""
    request_id: str
    """Also the activity's id."""
    task_token: bytes | None = None
    """Of the attempt that learned the outcome itself; None for the receiver."""


class CompletionAnswer(Enum):
    """What became of a completion."""

    COMPLETED = "completed"
    REPEATED = "repeated"
    """The same outcome was recorded before."""
    CONFLICT = "conflict"
    """Another outcome was recorded before."""
    OVER = "over"
    """The wait has ended without an outcome: deadline, cancellation, closed workflow."""
    UNKNOWN = "unknown"
    """No such wait ever was, or it is past retention."""
    AGAIN_LATER = "again later"
    """Still pending, or Temporal could not say."""
    INVALID = "invalid"
    """Temporal finds the wait malformed: a fault in our own minting."""


def receipt(request_id: str, target: WorkflowRef | None, outcome: Outcome) -> str:
    """What the closing event's identity says of an outcome: first the facts that make it the same, then its name."""
    run_id = target.run_id if target is not None else _digest(outcome)
    text = f"bridge:{request_id}:{run_id}:{outcome.state.value}"
    if target is not None:
        text += f" {target.namespace}/{target.workflow_id}"
    return text.encode()[:_MAX_IDENTITY_BYTES].decode(errors="ignore")


def _digest(outcome: Outcome) -> str:
    """Names the outcome of a peer that names no run: without it, another result of the same state would be a repeat."""
    content = outcome.result or outcome.failure
    serialized = b"" if content is None else content.SerializeToString(deterministic=True)
    return hashlib.sha256(serialized).hexdigest()[:32]


class Completer:
    """Completes waiting activities in one namespace."""

    def __init__(self, *, client: Client, budget: timedelta = BUDGET) -> None:
        self._client = client
        self._service = client.workflow_service
        self._namespace = client.namespace
        self._budget = budget

    async def complete(
        self, wait: Wait, outcome: Outcome, target: WorkflowRef | None, *, is_late: bool = False
    ) -> CompletionAnswer:
        """End *wait* with *outcome*, at most once. With *is_late* only look up which outcome is recorded.

        *outcome* must be within the size limit (`Outcome.within_size_limit`): Temporal accepts one that is too large,
        and then fails the activity.
        """
        try:
            async with asyncio.timeout(self._budget.total_seconds()):
                identity = receipt(wait.request_id, target, outcome)
                if not is_late and await self._is_completed_by(wait, outcome, identity):
                    return CompletionAnswer.COMPLETED
                return await self._recorded(wait, outcome, identity)
        except TimeoutError:
            return CompletionAnswer.AGAIN_LATER
        except RPCError as error:
            extra = {"bridge.request_id": wait.request_id, "bridge.rpc_status": error.status.name}
            if error.status is RPCStatusCode.INVALID_ARGUMENT:
                _log.error("bridge.completion_invalid", extra=extra)
                return CompletionAnswer.INVALID
            _log.warning("bridge.temporal_unavailable", extra=extra)
            return CompletionAnswer.AGAIN_LATER

    async def is_waiting(self, wait: Wait) -> CompletionAnswer:
        """COMPLETED if *wait* goes on, OVER or UNKNOWN if it does not, AGAIN_LATER if Temporal could not say."""
        try:
            async with asyncio.timeout(self._budget.total_seconds()):
                found = [each for run_id in ("", wait.run_id) if (each := await self._describe(wait, run_id))]
                if any(activity is not None for _, activity in found):
                    return CompletionAnswer.COMPLETED
                ended = await self._look_up(wait, list(dict.fromkeys(run_id for run_id, _ in found)), "")
        except (TimeoutError, RPCError):
            return CompletionAnswer.AGAIN_LATER
        if ended in {CompletionAnswer.UNKNOWN, CompletionAnswer.AGAIN_LATER}:
            return ended
        return CompletionAnswer.OVER

    async def _is_completed_by(self, wait: Wait, outcome: Outcome, identity: str) -> bool:
        if wait.task_token is not None and await _found(self._by_token(wait.task_token, outcome, identity)):
            return True
        return await _found(self._by_id(wait, outcome, identity))

    async def _recorded(self, wait: Wait, outcome: Outcome, identity: str) -> CompletionAnswer:
        run_ids = [wait.run_id]
        for run_id in ("", wait.run_id):
            described = await self._describe(wait, run_id)
            if described is None:
                continue
            current_run_id, activity = described
            if activity is not None:
                await self._nudge(wait, current_run_id, activity, outcome)
                return CompletionAnswer.AGAIN_LATER
            run_ids.append(current_run_id)
            if current_run_id == wait.run_id:
                break
        return await self._look_up(wait, list(dict.fromkeys(run_ids)), identity)

    async def _by_token(self, task_token: bytes, outcome: Outcome, identity: str) -> None:
        end: dict[str, Any] = {"namespace": self._namespace, "task_token": task_token, "identity": identity}
        if outcome.failure is None:
            completed = RespondActivityTaskCompletedRequest(**end, result=_result(outcome))
            await self._service.respond_activity_task_completed(completed, timeout=_RPC_TIMEOUT)
        else:
            failed = RespondActivityTaskFailedRequest(**end, failure=final_failure(outcome.failure))
            await self._service.respond_activity_task_failed(failed, timeout=_RPC_TIMEOUT)

    async def _by_id(self, wait: Wait, outcome: Outcome, identity: str) -> None:
        # Without a run id the current run is meant: after a reset the same activity lives there. The activity's id is
        # the request id, so that no other call can be completed.
        end: dict[str, Any] = {
            "namespace": self._namespace,
            "workflow_id": wait.workflow_id,
            "activity_id": wait.request_id,
            "identity": identity,
        }
        if outcome.failure is None:
            completed = RespondActivityTaskCompletedByIdRequest(**end, result=_result(outcome))
            await self._service.respond_activity_task_completed_by_id(completed, timeout=_RPC_TIMEOUT)
        else:
            failed = RespondActivityTaskFailedByIdRequest(**end, failure=final_failure(outcome.failure))
            await self._service.respond_activity_task_failed_by_id(failed, timeout=_RPC_TIMEOUT)

    async def _describe(self, wait: Wait, run_id: str) -> tuple[str, PendingActivityInfo | None] | None:
        """The run's id, and the waiting activity if it is pending there; None if there is no such run."""
        try:
            described = await self._service.describe_workflow_execution(
                DescribeWorkflowExecutionRequest(
                    namespace=self._namespace,
                    execution=WorkflowExecution(workflow_id=wait.workflow_id, run_id=run_id),
                ),
                timeout=_RPC_TIMEOUT,
            )
        except RPCError as error:
            if _is_not_found(error):
                return None
            raise
        info = described.workflow_execution_info
        # A closed run still lists the activities that were open when it closed; nothing waits there any more.
        activities = described.pending_activities if is_open(info) else ()
        pending = (each for each in activities if each.activity_id == wait.request_id)
        return info.execution.run_id, next(pending, None)

    async def _nudge(self, wait: Wait, run_id: str, activity: PendingActivityInfo, outcome: Outcome) -> None:
        """Run a renewal now, where a failure found no started attempt.

        The server takes only a success for an activity that is between attempts. The attempt that the reset runs
        either learns the outcome from the handler, or waits started for this message to be repeated.
        """
        if outcome.failure is None or activity.state != PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED:
            return
        try:
            await self._service.reset_activity(
                ResetActivityRequest(
                    namespace=self._namespace,
                    execution=WorkflowExecution(workflow_id=wait.workflow_id, run_id=run_id),
                    identity=self._client.identity,
                    id=wait.request_id,
                ),
                timeout=_RPC_TIMEOUT,
            )
        except RPCError as error:
            # Old servers lack the call, and the activity may have moved on: the next renewal does the same.
            _log.info("bridge.nudge_failed", extra={"bridge.request_id": wait.request_id, "bridge.rpc": error.status})
        else:
            _log.info("bridge.nudged", extra={"bridge.request_id": wait.request_id})

    async def _look_up(self, wait: Wait, run_ids: list[str], identity: str) -> CompletionAnswer:
        """Tell from history what became of a wait that is not pending any more."""
        answer = CompletionAnswer.UNKNOWN
        for run_id in run_ids:
            try:
                closing = await _find_closing(self._events_newest_first(wait.workflow_id, run_id), wait.request_id)
            except RPCError as error:
                if _is_not_found(error):
                    continue
                raise
            if closing is None:
                answer = CompletionAnswer.OVER
                continue
            recorded, told = _facts(_identity(closing)), _facts(identity)
            if recorded is None:
                return CompletionAnswer.AGAIN_LATER if _is_stopped(closing) else CompletionAnswer.OVER
            return CompletionAnswer.REPEATED if recorded == told else CompletionAnswer.CONFLICT
        return answer

    async def _events_newest_first(self, workflow_id: str, run_id: str) -> AsyncIterator[HistoryEvent]:
        page_token = b""
        while True:
            page = await self._service.get_workflow_execution_history_reverse(
                GetWorkflowExecutionHistoryReverseRequest(
                    namespace=self._namespace,
                    execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id),
                    maximum_page_size=_HISTORY_PAGE,
                    next_page_token=page_token,
                ),
                timeout=_RPC_TIMEOUT,
            )
            for event in page.history.events:
                yield event
            page_token = page.next_page_token
            if not page_token:
                return


async def _find_closing(events: AsyncIterator[HistoryEvent], activity_id: str) -> HistoryEvent | None:
    """The event that closed the activity; None if the run ended, or was reset, with the activity open."""
    closings: dict[int, HistoryEvent] = {}
    async for event in events:
        if event.event_type in _CLOSINGS:
            if _identity(event).startswith(f"bridge:{activity_id}:"):
                return event
            closings[_CLOSINGS[event.event_type](event)] = event
        elif (
            event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
            and event.activity_task_scheduled_event_attributes.activity_id == activity_id
        ):
            return closings.get(event.event_id)
    return None


_CLOSINGS: dict[int, Callable[[HistoryEvent], int]] = {
    EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED: lambda e: (
        e.activity_task_completed_event_attributes.scheduled_event_id
    ),
    EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED: lambda e: e.activity_task_failed_event_attributes.scheduled_event_id,
    EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT: lambda e: (
        e.activity_task_timed_out_event_attributes.scheduled_event_id
    ),
    EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED: lambda e: e.activity_task_canceled_event_attributes.scheduled_event_id,
}


def _is_stopped(event: HistoryEvent) -> bool:
    """Whether the activity ended by neither an outcome nor the deadline: the workflow schedules it again."""
    failed = event.activity_task_failed_event_attributes
    return (
        event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED
        and failed.failure.application_failure_info.type != OPERATION_UNSUCCESSFUL
        and failed.retry_state != RetryState.RETRY_STATE_TIMEOUT
    )


def _identity(event: HistoryEvent) -> str:
    match event.event_type:
        case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
            return event.activity_task_completed_event_attributes.identity
        case EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED:
            return event.activity_task_failed_event_attributes.identity
        case _:
            return ""


def _facts(identity: str) -> str | None:
    """The part of a receipt that makes an outcome the same; None where there is no receipt."""
    return identity.partition(" ")[0] if identity.startswith("bridge:") else None


def _result(outcome: Outcome) -> Payloads:
    return Payloads(payloads=[] if outcome.result is None else [outcome.result])


def final_failure(failure: Failure) -> Failure:
    """Wrap *failure* as an outcome of the call: the waiting activity is not retried, even if *failure* is retryable."""
    wrapper = Failure(message=UNSUCCESSFUL_MESSAGE)
    wrapper.application_failure_info.type = OPERATION_UNSUCCESSFUL
    wrapper.application_failure_info.non_retryable = True
    wrapper.cause.CopyFrom(failure)
    return wrapper


async def _found(call: Awaitable[None]) -> bool:
    """Whether *call* found its activity."""
    try:
        await call
    except RPCError as error:
        if _is_not_found(error):
            return False
        raise
    return True


def _is_not_found(error: RPCError) -> bool:
    """Whether an activity, run or workflow was not found; a missing namespace is a fault of our own."""
    namespace_missing = any(detail.Is(NamespaceNotFoundFailure.DESCRIPTOR) for detail in error.grpc_status.details)
    return error.status is RPCStatusCode.NOT_FOUND and not namespace_missing
