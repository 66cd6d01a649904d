"""Reads the calls of workflows from Temporal: for the commands, and for the details that Temporal's UI shows.

A call is an activity of the calling run. History has its schedule and its end, with the receipt of the outcome as the
identity of the close event; describe has its attempts. Nothing else is stored. A report has no field for a token or a
callback URL, so that none can be printed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from temporalio.api.common.v1 import Payloads
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo, WorkflowExecutionInfo
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.service import RPCError

from bridge.protocol.link import WorkflowRef
from bridge.security.redaction import markdown_code, plain
from bridge.temporal.executions import describe_existing, is_open, list_runs
from bridge.temporal.pending_activity import attempts_of
from bridge.temporal.rpc_status import is_missing
from bridge.workflow.call import START_OPERATION_ACTIVITY, OperationCall
from caller.receipt import CLOSINGS, event_attributes, read_receipt
from caller.settings import CallerSettings
from caller.waiting.attempt import waiting_converter
from caller.waiting.started_operation import StartedOperation

_SHOWN = 20
"""Number of calls that the details of a workflow show."""


@dataclass(frozen=True, kw_only=True)
class CallReport:
    """One call. Field names are those of the JSON; a fact that is unknown or cannot be read is None."""

    workflow_id: str
    """Workflow that calls."""
    run_id: str
    """Its run."""
    request_id: str
    """Request id of the call, which is the id of the waiting activity."""
    state: str
    """"waiting", or how the wait ended: "succeeded", "failed", "canceled", "timed out", "stopped"."""
    endpoint: str | None = None
    """Endpoint in the caller's settings."""
    operation: str | None = None
    """Service/operation."""
    scheduled: datetime
    """When the workflow scheduled the call, or scheduled it again."""
    deadline: datetime | None = None
    """When the caller stops waiting."""
    attempts: int = 0
    """Number of attempts begun: the first start and the renewals. Counts anew after a reset of the activity."""
    started: datetime | None = None
    """When the handler answered that the operation runs; None if it answered at once or the answer is not recorded."""
    target: str | None = None
    """Workflow in the handler's namespace, once the handler has named it."""
    link: str | None = None
    """Page of the target in the handler's UI, if the settings name the UI."""
    last_error: str | None = None
    """Why the last attempt or the call failed, as one line."""
    next_try: datetime | None = None
    """When the next attempt begins, if one is due."""
    closed: datetime | None = None
    """When the wait ended."""


_NO_OUTCOME = {
    "activity_task_failed_event_attributes": "stopped",
    "activity_task_timed_out_event_attributes": "timed out",
    "activity_task_canceled_event_attributes": "canceled",
}
"""States of waits that ended without an outcome, by the kind of their last event."""


@dataclass(kw_only=True)
class _Wait:
    """The events of one waiting activity."""

    opening: HistoryEvent
    """Its schedule."""
    begun: HistoryEvent | None = None
    """The start of its last attempt, which history records only once the activity has ended."""
    closing: HistoryEvent | None = None
    """Its end."""


