"""How commands print reports: as a table, as lines with a timeline, or as JSON. Foreign text is made plain."""

import dataclasses
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Annotated, Any

from cyclopts import Parameter, validators

from bridge.security.redaction import one_line, plain

JsonOutput = Annotated[bool, Parameter(name="--json", help="Print JSON instead.")]
"""The option `--json` of a command."""
Limit = Annotated[int, Parameter(validator=validators.Number(gte=1))]
"""The option `--limit` of a command that lists."""


def to_json(value: Any) -> str:
    """Return *value*, which is made of JSON values, times and reports, as JSON."""
    return json.dumps(
        value, default=lambda each: each.isoformat() if isinstance(each, datetime) else dataclasses.asdict(each)
    )


def print_list(reports: Sequence[Any], columns: str, *, as_json: bool, searched: str = "") -> None:
    """Print *reports* as JSON, or as a table of the fields in *columns*. *searched* says where they were read."""
    if reports or as_json:
        print(to_json(reports) if as_json else table(reports, columns, now=datetime.now(UTC)))
    else:
        print(f"nothing found {searched}".rstrip())


def table(reports: Sequence[Any], columns: str, *, now: datetime) -> str:
    """Return a heading and one line for each report: "?" for None, and for a time its distance from *now*."""
    names = columns.split()
    texts = [[name.replace("_", " ").upper() for name in names]]
    texts += [[cell(getattr(each, name), now) for name in names] for each in reports]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in texts]
    return "\n".join(lines)


def details(report: Any, *, now: datetime) -> str:
    """Return the fields of *report*, one on each line: first the facts, then the times in their order."""
    facts, times = facts_and_times(report)
    # A link was made from the settings, with every id percent-encoded. Other texts are foreign.
    lines = [
        f"{name.replace('_', ' '):<20}"
        + (one_line(value, 4000) if name == "link" and value else cell(value, now, unknown="-"))
        for name, value in facts
    ]
    for name, value in times:
        instant = value.isoformat(sep=" ", timespec="seconds")
        lines.append(f"{name.replace('_', ' '):<20}{instant} ({cell(value, now)})")
    return "\n".join(lines)


def facts_and_times(report: Any) -> tuple[list[tuple[str, Any]], list[tuple[str, datetime]]]:
    """Return the fields of *report* by name: those that are not a time, and the times in their order."""
    facts = [(name, value) for name, value in vars(report).items() if not isinstance(value, datetime)]
    times = [(name, value) for name, value in vars(report).items() if isinstance(value, datetime)]
    return facts, sorted(times, key=lambda each: each[1])


def cell(value: object, now: datetime, *, unknown: str = "?") -> str:
    """Return *value* as one line: *unknown* for None, and for a time its distance from *now*."""
    match value:
        case None:
            return unknown
        case datetime():
            return f"in {_span(value - now)}" if value > now else f"{_span(now - value)} ago"
        case Enum():
            return str(value.value)
        case _:
            return plain(str(value))


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
