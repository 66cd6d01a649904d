"""The pages of the handler service's console: the deliveries that are open or failed, and the run of one target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from temporalio.client import Client

from bridge.console import Pages
from handler.reports.deliveries import STATES, UNDELIVERED, Deliveries
from handler.reports.runs import read_run_and_delivery
from handler.settings import HandlerSettings

_LISTED = 100


def pages(client: Client, settings: HandlerSettings) -> Pages:
    """Return the pages of the handler's namespace."""
    deliveries = Deliveries(client=client)

    async def read(query: Mapping[str, str]) -> dict[str, Any]:
        if delivery_id := query.get("id"):
            return {"run": None, "delivery": await deliveries.read(delivery_id)}
        if workflow_id := query.get("workflow_id"):
            run, delivery = await read_run_and_delivery(client, settings, workflow_id, query.get("run_id", ""))
            return {"run": run, "delivery": delivery}
        state, caller = query.get("state", ""), query.get("caller", "")
        states = STATES.get(state, UNDELIVERED)
        found = await deliveries.read_all(states, caller=caller or None, limit=_LISTED + 1)
        return {
            "deliveries": found[:_LISTED],
            "is_all": len(found) <= _LISTED,
            "state": state,
            "states": STATES,
            "caller": caller,
            "callers": settings.callers,
        }

    return Pages(
        title=settings.name, template=Path(__file__).with_suffix(".html"), read=read, redeliver=deliveries.redeliver
    )
