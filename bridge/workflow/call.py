"""What a caller's workflow hands to its waiting activity, and how that activity paces itself.

Neither end owns these facts: the workflow side writes them into history, the activity reads them, possibly under a
newer release. So the call is plain JSON with units in the names, and the names below stay. Imports nothing but the
standard library, because workflow code imports it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

START_OPERATION_ACTIVITY = "bridge.start_operation"
"""Activity type of the waiting activity. Recorded in histories: never rename."""

CANCEL_OPERATION_ACTIVITY = "bridge.cancel_operation"
"""Activity type that asks the handler to cancel. Recorded in histories: never rename."""

Transport = Literal["callback", "wait", "poll", "nexus"]
"""How one call travels; contract, handler and errors are the same for all."""

CALL_ENDED = "bridge.call_ended"
"""Name of the function outside the sandbox by which a workflow tells its own worker that a call has ended."""

OPERATION_UNSUCCESSFUL = "bridge.OperationUnsuccessful"
"""Error type of the non-retryable wrapper around every failed outcome of the waiting activity.

The wrapper makes the activity's failure final whatever the target's own failure says of retries, so that the target's
failure can travel unchanged as its cause.
"""

UNSUCCESSFUL_MESSAGE = "nexus operation completed unsuccessfully"
"""What Temporal's server says of a Nexus operation that ended badly; ours reads the same."""

STILL_RUNNING = "bridge.StillRunning"
"""Error type of an attempt that learned no more than that."""

MAX_INPUT_BYTES = 2 * 1024 * 1024 - 64 * 1024
"""Largest input of an operation, before the payload codec.

A workflow that schedules more than 2 MiB after it is terminated by server 1.29. The rest is for the call's own record
and for what an encrypting codec adds.
"""

DEADLINE_MARGIN = timedelta(seconds=5)
"""A renewal is due at least this long before the deadline, so that its answer still counts."""

LAST_RENEWAL = timedelta(seconds=10)
"""With less time left than this, an attempt waits for the callback instead of asking again."""

LAST_POLL = timedelta(seconds=1)
"""A poll is due at least this long before the deadline."""


@dataclass(frozen=True, kw_only=True)
class Renewals:
    """How often a waiting call asks the handler how the operation stands."""

    initial: timedelta = timedelta(minutes=1)
    """Delay before the first renewal after the first lease has run out."""
    coefficient: float = 2.0
    """Each delay is the one before times this; 1 to 1000."""
    maximum: timedelta = timedelta(hours=1)
    """Upper bound of a delay."""

    def __post_init__(self) -> None:
        # Neither NaN nor a factor that carries a delay past what a duration can hold.
        if self.initial <= timedelta(0) or self.maximum < self.initial or not 1 <= self.coefficient <= 1000:
            message = "renewals: need 0 < initial <= maximum and 1 <= coefficient <= 1000"
            raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OperationCall:
    """Input of the waiting activity, beside the operation's own input."""

    endpoint: str
    """Name of the endpoint in the caller's settings."""
    service: str
    operation: str
    scheduled_time_ms: int
    """When the workflow scheduled the call, Unix time in milliseconds (workflow time)."""
    schedule_to_close_ms: int
    """How long after `scheduled_time_ms` the caller stops waiting."""
    first_lease_ms: int
    """How long attempt 1 waits for the callback before the next attempt asks."""
    renewal_initial_ms: int
    renewal_maximum_ms: int
    renewal_coefficient: float
    headers: dict[str, str] = field(default_factory=dict)
    """The caller's own Nexus headers, lower-cased names."""
    schedule_to_start_ms: int | None = None
    """How long after `scheduled_time_ms` the handler must have taken the operation on."""
    start_to_close_ms: int | None = None
    """How long after it was taken on the operation may run."""
    transport: Transport | None = None
    """Never "nexus"; None leaves it to the endpoint's settings."""

    @property
    def scheduled_time(self) -> datetime:
        return datetime.fromtimestamp(self.scheduled_time_ms / 1000, UTC)

    @property
    def deadline(self) -> datetime:
        """When the caller stops waiting. The server's own timer runs out at this moment or a little later."""
        return self.scheduled_time + timedelta(milliseconds=self.schedule_to_close_ms)

    @property
    def start_deadline(self) -> datetime | None:
        """When the caller gives up on a handler that has not taken the operation on."""
        if self.schedule_to_start_ms is None:
            return None
        return self.scheduled_time + timedelta(milliseconds=self.schedule_to_start_ms)

    def close_deadline(self, started: datetime) -> datetime:
        """When the caller stops waiting for an operation that was taken on at *started*."""
        if self.start_to_close_ms is None:
            return self.deadline
        return min(self.deadline, started + timedelta(milliseconds=self.start_to_close_ms))


def renewal_delay(
    call: OperationCall, *, now: datetime, jitter: float, until: datetime | None = None
) -> timedelta | None:
    """How long the next renewal should wait, or None if the attempt should wait for the callback instead.

    The step is found from the time that has passed, not from the attempt's number: attempts that could not reach the
    handler, and a reset of the activity, change the number but not the time. *jitter* is in [-1, 1] and moves the
    delay by up to ten per cent. No delay passes *until*, when the next attempt has to give up. A delay ends
    `DEADLINE_MARGIN` before the deadline, because one that reaches past it would end the activity at once (server,
    `service/history/workflow/retry.go`).
    """
    remaining = call.deadline - now
    if remaining < LAST_RENEWAL:
        return None
    initial, maximum = (timedelta(milliseconds=ms) for ms in (call.renewal_initial_ms, call.renewal_maximum_ms))
    due, step = timedelta(milliseconds=call.first_lease_ms), initial
    elapsed = now - call.scheduled_time
    # A jittered renewal comes up to a tenth early: from three quarters of a step on, that step counts as done.
    while call.renewal_coefficient > 1 and step < maximum and due + step * 0.75 <= elapsed:
        due += step
        step = min(step * call.renewal_coefficient, maximum)
    room = remaining - DEADLINE_MARGIN if until is None else min(remaining - DEADLINE_MARGIN, until - now)
    return min(step * (1 + 0.1 * jitter), room)


def poll_delay(call: OperationCall, *, now: datetime, interval: timedelta, until: datetime) -> timedelta | None:
    """How long the next poll should wait: *interval*, but no longer than there is something to ask.

    None when the deadline is too near for another; then the attempt waits for it.
    """
    room = call.deadline - now - LAST_POLL
    return min(interval, room, max(until - now, LAST_POLL)) if room >= LAST_POLL else None


def unreached_delay(attempt: int, *, retry_after: timedelta | None, remaining: timedelta) -> timedelta | None:
    """How long to wait after the handler could not be reached: 1 s, doubled up to 30 s, or what it asked for.

    None when the next try would come too late: then the attempt waits for a callback that may yet come, since the
    start may have arrived and only its answer been lost.
    """
    wanted = min(timedelta(seconds=2.0 ** min(attempt - 1, 5)), timedelta(seconds=30))
    if retry_after is not None:
        wanted = max(wanted, min(retry_after, timedelta(hours=1)))
    if remaining >= LAST_RENEWAL:
        return min(wanted, remaining - DEADLINE_MARGIN)
    return wanted if wanted < remaining else None
