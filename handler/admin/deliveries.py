"""Reports of the deliveries of a namespace, and the running of failed ones again.

A delivery's state is what Temporal says of its workflow, and its facts are in the memo of that workflow; no other state
is kept. A report has no field for a callback URL, a header or a token, so that none can be printed.
"""

import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType, PendingActivityState
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionRequest,
    DescribeWorkflowExecutionResponse,
    ListWorkflowExecutionsRequest,
    ResetWorkflowExecutionRequest,
)
from temporalio.client import Client
from temporalio.exceptions import ActivityError
from temporalio.service import RPCError, RPCStatusCode

from bridge.admin.command import CommandError
from bridge.security.redaction import redacted
from handler.delivery.close_event import read_close_event
from handler.delivery.records import MEMO_KEY
from handler.delivery.workflow import DELIVERY_WORKFLOW

_PAGE = 100
_COMPLETED, _CONTINUED = 2, 6
_ENDED = frozenset({3, 4, 5, 7})
"""Failed, canceled, terminated, timed out: numbers of `WorkflowExecutionStatus`. Newer servers know more states."""


class DeliveryState(str, Enum):
    """How a delivery stands."""

    RUNNING = "running"
    """Tries again by itself."""
    PAUSED = "paused"
    """An operator has paused its workflow, or a newer server has a state that this release does not know."""
    FAILED = "failed"
    """Refused, out of time, or stopped by an operator: waits to be run again."""
    DELIVERED = "delivered"
    """The receiver took it, or said that no call waits any more."""

    @classmethod
    def of(cls, status: int) -> "DeliveryState":
        """By what Temporal says of the workflow, as the number of a `WorkflowExecutionStatus`."""
        if status in _ENDED:
            return cls.FAILED
        return {1: cls.RUNNING, _COMPLETED: cls.DELIVERED}.get(status, cls.PAUSED)


@dataclass(frozen=True, kw_only=True)
class DeliveryReport:
    """One delivery by its newest run. Field names are those of the JSON; what cannot be read is None."""

    id: str
    run_id: str
    state: DeliveryState
    started: datetime
    """This run."""
    closed: datetime | None
    caller: str | None = None
    request_id: str | None = None
    operation: str | None = None
    """Service/operation."""
    deadline: datetime | None = None
    target_workflow_id: str | None = None
    target_run_id: str | None = None
    caller_namespace: str | None = None
    caller_workflow_id: str | None = None
    caller_run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class DeliveryDetails(DeliveryReport):
    """A delivery with what only its own description holds."""

    attempts: int | None
    """Begun in this run; None where Temporal does not say any more."""
    last_error: str | None
    next_try: datetime | None
    """None while an attempt is under way."""


