"""Reports of the runs that calls started: who called, how a run ended, and how its outcome is delivered."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client

from bridge.errors import UnavailableError
from bridge.protocol.link import WorkflowRef
from bridge.temporal.executions import describe_existing
from handler.delivery.calls import read_memo
from handler.delivery.records import delivery_id
from handler.reports.deliveries import Deliveries, DeliveryDetails, DeliveryError
from handler.settings import HandlerSettings

_STATES = dict(
    enumerate(("running", "completed", "failed", "canceled", "terminated", "continued", "timed out", "paused"), 1)
)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """One run of a target. Field names are those of the JSON; a fact that is unknown or cannot be read is None."""

    workflow_id: str
    """Id of the target."""
    run_id: str
    """Its run."""
    state: str
    """Status of the run in Temporal, "status N" if this release does not know it."""
    started: datetime
    """When the run started."""
    closed: datetime | None
    """When the run closed."""
    caller: str | None = None
    """Name of the caller in the handler's settings."""
    operation: str | None = None
    """Service/operation."""
    request_id: str | None = None
    """Request id of the call that started the run."""
    called_by: str | None = None
    """Namespace and id of the workflow that called, as the caller named it."""
    link: str | None = None
    """Page of that workflow in the caller's UI, if the settings name the UI."""
    deadline: datetime | None = None
    """Instant at which attempts to deliver end."""


async def report_of(client: Client, settings: HandlerSettings | None, info: WorkflowExecutionInfo) -> RunReport:
    """Return the report of the run that *info* describes."""
    facts: dict[str, Any] = {
        "workflow_id": info.execution.workflow_id,
        "run_id": info.execution.run_id,
        "state": _STATES.get(info.status, f"status {info.status}"),
        "started": info.start_time.ToDatetime(UTC),
        "closed": info.close_time.ToDatetime(UTC) if info.HasField("close_time") else None,
    }
    try:
        call = await read_memo(client.data_converter, info)
        deadline = None if call is None else datetime.fromtimestamp(call.deadline_ms / 1000, UTC)
    except (UnavailableError, ValueError, OverflowError, OSError):
        # The memo is another program's, or encoded by a codec that we do not have: show the run all the same.
        return RunReport(**facts)
    if call is None:
        return RunReport(**facts)
    source = WorkflowRef(
        namespace=call.caller_namespace, workflow_id=call.caller_workflow_id, run_id=call.caller_run_id
    )
    base = settings.caller(call.caller).ui_url if settings is not None else None
    return RunReport(
        **facts,
        caller=call.caller,
        operation=f"{call.service}/{call.operation}",
        request_id=call.request_id,
        called_by=f"{source.namespace}/{source.workflow_id}" if source.workflow_id else None,
        link=source.ui_url(base) if source.workflow_id and base is not None else None,
        deadline=deadline,
    )


async def read_run_and_delivery(
    client: Client, settings: HandlerSettings | None, workflow_id: str, run_id: str = ""
) -> tuple[RunReport, DeliveryDetails | None]:
    """Return one run and the delivery of its outcome. Without *run_id*: the newest run.

    The delivery is None if one request, a renewal or nothing has delivered the outcome. No record says which.

    Raises:
        temporalio.service.RPCError: There is no such run, or Temporal did not answer.
    """
    described = await describe_existing(client, workflow_id, run_id)
    report = await report_of(client, settings, described.workflow_execution_info)
    name = delivery_id(report.caller or "", report.request_id or "", report.run_id)
    try:
        return report, await Deliveries(client=client).read(name)
    except DeliveryError:
        return report, None
