"""The commands `callback-bridge runs list` and `show`: the targets of a handler's namespace, and who waits for them."""

import sys
from datetime import UTC, datetime

from cyclopts import App

from bridge.admin.command import connected
from bridge.admin.output import JsonOutput, Limit, details, print_list, to_json
from bridge.temporal.executions import list_runs
from handler.delivery.records import MEMO_KEY
from handler.reports.runs import RunReport, read_run_and_delivery, report_of
from handler.settings import HandlerSettings

runs = App(
    name="runs",
    help="See the targets of the handler's namespace, and the calls that started them. Connects as the handler service "
    "does; BRIDGE_CONFIG is needed only for links and for a data converter.",
)


@runs.command(name="list")
async def list_(
    *,
    query: str = 'ExecutionStatus = "Running"',
    caller: str | None = None,
    operation: str | None = None,
    limit: Limit = 100,
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
    async with connected(HandlerSettings) as (client, settings):
        async for row in list_runs(client, query):
            read += 1
            if MEMO_KEY in row.memo.fields:
                report = await report_of(client, settings, row)
                if caller in {None, report.caller} and operation in {None, report.operation}:
                    shown.append(report)
            if read == limit:
                break
    searched = f"in namespace {client.namespace} by {query}"
    print_list(shown, "workflow_id state operation called_by caller started closed", as_json=as_json, searched=searched)
    if read == limit:
        print(f"read the first {read} runs of the query; --limit reads more", file=sys.stderr)


@runs.command
async def show(workflow_id: str, /, *, run_id: str = "", as_json: JsonOutput = False) -> None:
    """Show one run: who called, how its outcome is delivered, and the times in their order.

    Args:
        workflow_id: Id of the target.
        run_id: Its run. By default the newest.
    """
    async with connected(HandlerSettings) as (client, settings):
        report, delivery = await read_run_and_delivery(client, settings, workflow_id, run_id)
    if as_json:
        print(to_json({"run": report, "delivery": delivery}))
        return
    now = datetime.now(UTC)
    print(details(report, now=now))
    print("\nno delivery workflow" if delivery is None else f"\n{details(delivery, now=now)}")
