"""Reports of the deliveries of a namespace, and the repetition of failed deliveries.

A delivery's state is the status of its workflow, and its facts are in the memo of that workflow. No other state is
kept. A report has no field for a callback URL, a header or a token, so that none can be printed.
"""

import uuid
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionResponse,
    ResetWorkflowExecutionRequest,
)
from temporalio.client import Client
from temporalio.exceptions import ActivityError

from bridge.errors import BridgeError
from bridge.security.redaction import plain
from bridge.temporal.executions import describe, list_runs
from bridge.temporal.pending_activity import attempts_of
from handler.delivery.close_event import read_close_event
from handler.delivery.records import MEMO_KEY
from handler.delivery.workflow import DELIVERY_WORKFLOW

COLUMNS = "id state operation target_workflow_id target_run_id caller started deadline"
"""Fields of a delivery that a list shows."""
_COMPLETED = 2
_ENDED = frozenset({3, 4, 5, 7})
"""Failed, canceled, terminated, timed out: numbers of `WorkflowExecutionStatus`. Newer servers have more statuses."""


class DeliveryState(str, Enum):
    """State of a delivery."""

    RUNNING = "running"
    """The delivery workflow repeats its attempts by itself."""
    PAUSED = "paused"
    """An operator has paused its workflow, or a newer server has a state that this release does not know."""
    FAILED = "failed"
    """Refused, out of time, or stopped by an operator. An operator may run it again."""
    DELIVERED = "delivered"
    """The receiver accepted it, or answered that no call waits any more."""

    @classmethod
    def of(cls, status: int) -> "DeliveryState":
        """Return the state for the workflow's *status*, the number of a `WorkflowExecutionStatus`."""
        if status in _ENDED:
            return cls.FAILED
        return {1: cls.RUNNING, _COMPLETED: cls.DELIVERED}.get(status, cls.PAUSED)


UNDELIVERED = (DeliveryState.RUNNING, DeliveryState.PAUSED, DeliveryState.FAILED)
"""States of the deliveries that a list shows by default."""
STATES = {each.value: (each,) for each in DeliveryState} | {"all": tuple(DeliveryState)}
"""States to choose from."""


@dataclass(frozen=True, kw_only=True)
class DeliveryReport:
    """One delivery by its newest run. Field names are those of the JSON; a fact that cannot be read is None."""

    id: str
    """Id of the delivery, which is the id of its workflow."""
    run_id: str
    """Newest run of the delivery workflow."""
    state: DeliveryState
    """By the status of that run."""
    started: datetime
    """Start of that run."""
    closed: datetime | None
    """End of that run; None while it is open."""
    caller: str | None = None
    """Name of the caller in the handler's settings."""
    request_id: str | None = None
    """Request id of the call whose outcome is delivered."""
    operation: str | None = None
    """Service/operation."""
    deadline: datetime | None = None
    """Instant at which the attempts end."""
    target_workflow_id: str | None = None
    """Workflow whose outcome is delivered."""
    target_run_id: str | None = None
    """Its run, whose close event holds the outcome."""
    caller_namespace: str | None = None
    """Namespace of the workflow that waits, as the caller named it."""
    caller_workflow_id: str | None = None
    """Id of the workflow that waits."""
    caller_run_id: str | None = None
    """Run of the workflow that waits."""


@dataclass(frozen=True, kw_only=True)
class DeliveryDetails(DeliveryReport):
    """A report with facts that only a describe of the delivery workflow returns."""

    attempts: int | None
    """Number of attempts begun in this run; None if the run has closed."""
    last_error: str | None
    """Why the last attempt or the delivery failed, as one line; None if nothing failed."""
    next_try: datetime | None
    """When the next attempt begins; None while an attempt runs."""


class DeliveryError(BridgeError):
    """There is no such delivery, or its state does not allow what was asked for. The text says which."""