class Deliveries:
    """The deliveries of one handler namespace."""

    def __init__(self, *, client: Client) -> None:
        self._client = client

    async def read_all(self, states: Collection[DeliveryState], *, limit: int | None = None) -> list[DeliveryReport]:
        """Newest first, each delivery once, by one visibility query."""
        reports: dict[str, DeliveryReport] = {}
        async for row in self._rows(f'WorkflowType = "{DELIVERY_WORKFLOW}"'):
            # A reset leaves the run that it replaces; the newest run is the delivery.
            if row.execution.workflow_id not in reports:
                reports[row.execution.workflow_id] = DeliveryReport(**await self._facts(row))
            wanted = [each for each in reports.values() if each.state in states]
            if limit is not None and len(wanted) >= limit:
                break
        return [each for each in reports.values() if each.state in states][:limit]

    async def read(self, delivery_id: str) -> DeliveryDetails:
        """Raises CommandError where there is none."""
        described = await self._describe(delivery_id)
        info = described.workflow_execution_info
        facts = await self._facts(info)
        attempts, next_try, failure = None, None, None
        if facts["state"] is DeliveryState.FAILED:
            closed = await read_close_event(self._client, delivery_id, info.execution.run_id)
            failure = closed.outcome.failure if closed is not None else None
        elif facts["closed"] is None:
            attempts = 0
            for pending in described.pending_activities:
                # Between two attempts Temporal counts the next one already.
                is_waiting = pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED
                attempts = pending.attempt - is_waiting
                failure = pending.last_failure if pending.HasField("last_failure") else None
                if pending.HasField("next_attempt_schedule_time"):
                    next_try = pending.next_attempt_schedule_time.ToDatetime(UTC)
        last_error = None if failure is None else await self._error(failure)
        return DeliveryDetails(**facts, attempts=attempts, last_error=last_error, next_try=next_try)

    async def redeliver(self, delivery_id: str) -> str:
        """Run a failed delivery again: Temporal's reset of its workflow. Returns the new run's id.

        Raises:
            CommandError: There is none, or it has not failed.
        """
        described = await self._describe(delivery_id)
        state = DeliveryState.of(described.workflow_execution_info.status)
        if state is DeliveryState.DELIVERED:
            message = f"{delivery_id} is already delivered: there is nothing to do"
            raise CommandError(message)
        if state is not DeliveryState.FAILED:
            message = f"{delivery_id} is still {state.value}: `deliveries show` says when it tries again"
            raise CommandError(message)
        run_id = described.workflow_execution_info.execution.run_id
        handle = self._client.get_workflow_handle(delivery_id, run_id=run_id)
        async for event in handle.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                break
        else:
            message = f"{delivery_id} was stopped before any worker ran it: there is nothing to go on from"
            raise CommandError(message)
        reset = ResetWorkflowExecutionRequest(
            namespace=self._client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=delivery_id, run_id=run_id),
            reason="redeliver",
            workflow_task_finish_event_id=event.event_id,
            # The same for all who repeat this run, so that only one of them does.
            request_id=str(uuid.uuid5(uuid.NAMESPACE_OID, run_id)),
        )
        return (await self._client.workflow_service.reset_workflow_execution(reset, retry=True)).run_id

    async def _rows(self, query: str) -> AsyncIterator[WorkflowExecutionInfo]:
        # The raw call: the SDK's own fails on a status that it does not know.
        request = ListWorkflowExecutionsRequest(namespace=self._client.namespace, query=query, page_size=_PAGE)
        while True:
            page = await self._client.workflow_service.list_workflow_executions(request, retry=True)
            for row in page.executions:
                yield row
            if not page.next_page_token:
                return
            request.next_page_token = page.next_page_token

    async def _describe(self, delivery_id: str) -> DescribeWorkflowExecutionResponse:
        request = DescribeWorkflowExecutionRequest(
            namespace=self._client.namespace, execution=WorkflowExecution(workflow_id=delivery_id)
        )
        try:
            described = await self._client.workflow_service.describe_workflow_execution(request, retry=True)
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise
        else:
            if described.workflow_execution_info.type.name == DELIVERY_WORKFLOW:
                return described
        where = f"namespace {self._client.namespace}: `deliveries list --state all` names those that are kept"
        message = f"no delivery {plain(delivery_id)} in {where}"
        raise CommandError(message)

    async def _facts(self, info: WorkflowExecutionInfo) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "id": info.execution.workflow_id,
            "run_id": info.execution.run_id,
            "state": DeliveryState.of(info.status),
            "started": info.start_time.ToDatetime(UTC),
            "closed": info.close_time.ToDatetime(UTC) if info.HasField("close_time") else None,
        }
        try:
            [memo] = await self._client.data_converter.decode([info.memo.fields[MEMO_KEY]])
        except Exception:  # noqa: BLE001 - made by a codec that we do not have: listed all the same
            return facts
        deadline = datetime.fromtimestamp(memo["deadline_ms"] / 1000, UTC)
        kept = {name: value or None for name, value in memo.items() if name in DeliveryReport.__dataclass_fields__}
        return facts | kept | {"deadline": deadline}

    async def _error(self, failure: Failure) -> str:
        try:
            error = await self._client.data_converter.decode_failure(failure)
        except Exception:  # noqa: BLE001 - as for the memo
            return "unreadable"
        # An ActivityError says only that an activity failed. And no operation is meant: that has ended as it did.
        cause = error.__cause__ if isinstance(error, ActivityError) and error.__cause__ else error
        return plain(str(cause).removeprefix("operation "))


def plain(text: str) -> str:
    """Foreign text as one bounded line that is safe for a terminal; without URLs, because ours carry tokens."""
    return " ".join(redacted(text, 1000).split())
