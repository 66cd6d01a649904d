"""Complete a waiting activity with the outcome of a verified completion.

The completion is by id in the current run: namespace, workflow id, empty run id, activity id. This form stays valid
over attempts and resets. A task token belongs to one attempt and becomes invalid after the first lease. An attempt
that receives the outcome itself completes by its own task token (`caller.waiting.attempt`). If the activity is not
pending, the completer reads the workflow's history. The completer keeps no state: the receipt in the close event
(`caller.receipt`) distinguishes a repeat from a conflict and from a wait that ended without an outcome.
"""

import asyncio
from datetime import timedelta
from typing import Any

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.api.workflowservice import v1 as workflowservice
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from bridge.runtime.event_log import event_logger
from bridge.security.callback_tokens import CallbackClaims
from bridge.temporal.executions import describe, is_open, newest_events
from bridge.temporal.rpc_status import is_missing
from caller.receipt import (
    CLOSINGS,
    CompletionAnswer,
    answer_by,
    event_attributes,
    final_failure,
    is_receipt_of,
    receipt,
    result_of,
)

BUDGET = timedelta(seconds=6)
"""Limit for all calls to Temporal about one message. It must stay under the sender's timeout of 10 seconds."""

_RPC_TIMEOUT = timedelta(seconds=3)
_HISTORY_PAGE = 256

_log = event_logger(__name__)


