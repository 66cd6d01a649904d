"""The commands `callback-bridge deliveries list`, `show` and `redeliver`, as lines or as JSON."""

import asyncio
import sys
from datetime import UTC, datetime
from typing import Literal

from cyclopts import App
from temporalio.service import RPCError

from bridge.admin.command import CommandError, connected, refusal
from bridge.admin.output import JsonOutput, Limit, details, print_list, to_json
from bridge.runtime.settings import SettingsError
from handler.reports.deliveries import COLUMNS, STATES, UNDELIVERED, Deliveries, DeliveryError, DeliveryState
from handler.settings import HandlerSettings

_PACE_S = 0.1

deliveries = App(
    name="deliveries",
    help="See which outcomes are not delivered yet, and repeat refused deliveries. Connects as the handler service "
    "does; BRIDGE_CONFIG is needed only if it names a data converter.",
)


@deliveries.command(name="list")
async def list_(
    *,
    state: Literal["running", "paused", "failed", "delivered", "all"] | None = None,
    caller: str | None = None,
    limit: Limit = 100,
    as_json: JsonOutput = False,
) -> None:
    """List deliveries, newest first.

    Args:
        state: State of the deliveries to list. By default running, paused and failed.
        caller: Only deliveries to this caller.
        limit: Maximum number of deliveries to list.
    """
    async with connected(HandlerSettings) as (client, _):
        found = Deliveries(client=client)
        # Read one more than is shown, to see whether there are more.
        states = UNDELIVERED if state is None else STATES[state]
        reports = await found.read_all(states, caller=caller, limit=limit + 1)
    shown = reports[:limit]
    print_list(shown, COLUMNS, as_json=as_json, searched=f"in namespace {client.namespace}")
    if len(reports) > len(shown):
        print(f"there are more than these {len(shown)}; --limit shows more", file=sys.stderr)


@deliveries.command
async def show(id: str, /, *, as_json: JsonOutput = False) -> None:  # noqa: A002 - the argument's name
    """Show everything about one delivery.

    Args:
        id: Id of the delivery, as `list` shows it.
    """
    async with connected(HandlerSettings) as (client, _):
        report = await Deliveries(client=client).read(id)
    print(to_json(report) if as_json else details(report, now=datetime.now(UTC)))


@deliveries.command
async def redeliver(*ids: str, failed: bool = False, as_json: JsonOutput = False) -> None:
    """Run failed deliveries again, with the same content.

    Args:
        ids: Ids of the deliveries, as `list` shows them.
        failed: Run all failed deliveries again.
    """
    if bool(ids) == failed:
        message = "name the deliveries to run again, or give --failed"
        raise SettingsError(message)
    results: list[dict[str, str | None]] = []
    async with connected(HandlerSettings) as (client, _):
        found = Deliveries(client=client)
        reports = await found.read_all([DeliveryState.FAILED]) if failed else []
        for number, each in enumerate(dict.fromkeys(ids or (report.id for report in reports))):
            # Many deliveries may wait for one receiver, which was repaired just now.
            await asyncio.sleep(_PACE_S if number else 0)
            try:
                results.append({"id": each, "run_id": await found.redeliver(each), "error": None})
            except (DeliveryError, RPCError) as error:
                results.append({"id": each, "run_id": None, "error": refusal(error)})
    if as_json:
        print(to_json(results))
    else:
        again = [f"{each['id']} runs again, as run {each['run_id']}" for each in results if each["run_id"]]
        print("\n".join(again) or "nothing was run again")
    if errors := [each["error"] for each in results if each["error"]]:
        raise CommandError("\n".join(errors))