class Deliveries:
    """The deliveries of one handler namespace."""

    def __init__(self, *, client: Client) -> None:
        self._client = client

    async def read_all(
        self, states: Collection[DeliveryState], *, caller: str | None = None, limit: int | None = None
    ) -> list[DeliveryReport]:
        """Return the deliveries in *states*, newest first and each once, by one visibility query.

        With *caller* only those to this caller.
        """
        seen: set[str] = set()
        wanted: list[DeliveryReport] = []
        async for row in list_runs(self._client, f'WorkflowType = "{DELIVERY_WORKFLOW}"'):
            # A reset keeps the replaced run in the list. Only the newest run counts.
            is_newest = row.execution.workflow_id not in seen
            seen.add(row.execution.workflow_id)
            if is_newest and DeliveryState.of(row.status) in states:
                report = DeliveryReport(**await self._facts(row))
                if caller in {None, report.caller}:
                    wanted.append(report)
            if len(wanted) == limit:
                break
        return wanted

    async def read_open(self) -> AsyncIterator[DeliveryReport]:
        """Yield the deliveries whose workflow runs, newest first."""
        query = f'WorkflowType = "{DELIVERY_WORKFLOW}" AND ExecutionStatus = "Running"'
        async for row in list_runs(self._client, query):
            yield DeliveryReport(**await self._facts(row))

    async def read(self, delivery_id: str) -> DeliveryDetails:
        """Return one delivery.

        Raises:
            DeliveryError: There is no such delivery.
        """
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
                attempts, next_try, failure = attempts_of(pending)
        last_error = None if failure is None else await self._error(failure)
        return DeliveryDetails(**facts, attempts=attempts, last_error=last_error, next_try=next_try)

    async def redeliver(self, delivery_id: str) -> str:
        """Run a failed delivery again by a reset of its workflow. Returns the new run's id.

        Raises:
            DeliveryError: There is no such delivery, or it has not failed.
        """
        described = await self._describe(delivery_id)
        state = DeliveryState.of(described.workflow_execution_info.status)
        if state is DeliveryState.DELIVERED:
            message = f"{delivery_id} is already delivered: there is nothing to do"
            raise DeliveryError(message)
        if state is not DeliveryState.FAILED:
            message = f"{delivery_id} is still {state.value} and repeats its attempts by itself"
            raise DeliveryError(message)
        run_id = described.workflow_execution_info.execution.run_id
        handle = self._client.get_workflow_handle(delivery_id, run_id=run_id)
        async for event in handle.fetch_history_events():
            if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                break
        else:
            message = f"{delivery_id} was stopped before a worker ran it: it cannot be reset"
            raise DeliveryError(message)
        reset = ResetWorkflowExecutionRequest(
            namespace=self._client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=delivery_id, run_id=run_id),
            reason="redeliver",
            workflow_task_finish_event_id=event.event_id,
            # Derived from the run: of several resets of one run, the server carries out only the first.
            request_id=str(uuid.uuid5(uuid.NAMESPACE_OID, run_id)),
        )
        return (await self._client.workflow_service.reset_workflow_execution(reset, retry=True)).run_id

    async def _describe(self, delivery_id: str) -> DescribeWorkflowExecutionResponse:
        described = await describe(self._client, delivery_id)
        if described is not None and described.workflow_execution_info.type.name == DELIVERY_WORKFLOW:
            return described
        kept = "`deliveries list --state all` shows every delivery that is kept, with its state"
        message = f"no delivery {plain(delivery_id)} in namespace {self._client.namespace}; {kept}"
        raise DeliveryError(message)

    async def _facts(self, info: WorkflowExecutionInfo) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "id": info.execution.workflow_id,
            "run_id": info.execution.run_id,
            "state": DeliveryState.of(info.status),
            "started": info.start_time.ToDatetime(UTC),
            "closed": info.close_time.ToDatetime(UTC) if info.HasField("close_time") else None,
        }
        try:
            [memo] = await self._client.data_converter.decode([info.memo.fields[MEMO_KEY]], [dict])
            deadline = datetime.fromtimestamp(memo["deadline_ms"] / 1000, UTC)
        except Exception:  # noqa: BLE001 - another program's, or by a codec that we do not have: list it all the same
            return facts
        kept = {name: value or None for name, value in memo.items() if name in DeliveryReport.__dataclass_fields__}
        return facts | kept | {"deadline": deadline}

    async def _error(self, failure: Failure) -> str:
        try:
            error = await self._client.data_converter.decode_failure(failure)
        except Exception:  # noqa: BLE001 - as for the memo
            return "unreadable"
        # An ActivityError only states that an activity failed; its cause has the reason.
        cause = error.__cause__ if isinstance(error, ActivityError) and error.__cause__ else error
        return plain(str(cause).removeprefix("operation "))
