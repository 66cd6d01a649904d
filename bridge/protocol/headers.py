"""Header names, and the durations, instants and states in their values.

Nexus RPC over HTTP (nexus-rpc/api `SPEC.md`), in the dialect that Temporal servers from 1.29 on speak. Sans-I/O: pure
functions over text.
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from enum import Enum
from urllib.parse import quote

from bridge.errors import RemoteProtocolError

REQUEST_ID = "Nexus-Request-Id"
LINK = "Nexus-Link"
OPERATION_TOKEN = "Nexus-Operation-Token"  # noqa: S105 - a header's name
OPERATION_STATE = "Nexus-Operation-State"
OPERATION_START_TIME = "Nexus-Operation-Start-Time"
OPERATION_CLOSE_TIME = "Nexus-Operation-Close-Time"
OPERATION_TIMEOUT = "Operation-Timeout"
REQUEST_TIMEOUT = "Request-Timeout"
REQUEST_RETRYABLE = "Nexus-Request-Retryable"
CALLBACK_PREFIX = "Nexus-Callback-"
RETRY_AFTER = "Retry-After"
SCHEDULED_TIME = "Bridge-Scheduled-Time"
"""Header of the bridge, on a start: when the caller's workflow scheduled the operation, RFC 3339."""
ATTEMPT = "Bridge-Attempt"
"""Header of the bridge, on a start: number of the attempt of the waiting activity. Above 1 the start is a renewal. The
number is only for people."""

PREFER = "Prefer"
"""Header of a start (RFC 7240): `wait=N` asks the handler to hold the start open for up to N seconds."""

MAX_OPERATION_TOKEN = 4096
"""Maximum number of characters in an operation token."""
OPERATION_TOKEN_TEXT = re.compile(rf"[!-~]{{1,{MAX_OPERATION_TOKEN}}}")
"""Form of an operation token that the header of a renewal or a cancel can carry."""

_UNITS_MS = {"h": 3_600_000.0, "m": 60_000.0, "s": 1000.0, "ms": 1.0, "us": 1e-3, "µs": 1e-3, "ns": 1e-6}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(h|ms|us|µs|ns|m|s)")
_LONGEST = timedelta(days=365_000)
"""Longest duration that is read. Longer than any peer's duration type; the present time plus this is still a date."""
_INSTANT = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})")


class OperationState(str, Enum):
    """State of an operation, as the header `Nexus-Operation-State` spells it."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


_SEGMENT = "!$&'()*+,;=:@"


def operation_path(service: str, operation: str) -> str:
    """Return `/{service}/{operation}`. Each name is one segment, and only what RFC 3986 requires is encoded.

    The signature covers the spelling of the path. A proxy that strips a prefix decodes the path and encodes it again,
    and makes the same spelling.
    """
    return f"/{quote(service, safe=_SEGMENT)}/{quote(operation, safe=_SEGMENT)}"


def encode_duration(duration: timedelta) -> str:
    """Write *duration* in whole milliseconds, the only unit that every reader accepts. A negative one becomes 0."""
    return f"{max(0, round(duration.total_seconds() * 1000))}ms"


def decode_duration(text: str) -> timedelta | None:
    """Read a duration of the Nexus SPEC or of Go (`1m29.9s`); None for other text, or a duration over 1000 years."""
    parts = _DURATION_PART.findall(text) if len(text) <= 64 else []
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    milliseconds = sum(float(number) * _UNITS_MS[unit] for number, unit in parts)
    return timedelta(milliseconds=milliseconds) if milliseconds <= _LONGEST / timedelta(milliseconds=1) else None


def encode_http_date(instant: datetime) -> str:
    """Write *instant* as an HTTP date that ends in the literal GMT, because Go's reader accepts no other zone."""
    return format_datetime(instant.astimezone(UTC), usegmt=True)


def encode_instant(instant: datetime) -> str:
    """Write *instant* in the form of RFC 3339, in UTC with milliseconds."""
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def decode_instant(text: str) -> datetime | None:
    """Read an instant in the form of RFC 3339, in UTC; None for any other text."""
    # Servers from 1.31 send nine fractional digits. Python keeps six.
    if not _INSTANT.fullmatch(text.upper()):
        return None
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def decode_retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """Read the wait in `Retry-After`, at most an hour; None if the header is missing or not a number of seconds.

    A date is not read, because the clocks of two sides may differ by more than the wait.
    """
    text = headers.get(RETRY_AFTER, "").strip()
    return min(timedelta(seconds=int(text)), timedelta(hours=1)) if re.fullmatch(r"[0-9]{1,9}", text) else None


def encode_wait(wait: timedelta) -> str:
    """Write a `Prefer` header: hold the start open for up to *wait*, in whole seconds (RFC 7240 section 4.3)."""
    return f"wait={int(wait.total_seconds())}"


def decode_wait(text: str) -> timedelta | None:
    """Read the wait in a `Prefer` header; None if the header has no readable wait, or a wait of 0."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", text, re.IGNORECASE)
    return timedelta(seconds=int(found[1])) if found and int(found[1]) else None


def require_state(text: str | None) -> OperationState:
    """Read the final state in *text*, the value of `Nexus-Operation-State`; *text* is None if the header is missing.

    Raises:
        RemoteProtocolError: *text* is None or not one of the three final states.
    """
    try:
        state = OperationState(text)
    except ValueError:
        state = OperationState.RUNNING
    if state is OperationState.RUNNING:
        message = f"{OPERATION_STATE} is missing or not one of succeeded, failed, canceled"
        raise RemoteProtocolError(message)
    return state
