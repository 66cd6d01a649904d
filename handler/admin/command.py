"""The command line for operators of the handler: `deliveries list`, `show` and `redeliver`, as lines or as JSON."""

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.service import RPCError

from bridge.admin import command
from bridge.admin.command import CommandError
from bridge.runtime.settings import CONFIG_VARIABLE, SettingsError, load
from handler.admin.deliveries import Deliveries, DeliveryReport, DeliveryState, plain
from handler.settings import HandlerSettings

_OPEN = (DeliveryState.RUNNING, DeliveryState.PAUSED, DeliveryState.FAILED)
_CHOICES = {state.value: (state,) for state in DeliveryState} | {"all": tuple(DeliveryState)}


def add_deliveries_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "see what is still to be delivered, and repeat what was refused"
    where = "Connects as `serve` does; BRIDGE_CONFIG is needed only where it names a data converter."
    deliveries = commands.add_parser("deliveries", help=about, description=f"{about.capitalize()}. {where}")
    actions = deliveries.add_subparsers(dest="deliveries_command", required=True)

    listing = actions.add_parser("list", help="list deliveries, newest first")
    listing.add_argument("--state", choices=_CHOICES, help="default: all but delivered")
    listing.add_argument("--limit", type=int, default=100, metavar="N", help="at most N (default: 100)")
    listing.set_defaults(run=_list)
    showing = actions.add_parser("show", help="show everything about one delivery")
    showing.add_argument("id", metavar="ID")
    showing.set_defaults(run=_show)
    again = actions.add_parser("redeliver", help="run failed deliveries again, by resetting their workflows")
    again.add_argument("ids", nargs="*", metavar="ID")
    again.add_argument("--failed", action="store_true", help="all that have failed")
    again.set_defaults(run=_redeliver)
    for each in (listing, showing, again):
        each.add_argument("--json", action="store_true", help="print JSON instead")


@asynccontextmanager
async def _connected() -> AsyncIterator[Deliveries]:
    converter = load(HandlerSettings).data_converter if os.environ.get(CONFIG_VARIABLE) else None
    client = await command.connect(converter)
    try:
        yield Deliveries(client=client)
    except RPCError as error:
        raise CommandError(_refusal(error)) from None


def _refusal(error: RPCError) -> str:
    return f"Temporal answered {error.status.name}: {plain(error.message)}"


async def _list(arguments: argparse.Namespace) -> None:
    if arguments.limit < 1:
        message = "--limit: at least 1"
        raise SettingsError(message)
    async with _connected() as deliveries:
        # One more than is shown tells whether there is more.
        reports = await deliveries.read_all(_CHOICES.get(arguments.state, _OPEN), limit=arguments.limit + 1)
    shown = reports[: arguments.limit]
    if arguments.json:
        print(to_json(shown))
    else:
        print(table(shown, now=datetime.now(UTC)) if shown else "no such deliveries")
    if len(reports) > len(shown):
        print(f"there are more than these {len(shown)}; --limit shows more", file=sys.stderr)


async def _show(arguments: argparse.Namespace) -> None:
    async with _connected() as deliveries:
        report = await deliveries.read(arguments.id)
    print(to_json(report) if arguments.json else details(report, now=datetime.now(UTC)))


async def _redeliver(arguments: argparse.Namespace) -> None:
    if bool(arguments.ids) == arguments.failed:
        message = "name the deliveries to run again, or say --failed"
        raise SettingsError(message)
    told: list[dict[str, str | None]] = []
    async with _connected() as deliveries:
        failed = await deliveries.read_all([DeliveryState.FAILED]) if arguments.failed else []
        for each in dict.fromkeys(arguments.ids or (report.id for report in failed)):
            try:
                told.append({"id": each, "run_id": await deliveries.redeliver(each), "error": None})
            except (CommandError, RPCError) as error:
                reason = _refusal(error) if isinstance(error, RPCError) else str(error)
                told.append({"id": each, "run_id": None, "error": reason})
    if arguments.json:
        print(to_json(told))
    else:
        again = [f"{each['id']} runs again, as run {each['run_id']}" for each in told if each["run_id"]]
        print("\n".join(again) or "nothing was run again")
    if errors := [each["error"] for each in told if each["error"]]:
        raise CommandError("\n".join(errors))


def to_json(told: Any) -> str:
    """*told* is made of JSON values, times and reports."""
    return json.dumps(told, default=lambda each: each.isoformat() if isinstance(each, datetime) else asdict(each))


def table(reports: Sequence[DeliveryReport], *, now: datetime) -> str:
    """One line each, below a heading."""
    rows = [("DELIVERY", "STATE", "OPERATION", "TARGET", "CALLER", "AGE", "DEADLINE")]
    for each in reports:
        target = f"{plain(each.target_workflow_id)} / {each.target_run_id}" if each.target_workflow_id else "?"
        deadline = "?" if each.deadline is None else _distance(each.deadline, now)
        names = (plain(each.operation or "?"), target, plain(each.caller or "?"))
        rows.append((each.id, each.state.value, *names, _span(now - each.started), deadline))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def details(report: DeliveryReport, *, now: datetime) -> str:
    """Everything, one field a line."""
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
