"""What a caller's workflow passes to its activities, and what they return.

The workflow writes these records into history, and the activity reads them, possibly in a newer release. Therefore the
records are plain JSON with units in the names, and no name below may change. This module imports nothing but the
standard library, because workflow code imports it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

START_OPERATION_ACTIVITY = "bridge.start_operation"
"""Activity type of the waiting activity. Recorded in histories: never rename."""

CANCEL_OPERATIONS_ACTIVITY = "bridge.cancel_operations"
"""Local activity that asks a handler to cancel operations. Recorded in histories: never rename."""

Transport = Literal["callback", "wait", "poll", "nexus"]
"""How one call reaches the handler and its outcome the caller. Contract, handler and errors are equal for all."""

CALL_ENDED = "bridge.call_ended"
"""Name of the function outside the sandbox with which a workflow reports to its worker that a call has ended."""

COUNT_CALL = "bridge.count_call"
"""Name of the function outside the sandbox that counts a call whose wait has ended: call, outcome, seconds."""

OPERATION_UNSUCCESSFUL = "bridge.OperationUnsuccessful"
"""Error type of the non-retryable wrapper around every failed outcome of the waiting activity.

The target's own failure may be retryable. The wrapper makes the activity's failure final, so that the target's failure
stays unchanged as its cause.
"""

UNSUCCESSFUL_MESSAGE = "nexus operation completed unsuccessfully"
"""Message of a Nexus operation that failed or was canceled, the same as that of Temporal's server."""

STILL_RUNNING = "bridge.StillRunning"
"""Error type of an attempt that was answered 201 (still running)."""

LIMIT_INPUT = "bridge.limit_input"
"""Name of the function outside the sandbox that returns the largest input that the worker's namespace accepts."""

MAX_INPUT_BYTES = 2 * 1024 * 1024 - 64 * 1024
"""Largest input of an operation, before the payload codec.

Server 1.29 terminates a workflow that schedules an activity with more than 2 MiB after the codec. The difference of
64 KiB is for the record of the call and for the bytes that an encrypting codec adds.
"""

MAX_DURATION = timedelta(days=36_525)
"""Longest duration of a call, 100 years. A longer one is cut to it, because server and clocks cannot represent it."""

ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Least timeout of an attempt: 10 seconds for its request, and 5 for the worker."""


@dataclass(frozen=True, kw_only=True)
class Renewals:
    """How often a waiting call asks the handler for the state of the operation."""

    initial: timedelta = timedelta(minutes=1)
    """Delay between the end of the first lease and the first renewal."""
    coefficient: float = 2.0
    """Factor between one delay and the next, 1 to 1000."""
    maximum: timedelta = timedelta(hours=1)
    """Longest delay."""

    def __post_init__(self) -> None:
        # Refuses NaN too, and a factor with which a delay would overflow.
        if self.initial <= timedelta(0) or self.maximum < self.initial or not 1 <= self.coefficient <= 1000:
            message = "renewals: need 0 < initial <= maximum and 1 <= coefficient <= 1000"
            raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class OperationCall:
    """First argument of the waiting activity. The second is the operation's input."""

    endpoint: str
    """Name of the endpoint in the caller's settings."""
    service: str
    """Name of the service."""
    operation: str
    """Name of the operation."""
    scheduled_time_ms: int
    """When the workflow scheduled the call, Unix time in milliseconds (workflow time)."""
    schedule_to_close_ms: int
    """How long after `scheduled_time_ms` the caller stops waiting."""
    first_lease_ms: int
    """How long attempt 1 waits for the callback before the next attempt asks the handler."""
    renewal_initial_ms: int
    """`Renewals.initial` in milliseconds."""
    renewal_maximum_ms: int
    """`Renewals.maximum` in milliseconds."""
    renewal_coefficient: float
    """`Renewals.coefficient`."""
    headers: dict[str, str] = field(default_factory=dict)
    """Nexus headers that the caller's workflow set, by lower-case names."""
    schedule_to_start_ms: int | None = None
    """How long after `scheduled_time_ms` the handler must have started the operation; None for no limit."""
    start_to_close_ms: int | None = None
    """How long the operation may run after its start; None for no limit."""
    transport: Transport | None = None
    """Never "nexus". None selects the transport in the endpoint's settings."""
    is_again: bool = False
    """Whether an earlier activity of this call ended without an outcome. It may have started the operation."""

    @property
    def scheduled_time(self) -> datetime:
        """When the workflow scheduled the call, UTC."""
        return datetime.fromtimestamp(self.scheduled_time_ms / 1000, UTC)

    @property
    def deadline(self) -> datetime:
        """When the caller stops waiting, UTC. The timer of Temporal's server fires at this time or a little later."""
        return self.scheduled_time + timedelta(milliseconds=self.schedule_to_close_ms)

    @property
    def start_deadline(self) -> datetime | None:
        """When the caller gives up if the handler has not started the operation; None for no limit."""
        if self.schedule_to_start_ms is None:
            return None
        return self.scheduled_time + timedelta(milliseconds=self.schedule_to_start_ms)

    def close_deadline(self, started: datetime) -> datetime:
        """When the caller stops waiting for an operation that the handler started at *started*."""
        if self.start_to_close_ms is None:
            return self.deadline
        return min(self.deadline, started + timedelta(milliseconds=self.start_to_close_ms))


@dataclass(frozen=True, kw_only=True)
class CancelOrder:
    """One cancel in the input of the local activity that sends cancels."""

    request_id: str
    """Request id of the call, and id of its waiting activity."""
    call: OperationCall
    """The call to cancel."""


@dataclass(frozen=True, kw_only=True)
class CancelAnswer:
    """Result of one attempt to send a cancel. If the handler neither accepted nor refused it, it is sent again."""

    is_requested: bool = False
    """Whether the handler has accepted the cancel."""
    refusal: str | None = None
    """Why the handler refused the cancel permanently; None if it did not."""
    refusal_type: str = "INTERNAL"
    """Name of the `nexusrpc.HandlerErrorType` of the refusal."""