class Calls:
    """The calls of workflows in one namespace."""

    def __init__(self, *, client: Client, settings: CallerSettings | None) -> None:
        """Without *settings*, reports have no links to the handlers' UIs."""
        self._client = client
        self._settings = settings

    async def waiting(self, query: str, *, limit: int) -> tuple[int, list[CallReport]]:
        """Read the first *limit* workflows that *query* finds. Returns how many it read, and their waiting calls."""
        read, found = 0, list[CallReport]()
        async for row in list_runs(self._client, query):
            read += 1
            try:
                reports = await self.of_run(row.execution.workflow_id, row.execution.run_id)
            except RPCError as error:
                # Visibility still shows a run for a while after it was deleted.
                if not is_missing(error):
                    raise
                reports = []
            found += [each for each in reports if each.state == "waiting"]
            if read == limit:
                break
        return read, found

    async def of_run(self, workflow_id: str, run_id: str = "") -> list[CallReport]:
        """Return the calls of one run in the order of their schedules. Without *run_id*: of the newest run.

        Raises:
            temporalio.service.RPCError: There is no such run, or Temporal did not answer.
        """
        described = await describe_existing(self._client, workflow_id, run_id)
        info = described.workflow_execution_info
        pending = {each.activity_id: each for each in described.pending_activities} if is_open(info) else {}
        waits: dict[int, _Wait] = {}
        handle = self._client.get_workflow_handle(workflow_id, run_id=info.execution.run_id)
        async for event in handle.fetch_history_events():
            if event.HasField("activity_task_scheduled_event_attributes"):
                if event.activity_task_scheduled_event_attributes.activity_type.name == START_OPERATION_ACTIVITY:
                    waits[event.event_id] = _Wait(opening=event)
            elif event.HasField("activity_task_started_event_attributes"):
                if wait := waits.get(event.activity_task_started_event_attributes.scheduled_event_id):
                    wait.begun = event
            elif event.event_type in CLOSINGS and (wait := waits.get(event_attributes(event).scheduled_event_id)):
                wait.closing = event
        return [await self._report(info, wait, pending) for wait in waits.values()]

    async def details(self, workflow_id: str, run_id: str) -> str:
        """Return Markdown that shows the run's calls and their targets; empty without calls."""
        lines = [_markdown(each) for each in reversed(await self.of_run(workflow_id, run_id))]
        more = [f"- and {len(lines) - _SHOWN} earlier calls"] if len(lines) > _SHOWN else []
        return "\n".join(["Calls, the newest first:", "", *lines[:_SHOWN], *more]) if lines else ""

    async def _report(
        self, info: WorkflowExecutionInfo, wait: _Wait, pending: Mapping[str, PendingActivityInfo]
    ) -> CallReport:
        run, opening = info.execution, wait.opening.activity_task_scheduled_event_attributes
        converter = waiting_converter(
            self._client.data_converter,
            WorkflowRef(namespace=self._client.namespace, workflow_id=run.workflow_id, run_id=run.run_id),
            info.type.name,
            task_queue=opening.task_queue.name,
            request_id=opening.activity_id,
        )
        facts: dict[str, Any] = {
            "workflow_id": run.workflow_id,
            "run_id": run.run_id,
            "request_id": opening.activity_id,
            "state": "stopped",
            "scheduled": wait.opening.event_time.ToDatetime(UTC),
        }
        if isinstance(call := await _first(converter, opening.input, OperationCall), OperationCall):
            operation = f"{call.service}/{call.operation}"
            facts |= {"endpoint": call.endpoint, "operation": operation, "deadline": call.deadline}
        if wait.begun is not None:
            facts["attempts"] = wait.begun.activity_task_started_event_attributes.attempt
        if wait.closing is not None:
            facts |= await self._end(wait.closing, facts.get("endpoint"), converter)
        elif activity := pending.get(opening.activity_id):
            facts |= await _progress(activity, converter)
        return CallReport(**facts)

    async def _end(self, closing: HistoryEvent, endpoint: str | None, converter: DataConverter) -> dict[str, Any]:
        """Return what *closing* shows about the call, by names of `CallReport`."""
        failure = getattr(event_attributes(closing), "failure", None)
        # The wrapper says only that the call failed; its cause has the reason.
        failure = failure.cause if failure is not None and failure.HasField("cause") else failure
        facts = {"closed": closing.event_time.ToDatetime(UTC), "last_error": await _error(converter, failure)}
        if (receipt := read_receipt(closing)) is None:
            return facts | {"state": _NO_OUTCOME.get(closing.WhichOneof("attributes") or "", "stopped")}
        facts["state"] = receipt.state
        if (target := receipt.target) is not None:
            base = self._settings.ui_url(endpoint) if endpoint is not None and self._settings is not None else None
            facts["target"] = f"{target.namespace}/{target.workflow_id}"
            facts["link"] = None if base is None else target.ui_url(base)
        return facts


async def _progress(activity: PendingActivityInfo, converter: DataConverter) -> dict[str, Any]:
    """Return what the pending *activity* shows about the call, by names of `CallReport`."""
    attempts, next_try, failure = attempts_of(activity)
    facts: dict[str, Any] = {"state": "waiting", "attempts": attempts, "next_try": next_try}
    facts["last_error"] = await _error(converter, failure)
    known = StartedOperation.from_details([await _first(converter, activity.heartbeat_details, dict)])
    if known is not None:
        facts |= {"target": known.target or None, "link": known.page or None, "started": known.started}
    return facts


async def _first(converter: DataConverter, payloads: Payloads, kind: type) -> Any:
    """The first of *payloads* as *kind*; None without payloads, or if it was encoded by a codec that we do not have."""
    try:
        return (await converter.decode(payloads.payloads[:1], [kind]) or [None])[0]
    except Exception:  # noqa: BLE001 - any error of a team's codec and converter: show the call all the same
        return None


async def _error(converter: DataConverter, failure: Failure | None) -> str | None:
    if failure is None:
        return None
    try:
        return plain(str(await converter.decode_failure(failure)))
    except Exception:  # noqa: BLE001 - as above
        return "unreadable"


def _markdown(report: CallReport) -> str:
    call = markdown_code(f"{report.endpoint}: {report.operation}" if report.endpoint else report.request_id)
    target = "the handler named no workflow" if report.target is None else markdown_code(report.target)
    return f"- {call} {report.state}: " + (f"[{target}]({report.link})" if report.link else target)
