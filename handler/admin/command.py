"""The commands `callback-bridge deliveries list`, `show` and `redeliver`, as lines or as JSON."""

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from temporalio.service import RPCError

from bridge.admin.command import CommandError
from bridge.runtime.settings import CONFIG_VARIABLE, SettingsError, load
from bridge.runtime.temporal import connect
from handler.admin.deliveries import Deliveries, DeliveryReport, DeliveryState, plain
from handler.settings import HandlerSettings

_OPEN = (DeliveryState.RUNNING, DeliveryState.PAUSED, DeliveryState.FAILED)
_CHOICES = {state.value: (state,) for state in DeliveryState} | {"all": tuple(DeliveryState)}
_Json = Annotated[bool, Parameter(name="--json", help="Print JSON instead.")]

deliveries = App(
    name="deliveries",
    help="See which outcomes are not delivered yet, and repeat refused deliveries. Connects as the handler service "
    "does; BRIDGE_CONFIG is needed only if it names a data converter.",
)


@asynccontextmanager
async def _connected() -> AsyncIterator[Deliveries]:
    converter = load(HandlerSettings).data_converter if os.environ.get(CONFIG_VARIABLE) else None
    client = await connect(converter)
    try:
        yield Deliveries(client=client)
    except RPCError as error:
        raise CommandError(_refusal(error)) from None


def _refusal(error: RPCError) -> str:
    return f"Temporal answered {error.status.name}: {plain(error.message)}"


@deliveries.command(name="list")
async def list_(
    *,
    state: Literal["running", "failed", "delivered", "all"] | None = None,
    limit: int = 100,
    as_json: _Json = False,
) -> None:
    """List deliveries, newest first.

    Args:
        state: State of the deliveries to list. By default running and failed.
        limit: Maximum number of deliveries to list.
    """
    if limit < 1:
        message = "--limit: at least 1"
        raise SettingsError(message)
    async with _connected() as found:
        # Read one more than is shown, to see whether there are more.
        reports = await found.read_all(_OPEN if state is None else _CHOICES[state], limit=limit + 1)
    shown = reports[:limit]
    if as_json:
        print(to_json(shown))
    else:
        print(table(shown, now=datetime.now(UTC)) if shown else "no such deliveries")
    if len(reports) > len(shown):
        print(f"there are more than these {len(shown)}; --limit shows more", file=sys.stderr)


@deliveries.command
async def show(id: str, /, *, as_json: _Json = False) -> None:  # noqa: A002 - the argument's name
    """Show everything about one delivery.

    Args:
        id: Id of the delivery, as `list` shows it.
    """
    async with _connected() as found:
        report = await found.read(id)
    print(to_json(report) if as_json else details(report, now=datetime.now(UTC)))


@deliveries.command
async def redeliver(*ids: str, failed: bool = False, as_json: _Json = False) -> None:
    """Run failed deliveries again, with the same content.

    Args:
        ids: Ids of the deliveries, as `list` shows them.
        failed: Run all failed deliveries again.
    """
    if bool(ids) == failed:
        message = "name the deliveries to run again, or give --failed"
        raise SettingsError(message)
    results: list[dict[str, str | None]] = []
    async with _connected() as found:
        reports = await found.read_all([DeliveryState.FAILED]) if failed else []
        for each in dict.fromkeys(ids or (report.id for report in reports)):
            try:
                results.append({"id": each, "run_id": await found.redeliver(each), "error": None})
            except (CommandError, RPCError) as error:
                reason = _refusal(error) if isinstance(error, RPCError) else str(error)
                results.append({"id": each, "run_id": None, "error": reason})
    if as_json:
        print(to_json(results))
    else:
        again = [f"{each['id']} runs again, as run {each['run_id']}" for each in results if each["run_id"]]
        print("\n".join(again) or "nothing was run again")
    if errors := [each["error"] for each in results if each["error"]]:
        raise CommandError("\n".join(errors))


def to_json(value: Any) -> str:
    """Return *value*, which is made of JSON values, times and reports, as JSON."""
    return json.dumps(value, default=lambda each: each.isoformat() if isinstance(each, datetime) else asdict(each))


def table(reports: Sequence[DeliveryReport], *, now: datetime) -> str:
    """Return a heading and one line for each report."""
    rows = [("DELIVERY", "STATE", "OPERATION", "TARGET", "CALLER", "AGE", "DEADLINE")]
    for each in reports:
        target = f"{plain(each.target_workflow_id)} / {each.target_run_id}" if each.target_workflow_id else "?"
        deadline = "?" if each.deadline is None else _distance(each.deadline, now)
        names = (plain(each.operation or "?"), target, plain(each.caller or "?"))
        rows.append((each.id, each.state.value, *names, _span(now - each.started), deadline))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def details(report: DeliveryReport, *, now: datetime) -> str:
    """Return all fields of *report*, one on each line."""
    lines = []
    for name, value in (asdict(report) | {"state": report.state.value}).items():
        text = "-" if value is None else plain(str(value))
        if isinstance(value, datetime):
            text = f"{value.isoformat(sep=' ', timespec='seconds')} ({_distance(value, now)})"
        lines.append(f"{name.replace('_', ' '):<20}{text}")
    return "\n".join(lines)


def _distance(instant: datetime, now: datetime) -> str:
    return f"in {_span(instant - now)}" if instant > now else f"{_span(now - instant)} ago"


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
