"""What is told of a delivery, as lines for people and as JSON for machines. Pure functions.

A report has no field for a callback URL, a header or a token, so none can be printed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any


class DeliveryState(str, Enum):
    """How a delivery stands."""

    RUNNING = "running"
    """Tries again by itself."""
    FAILED = "failed"
    """Refused, out of time, or ended by somebody: waits to be run again."""
    DELIVERED = "delivered"
    """The receiver took it, or said that nobody waits any more."""


@dataclass(frozen=True, kw_only=True)
class DeliveryReport:
    """One delivery by its newest run. Field names are those of the JSON; what cannot be read is None."""

    id: str
    run_id: str
    state: DeliveryState
    attempts: int
    """Begun in this run."""
    last_error: str | None
    next_try: datetime | None
    """None while an attempt is under way."""
    started: datetime
    """This run."""
    closed: datetime | None
    caller: str | None = None
    request_id: str | None = None
    operation_state: str | None = None
    """What the caller is told: succeeded, failed or canceled."""
    outcome_time: datetime | None = None
    """When the target's outcome was certain."""
    deadline: datetime | None = None
    target_workflow_id: str | None = None
    target_run_id: str | None = None
    operation: str | None = None
    """Service/operation; as the caller's workflow below, read from the target while that is kept."""
    caller_namespace: str | None = None
    caller_workflow_id: str | None = None
    caller_run_id: str | None = None


def to_json(told: Any) -> str:
    """*told* is made of JSON values, times and reports."""
    return json.dumps(told, default=lambda each: each.isoformat() if isinstance(each, datetime) else asdict(each))


def table(reports: Sequence[DeliveryReport], *, now: datetime) -> str:
    """One line each, below a heading."""
    heading = ("DELIVERY", "STATE", "ATTEMPTS", "NEXT TRY", "TARGET", "CALLER", "AGE", "LAST ERROR")
    rows = [heading] + [
        (
            each.id,
            each.state.value,
            str(each.attempts),
            _distance(each.next_try, now) if each.next_try else "now" if each.attempts and not each.closed else "-",
            f"{plain(each.target_workflow_id)} / {each.target_run_id}" if each.target_workflow_id else "?",
            plain(each.caller or "?"),
            _span(now - (each.outcome_time or each.started)),
            each.last_error or "-",
        )
        for each in reports
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def details(report: DeliveryReport, *, now: datetime) -> str:
    """Everything, one field a line."""
    lines = []
    for name, value in asdict(report).items():
        match value:
            case datetime():
                text = f"{value.isoformat(sep=' ', timespec='seconds')} ({_distance(value, now)})"
            case DeliveryState():
                text = value.value
            case None:
                text = "-"
            case _:
                text = plain(str(value))
        lines.append(f"{name.replace('_', ' '):<20}{text}")
    return "\n".join(lines)


def plain(text: str) -> str:
    """Foreign text as one bounded line that is safe for a terminal; without URLs, because ours carry tokens."""
    line = re.sub(r"\w+://\S+", "(url)", " ".join(text.split()))
    return "".join(each if each.isprintable() else "?" for each in line)[:1000]


def _distance(instant: datetime, now: datetime) -> str:
    return f"in {_span(instant - now)}" if instant > now else f"{_span(now - instant)} ago"


def _span(span: timedelta) -> str:
    seconds = int(span.total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
