"""Reports of the deliveries of a namespace, and the running of failed ones again.

A delivery's state is what Temporal says of its workflow; nothing is kept beside it. A report has no field for a
callback URL, a header or a token, so none can be printed.
"""

import asyncio
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import PendingActivityState, WorkflowIdConflictPolicy, WorkflowIdReusePolicy
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflowservice.v1 import StartWorkflowExecutionRequest
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError, RPCStatusCode

from bridge.admin.command import CommandError
from bridge.security.redaction import redacted
from handler.delivery.close_event import outcome_of
from handler.delivery.records import MEMO_KEY, CallMemo, Delivery
from handler.delivery.workflow import DELIVERY_WORKFLOW

_AT_ONCE = 8
"""Deliveries read at a time."""


class DeliveryState(str, Enum):
    """How a delivery stands."""

    RUNNING = "running"
    """Tries again by itself."""
    FAILED = "failed"
    """Refused, out of time, or ended by somebody: waits to be run again."""
    DELIVERED = "delivered"
    """The receiver took it, or said that nobody waits any more."""

    @classmethod
    def of(cls, status: WorkflowExecutionStatus | None) -> "DeliveryState":
        """By what Temporal says of the workflow."""
        known = {WorkflowExecutionStatus.RUNNING: cls.RUNNING, WorkflowExecutionStatus.COMPLETED: cls.DELIVERED}
        return cls.FAILED if status is None else known.get(status, cls.FAILED)


@dataclass(frozen=True, kw_only=True)
class DeliveryReport:
    """One delivery by its newest run. Field names are those of the JSON; what cannot be read is None."""

    id: str
    run_id: str
    state: DeliveryState
    attempts: int
    """Begun in this run."""
    last_error: str | None
    next_try: datetime | None
    """None while an attempt is under way."""
    started: datetime
    """This run."""
    closed: datetime | None
    caller: str | None = None
    request_id: str | None = None
    operation_state: str | None = None
    """What the caller is told: succeeded, failed or canceled."""
    outcome_time: datetime | None = None
    """When the target's outcome was certain."""
    deadline: datetime | None = None
    target_workflow_id: str | None = None
    target_run_id: str | None = None
    operation: str | None = None
    """Service/operation; as the caller's workflow below, read from the target while that is kept."""
    caller_namespace: str | None = None
    caller_workflow_id: str | None = None
    caller_run_id: str | None = None


class Deliveries:
    """The deliveries of one handler namespace."""

    def __init__(self, *, client: Client) -> None:
        self._client = client

    async def read_all(self, states: Collection[DeliveryState], *, limit: int | None = None) -> list[DeliveryReport]:
        """Newest first, each delivery once."""
        # Visibility lags, and lists older runs too: it only proposes, the report decides.
        spelled = {status: status.name.title().replace("_", "") for status in WorkflowExecutionStatus}
        statuses = ", ".join(f'"{name}"' for status, name in spelled.items() if DeliveryState.of(status) in states)
        query = f'WorkflowType = "{DELIVERY_WORKFLOW}" AND ExecutionStatus IN ({statuses})'
        rows = [row async for row in self._client.list_workflows(query)]
        ids = list(dict.fromkeys(row.id for row in sorted(rows, key=lambda row: row.start_time, reverse=True)))
        reports: list[DeliveryReport] = []
        while ids and (limit is None or len(reports) < limit):
            read = await asyncio.gather(*map(self._read, ids[:_AT_ONCE]))
            reports += [each for each in read if each is not None and each.state in states]
            del ids[:_AT_ONCE]
        return reports[:limit]

    async def read(self, delivery_id: str) -> DeliveryReport:
        """Raises CommandError where there is none."""
        report = await self._read(delivery_id)
        if report is None:
            where = f"namespace {self._client.namespace}: `deliveries list --state all` names those that are kept"
            message = f"no delivery {plain(delivery_id)} in {where}"
            raise CommandError(message)
        return report

    async def redeliver(self, delivery_id: str) -> str:
        """Run a failed delivery again: same id, same content, signed anew. Returns the new run's id.

        Raises:
            CommandError: There is none, or it has not failed.
            temporalio.service.RPCError: ALREADY_EXISTS: somebody else was faster.
        """
        report = await self.read(delivery_id)
        if report.state is DeliveryState.RUNNING:
            message = f"{delivery_id} is still running: it tries again by itself, `deliveries show` tells when"
            raise CommandError(message)
        if report.state is DeliveryState.DELIVERED:
            message = f"{delivery_id} is already delivered: there is nothing to do"
            raise CommandError(message)
        handle = self._client.get_workflow_handle(delivery_id, run_id=report.run_id)
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
        return (await self._client.workflow_service.start_workflow_execution(request, retry=True)).run_id

    async def _read(self, delivery_id: str) -> DeliveryReport | None:
        try:
            described = await self._client.get_workflow_handle(delivery_id).describe()
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        if described.workflow_type != DELIVERY_WORKFLOW:
            return None
        handle = self._client.get_workflow_handle(described.id, run_id=described.run_id)
        events = (await handle.fetch_history()).events
        attempts = max(event.activity_task_started_event_attributes.attempt for event in events)
        outcome, next_try = outcome_of(events[-1]), None
        failure = None if outcome is None else outcome.failure
        for pending in described.raw_description.pending_activities:
            # Between two attempts Temporal counts the next one already.
            is_waiting = pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
            attempts = pending.attempt - is_waiting
            # A terminated run lists its activity still; what ended the run is said by its closing event.
            if outcome is None:
                failure = pending.last_failure if pending.HasField("last_failure") else None
                if pending.HasField("next_attempt_schedule_time"):
                    next_try = pending.next_attempt_schedule_time.ToDatetime(UTC)
        return DeliveryReport(
            id=described.id,
            run_id=described.run_id,
            state=DeliveryState.of(described.status),
            attempts=attempts,
            last_error=None if failure is None else await self._error(failure),
            next_try=next_try,
            started=described.start_time,
            closed=described.close_time,
            **await self._content(events[0].workflow_execution_started_event_attributes.input.payloads[0]),
        )

    async def _content(self, payload: Payload) -> dict[str, Any]:
        try:
            [delivery] = await self._client.data_converter.decode([payload], [Delivery])
        except Exception:  # noqa: BLE001 - made by a codec that we do not have: listed all the same
            return {}
        content = {
            "caller": delivery.caller,
            "request_id": delivery.request_id,
            "operation_state": delivery.state,
            "outcome_time": datetime.fromtimestamp(delivery.close_time_ms / 1000, UTC),
            "deadline": datetime.fromtimestamp(delivery.deadline_ms / 1000, UTC),
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
        content["operation"] = f"{call.service}/{call.operation}"
        names = ("caller_namespace", "caller_workflow_id", "caller_run_id")
        return content | {name: getattr(call, name) or None for name in names}

    async def _error(self, failure: Failure) -> str:
        try:
            error = await self._client.data_converter.decode_failure(failure)
        except Exception:  # noqa: BLE001 - as for the content
            return "unreadable"
        # An ActivityError says only that an activity failed. And no operation is meant: that has ended as it did.
        cause = error.__cause__ if isinstance(error, ActivityError) and error.__cause__ else error
        return plain(str(cause).removeprefix("operation "))


def plain(text: str) -> str:
    """Foreign text as one bounded line that is safe for a terminal; without URLs, because ours carry tokens."""
    return " ".join(redacted(text, 1000).split())
