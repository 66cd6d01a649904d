"""The commands `callback-bridge runs list` and `show`: the targets of a handler's namespace, and who waits for them."""

import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

from cyclopts import App, Parameter, validators
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client

from bridge.admin.command import CommandError
from bridge.admin.output import JsonOutput, details, print_list, to_json
from bridge.errors import UnavailableError
from bridge.protocol.link import WorkflowRef
from bridge.runtime.temporal import list_runs
from handler.admin.command import connected
from handler.admin.deliveries import Deliveries
from handler.delivery.calls import read_memo
from handler.delivery.records import MEMO_KEY
from handler.settings import HandlerSettings

_STATES = dict(enumerate(("running", "completed", "failed", "canceled", "terminated", "continued", "timed out"), 1))

runs = App(
    name="runs",
    help="See the targets of the handler's namespace, and the calls that started them. Connects as the handler service "
    "does; BRIDGE_CONFIG is needed only for links and for a data converter.",
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


async def read_run(client: Client, settings: HandlerSettings | None, info: WorkflowExecutionInfo) -> dict[str, Any]:
    """Return the facts of a run, by the names of `RunReport`."""
    facts: dict[str, Any] = {
        "workflow_id": info.execution.workflow_id,
        "run_id": info.execution.run_id,
        "state": _STATES.get(info.status, f"status {info.status}"),
        "started": info.start_time.ToDatetime(UTC),
        "closed": info.close_time.ToDatetime(UTC) if info.HasField("close_time") else None,
    }
    try:
        call = await read_memo(client.data_converter, info)
    except UnavailableError:
        # The memo is encoded by a codec that we do not have: show the run all the same.
        return facts
    if call is None:
        return facts
    source = WorkflowRef(
        namespace=call.caller_namespace, workflow_id=call.caller_workflow_id, run_id=call.caller_run_id
    )
    base = settings.ui_url(call.caller) if settings is not None else None
    return facts | {
        "caller": call.caller,
        "operation": f"{call.service}/{call.operation}",
        "request_id": call.request_id,
        "called_by": f"{source.namespace}/{source.workflow_id}" if source.workflow_id else None,
        "link": source.ui_url(base) if source.workflow_id and base is not None else None,
        "deadline": datetime.fromtimestamp(call.deadline_ms / 1000, UTC),
    }


@runs.command(name="list")
async def list_(
    *,
    query: str = 'ExecutionStatus = "Running"',
    caller: str | None = None,
    operation: str | None = None,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 100,
    as_json: JsonOutput = False,
) -> None:
    """List runs that calls started, the newest first.

    Args:
        query: Temporal's list filter of the runs to read. By default those that run.
        caller: Only calls of this caller.
        operation: Only this operation, as Service/operation.
        limit: Number of runs to read.
    """
    shown: list[RunReport] = []
    read = 0
    async with connected() as (client, settings):
        async for row in list_runs(client, query):
            read += 1
            if MEMO_KEY in row.memo.fields:
                report = RunReport(**await read_run(client, settings, row))
                if caller in {None, report.caller} and operation in {None, report.operation}:
                    shown.append(report)
            if read == limit:
                break
    print_list(shown, "workflow_id state operation called_by caller started closed", as_json=as_json)
    if read == limit:
        print(f"read the first {read} runs of the query; --limit reads more", file=sys.stderr)


@runs.command
async def show(workflow_id: str, /, *, run_id: str = "", as_json: JsonOutput = False) -> None:
    """Show one run: who called, how its outcome is delivered, and the times in their order.

    Args:
        workflow_id: Id of the target.
        run_id: Its run. By default the newest.
    """
    execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
    async with connected() as (client, settings):
        request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
        described = await client.workflow_service.describe_workflow_execution(request, retry=True)
        report = RunReport(**await read_run(client, settings, described.workflow_execution_info))
        try:
            delivery = await Deliveries(client=client).read(f"bridge-delivery-{report.request_id}-{report.run_id}")
        except CommandError:
            # One request, a renewal or nothing has delivered the outcome. No record says which.
            delivery = None
    if as_json:
        print(to_json({"run": report, "delivery": delivery}))
        return
    now = datetime.now(UTC)
    print(details(report, now=now))
    print("\nno delivery workflow" if delivery is None else f"\n{details(delivery, now=now)}")
