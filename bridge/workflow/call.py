"""What a caller's workflow hands to its activities, and what they answer.

Neither end owns these facts: the workflow side writes them into history, the activity reads them, possibly under a
newer release. So the call is plain JSON with units in the names, and the names below stay. Imports nothing but the
standard library, because workflow code imports it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

START_OPERATION_ACTIVITY = "bridge.start_operation"
"""Activity type of the waiting activity. Recorded in histories: never rename."""

CANCEL_OPERATIONS_ACTIVITY = "bridge.cancel_operations"
"""Local activity that asks a handler to cancel operations. Recorded in histories: never rename."""

OWN_ACTIVITIES = frozenset({START_OPERATION_ACTIVITY, CANCEL_OPERATIONS_ACTIVITY})

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

MAX_DURATION = timedelta(days=36_525)
"""Longest duration that a call uses: 100 years. A longer one is cut to it, because server and clocks cannot hold it."""

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""An attempt lives at least as long as its request may: the request's 10 seconds, and some for the worker."""


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


@dataclass(frozen=True, kw_only=True)
class CancelOrder:
    """One cancel in the input of the local activity that sends cancels."""

    request_id: str
    """Of the call; also the id of its waiting activity."""
    call: OperationCall


@dataclass(frozen=True, kw_only=True)
class CancelAnswer:
    """What became of one cancel."""

    is_requested: bool = False
    """Whether the handler has taken the cancel."""
    refusal: str | None = None
    """Why the handler refused the cancel for good. Where it did neither, the cancel is sent again."""
    refusal_type: str = "INTERNAL"
    """Name of the `nexusrpc.HandlerErrorType` of the refusal."""
