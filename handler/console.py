"""Read the deliveries of a namespace, and run failed ones again.

A delivery's state is what Temporal says of its workflow; nothing is kept beside it.
"""

import asyncio
import uuid
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import PendingActivityState, WorkflowIdConflictPolicy, WorkflowIdReusePolicy
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import StartWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError, RPCStatusCode

from bridge.command import CommandError
from handler.calls import MEMO_KEY, CallMemo, Delivery
from handler.deliveries import DELIVERY_WORKFLOW
from handler.outcomes import outcome_of
from handler.reports import DeliveryReport, DeliveryState, plain

_AT_ONCE = 8
"""Deliveries read at a time."""

_STATES = {"Running": DeliveryState.RUNNING, "Completed": DeliveryState.DELIVERED} | dict.fromkeys(
    ("Failed", "TimedOut", "Terminated", "Canceled"), DeliveryState.FAILED
)
"""By Temporal's status, as visibility spells it."""


class Deliveries:
    """The deliveries of one handler namespace."""

    def __init__(self, *, client: Client) -> None:
        self._client = client

    async def read_all(self, states: Collection[DeliveryState], *, limit: int | None = None) -> list[DeliveryReport]:
        """Newest first, each delivery once."""
        # Visibility lags, and lists older runs too: it only proposes, describe decides.
        statuses = ", ".join(f'"{status}"' for status, state in _STATES.items() if state in states)
        query = f'WorkflowType = "{DELIVERY_WORKFLOW}" AND ExecutionStatus IN ({statuses})'
        rows = [row async for row in self._client.list_workflows(query)]
        ids = list(dict.fromkeys(row.id for row in sorted(rows, key=lambda row: row.start_time, reverse=True)))
        reports: list[DeliveryReport] = []
        while ids and (limit is None or len(reports) < limit):
            described = await asyncio.gather(*(self._describe(each) for each in ids[:_AT_ONCE]))
            wanted = [each for each in described if each is not None and _state_of(each) in states]
            reports += await asyncio.gather(*(self._report(each) for each in wanted))
            del ids[:_AT_ONCE]
        return reports[:limit]

    async def read(self, delivery_id: str) -> DeliveryReport:
        """Raises CommandError where there is none."""
        return await self._report(await self._find(delivery_id))

    async def redeliver(self, delivery_id: str) -> str:
        """Run a failed delivery again: same id, same content, signed anew. Returns the new run's id.

        Raises:
            CommandError: There is none, or it has not failed.
        """
        described = await self._find(delivery_id)
        match _state_of(described):
            case DeliveryState.RUNNING:
                message = f"{delivery_id} is still running: it tries again by itself, `deliveries show` tells when"
                raise CommandError(message)
            case DeliveryState.DELIVERED:
                message = f"{delivery_id} is already delivered: there is nothing to do"
                raise CommandError(message)
            case DeliveryState.FAILED:
                pass
        handle = self._client.get_workflow_handle(delivery_id, run_id=described.run_id)
        first = (await handle.fetch_history()).events[0]
        started = first.workflow_execution_started_event_attributes
        request = StartWorkflowExecutionRequest(
            namespace=self._client.namespace,
            workflow_id=delivery_id,
            workflow_type=started.workflow_type,
            task_queue=started.task_queue,
            # As it stands in history, codec and all: whoever redelivers need not be able to read it.
            input=started.input,
            header=started.header,
            user_metadata=first.user_metadata,
            identity=self._client.identity,
            request_id=str(uuid.uuid4()),
            workflow_id_reuse_policy=WorkflowIdReusePolicy.WORKFLOW_ID_REUSE_POLICY_ALLOW_DUPLICATE_FAILED_ONLY,
            workflow_id_conflict_policy=WorkflowIdConflictPolicy.WORKFLOW_ID_CONFLICT_POLICY_FAIL,
        )
        try:
            response = await self._client.workflow_service.start_workflow_execution(request, retry=True)
        except RPCError as error:
            if error.status is not RPCStatusCode.ALREADY_EXISTS:
                raise
            message = f"{delivery_id} was run again by somebody else meanwhile: `deliveries show` tells how it stands"
            raise CommandError(message) from None
        return response.run_id

    async def _find(self, delivery_id: str) -> WorkflowExecutionDescription:
        described = await self._describe(delivery_id)
        if described is None:
            where = f"namespace {self._client.namespace}: `deliveries list --state all` names those that are kept"
            message = f"no delivery {plain(delivery_id)} in {where}"
            raise CommandError(message)
        return described

    async def _describe(self, delivery_id: str) -> WorkflowExecutionDescription | None:
        try:
            described = await self._client.get_workflow_handle(delivery_id).describe()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        return described if described.workflow_type == DELIVERY_WORKFLOW else None

    async def _report(self, described: WorkflowExecutionDescription) -> DeliveryReport:
        handle = self._client.get_workflow_handle(described.id, run_id=described.run_id)
        events = (await handle.fetch_history()).events
        attempts = max(event.activity_task_started_event_attributes.attempt for event in events)
        outcome, next_try = outcome_of(events[-1]), None
        failure = outcome.failure if outcome is not None else None
        for pending in described.raw_description.pending_activities:
            # Between two attempts Temporal counts the next one already.
            is_begun = pending.state != PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
            attempts = pending.attempt if is_begun else pending.attempt - 1
            # A terminated run lists its activity still; what ended the run is said by its closing event.
            if outcome is None:
                failure = pending.last_failure if pending.HasField("last_failure") else None
                if pending.HasField("next_attempt_schedule_time"):
                    next_try = pending.next_attempt_schedule_time.ToDatetime(UTC)
        return DeliveryReport(
            id=described.id,
            run_id=described.run_id,
            state=_state_of(described),
            attempts=attempts,
            last_error=await self._error(failure),
            next_try=next_try,
            started=described.start_time,
            closed=described.close_time,
            **await self._content(events[0].workflow_execution_started_event_attributes.input.payloads),
        )

    async def _content(self, payloads: Iterable[Payload]) -> dict[str, Any]:
        try:
            [delivery] = await self._client.data_converter.decode(list(payloads)[:1], [Delivery])
        except Exception:  # noqa: BLE001 - made by a codec that we do not have: listed all the same
            return {}
        content = {
            "caller": delivery.caller,
            "request_id": delivery.request_id,
            "operation_state": delivery.state,
            "outcome_time": _instant(delivery.close_time_ms),
            "deadline": _instant(delivery.deadline_ms),
            "target_workflow_id": delivery.workflow_id,
            "target_run_id": delivery.run_id,
        }
        target = self._client.get_workflow_handle(delivery.workflow_id, run_id=delivery.run_id)
        try:
            call = await (await target.describe()).memo_value(MEMO_KEY, type_hint=CallMemo)
        except Exception:  # noqa: BLE001 - the target is not kept any more
            return content
        if (call.caller, call.request_id) != (delivery.caller, delivery.request_id):
            # Attached to a run that somebody else's call had started.
            return content
        names = ("caller_namespace", "caller_workflow_id", "caller_run_id")
        origin = {name: getattr(call, name) or None for name in names}
        return {**content, **origin, "operation": f"{call.service}/{call.operation}"}

    async def _error(self, failure: Failure | None) -> str | None:
        if failure is None:
            return None
        try:
            error = await self._client.data_converter.decode_failure(failure)
        except Exception:  # noqa: BLE001 - as for the content
            return "unreadable"
        # An ActivityError says only that an activity failed. And no operation is meant: that has ended as it did.
        cause = error.__cause__ if isinstance(error, ActivityError) and error.__cause__ else error
        return plain(str(cause).removeprefix("operation "))


def _state_of(described: WorkflowExecutionDescription) -> DeliveryState:
    status = described.status or WorkflowExecutionStatus.RUNNING
    return _STATES.get(status.name.title().replace("_", ""), DeliveryState.FAILED)


def _instant(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