class Completer:
    """Completes waiting activities in one namespace."""

    def __init__(self, *, client: Client) -> None:
        self._client = client

    async def complete(
        self, claims: CallbackClaims, outcome: Outcome, target: WorkflowRef | None, *, is_late: bool = False
    ) -> CompletionAnswer:
        """End the wait of *claims* with *outcome*, at most once. If *is_late*, only look up which outcome is recorded.

        *outcome* must be within the size limit (`Outcome.within_size_limit`). Temporal accepts a larger outcome and
        then fails the activity.
        """
        try:
            async with asyncio.timeout(BUDGET.total_seconds()):
                identity = receipt(claims.rid, target, outcome)
                if not is_late and await self._end(claims, outcome, identity):
                    return CompletionAnswer.COMPLETED
                runs, pending = await self._find(claims)
                if pending is None:
                    return await self._look_up(claims, runs, identity)
                await self._nudge(claims, pending, outcome)
                return CompletionAnswer.AGAIN_LATER
        except TimeoutError:
            return CompletionAnswer.AGAIN_LATER
        except RPCError as error:
            extra = {"bridge.request_id": claims.rid, "bridge.rpc_status": error.status.name}
            _log.warning("bridge.temporal_unavailable", extra=extra)
            return CompletionAnswer.AGAIN_LATER

    async def is_waiting(self, claims: CallbackClaims) -> CompletionAnswer:
        """Return COMPLETED while the wait of *claims* goes on, OVER or UNKNOWN after it.

        Return AGAIN_LATER if Temporal did not answer.
        """
        try:
            async with asyncio.timeout(BUDGET.total_seconds()):
                runs, pending = await self._find(claims)
                if pending is not None:
                    return CompletionAnswer.COMPLETED
                ended = await self._look_up(claims, runs, "")
        except (TimeoutError, RPCError):
            return CompletionAnswer.AGAIN_LATER
        if ended in {CompletionAnswer.UNKNOWN, CompletionAnswer.AGAIN_LATER}:
            return ended
        return CompletionAnswer.OVER

    async def _end(self, claims: CallbackClaims, outcome: Outcome, identity: str) -> bool:
        """End the activity. False if it is not pending, or is between attempts and *outcome* is a failure."""
        # Without a run id Temporal takes the current run, which has the same activity after a reset. The activity's id
        # is the request id, so that no other call is completed.
        service = self._client.workflow_service
        ids: dict[str, Any] = {
            "namespace": self._client.namespace,
            "workflow_id": claims.wf,
            "activity_id": claims.rid,
            "identity": identity,
        }
        try:
            if outcome.failure is not None:
                failed = workflowservice.RespondActivityTaskFailedByIdRequest(
                    **ids, failure=final_failure(outcome.failure)
                )
                await service.respond_activity_task_failed_by_id(failed, timeout=_RPC_TIMEOUT)
            else:
                completed = workflowservice.RespondActivityTaskCompletedByIdRequest(**ids, result=result_of(outcome))
                await service.respond_activity_task_completed_by_id(completed, timeout=_RPC_TIMEOUT)
        except RPCError as error:
            if not is_missing(error):
                raise
            return False
        return True

    async def _find(self, claims: CallbackClaims) -> tuple[dict[str, bool], PendingActivityInfo | None]:
        """Return the runs that may have had the activity (true for an open run), and the activity if it is pending."""
        runs = {claims.run: False}
        for run_id in ("", claims.run):
            described = await describe(self._client, claims.wf, run_id, within=_RPC_TIMEOUT)
            if described is None:
                continue
            info = described.workflow_execution_info
            runs[info.execution.run_id] = is_open(info)
            # A closed run still lists the activities that were open when it closed. No workflow waits for them.
            for each in described.pending_activities if is_open(info) else ():
                if each.activity_id == claims.rid:
                    return runs, each
            if info.execution.run_id == claims.run:
                break
        return runs, None

    async def _nudge(self, claims: CallbackClaims, activity: PendingActivityInfo, outcome: Outcome) -> None:
        """Run a renewal now if *outcome* is a failure and the activity is between two attempts.

        For an activity between attempts the server accepts a success, but no failure. The reset starts an attempt. That
        attempt either gets the outcome from the handler or stays open until the handler repeats this message.
        """
        if outcome.failure is None or activity.state != PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED:
            return
        try:
            await self._client.workflow_service.reset_activity(
                workflowservice.ResetActivityRequest(
                    namespace=self._client.namespace,
                    execution=WorkflowExecution(workflow_id=claims.wf),
                    identity=self._client.identity,
                    id=claims.rid,
                ),
                timeout=_RPC_TIMEOUT,
            )
        except RPCError as error:
            # Old servers lack ResetActivity, and the activity may have ended. The next renewal has the same effect.
            _log.info("bridge.nudge_failed", extra={"bridge.request_id": claims.rid, "bridge.rpc": error.status})
        else:
            _log.info("bridge.nudged", extra={"bridge.request_id": claims.rid})

    async def _look_up(self, claims: CallbackClaims, runs: dict[str, bool], identity: str) -> CompletionAnswer:
        """Find in history how a wait that is no longer pending has ended."""
        answer = CompletionAnswer.UNKNOWN
        for run_id, is_running in runs.items():
            try:
                closing = await self._closing(claims, run_id)
            except RPCError as error:
                if is_missing(error):
                    continue
                raise
            found = CompletionAnswer.OVER if closing is None else answer_by(closing, identity)
            # A closed workflow does not schedule a stopped activity again.
            if found is not CompletionAnswer.OVER and (is_running or found is not CompletionAnswer.AGAIN_LATER):
                return found
            answer = CompletionAnswer.OVER
        return answer

    async def _closing(self, claims: CallbackClaims, run_id: str) -> HistoryEvent | None:
        """Return the event that closed the activity; None if the run ended or was reset while the activity was open."""
        closings: dict[int, HistoryEvent] = {}
        execution, token = WorkflowExecution(workflow_id=claims.wf, run_id=run_id), b""
        while True:
            page = await newest_events(self._client, execution, size=_HISTORY_PAGE, token=token, within=_RPC_TIMEOUT)
            for event in page.history.events:
                if event.event_type in CLOSINGS:
                    if is_receipt_of(claims.rid, event):
                        return event
                    closings[event_attributes(event).scheduled_event_id] = event
                elif event.activity_task_scheduled_event_attributes.activity_id == claims.rid:
                    return closings.get(event.event_id)
            if not (token := page.next_page_token):
                return None
