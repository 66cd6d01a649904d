"""The commands `callback-bridge calls list` and `show`, as lines or as JSON."""

import sys
from datetime import UTC, datetime

from cyclopts import App

from bridge.admin.command import CommandError, connected
from bridge.admin.output import JsonOutput, Limit, details, print_list, to_json
from caller.reports.calls import Calls
from caller.settings import CallerSettings

calls = App(
    name="calls",
    help="See the calls of the caller's workflows: which wait, since when, for which target. Connects as the receiver "
    "does; BRIDGE_CONFIG is needed only for links and for a data converter.",
)


@calls.command(name="list")
async def list_(
    *,
    query: str = 'ExecutionStatus = "Running"',
    endpoint: str | None = None,
    limit: Limit = 100,
    as_json: JsonOutput = False,
) -> None:
    """List the calls that wait now.

    Temporal's visibility does not know which workflows have calls. This reads each workflow that the query finds, the
    newest first. Name those that may wait: --query 'WorkflowType = "OrderWorkflow" AND ExecutionStatus = "Running"'.

    Args:
        query: Temporal's list filter of the workflows to read.
        endpoint: Only calls through this endpoint.
        limit: Number of workflows to read.
    """
    async with connected(CallerSettings) as (client, settings):
        read, waiting = await Calls(client=client, settings=settings).waiting(query, limit=limit)
    shown = [each for each in waiting if endpoint in {None, each.endpoint}]
    columns = "workflow_id endpoint operation target attempts scheduled deadline"
    print_list(shown, columns, as_json=as_json, searched=f"in namespace {client.namespace} by {query}")
    if read == limit:
        print(f"read the first {read} workflows of the query; --limit reads more", file=sys.stderr)


@calls.command
async def show(
    workflow_id: str, /, *, run_id: str = "", request_id: str | None = None, as_json: JsonOutput = False
) -> None:
    """Show the calls of one workflow: target, last error, next try, and the times in their order.

    Args:
        workflow_id: Id of the calling workflow.
        run_id: Its run. By default the newest.
        request_id: Only this call.
    """
    async with connected(CallerSettings) as (client, settings):
        reports = await Calls(client=client, settings=settings).of_run(workflow_id, run_id)
    shown = [each for each in reports if request_id in {None, each.request_id}]
    if not shown:
        message = "no such call in this run"
        raise CommandError(message)
    now = datetime.now(UTC)
    print(to_json(shown) if as_json else "\n\n".join(details(each, now=now) for each in shown))
