"""The pages of the receiver's console: the calls that wait, and the calls of one workflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temporalio.client import Client

from bridge.console import Pages
from caller.reports.calls import Calls
from caller.settings import CallerSettings

_READ = 50


def pages(client: Client, settings: CallerSettings) -> Pages:
    """Return the pages of the caller's namespace."""
    calls = Calls(client=client, settings=settings)

    async def read(query: Mapping[str, str]) -> dict[str, Any]:
        if workflow_id := query.get("workflow_id"):
            found = await calls.of_run(workflow_id, query.get("run_id", ""))
            return {"calls": [each for each in found if query.get("request_id") in {None, each.request_id}]}
        # Temporal's visibility does not know which workflows wait in an activity: see `calls list`.
        chosen, endpoint = query.get("query") or 'ExecutionStatus = "Running"', query.get("endpoint", "")
        count, waiting = await calls.waiting(chosen, limit=_READ)
        return {
            "waiting": [each for each in waiting if endpoint in {"", each.endpoint}],
            "count": count,
            "is_all": count < _READ,
            "query": chosen,
            "endpoint": endpoint,
            "endpoints": settings.endpoints,
        }

    return Pages(title=settings.name, template=Path(__file__).with_suffix(".html"), read=read)
