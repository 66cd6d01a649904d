"""What the describe of a run shows about the attempts of a pending activity. Pure functions."""

from datetime import UTC, datetime
from typing import NamedTuple

from temporalio.api.enums.v1 import PendingActivityState
from temporalio.api.failure.v1 import Failure
from temporalio.api.workflow.v1 import PendingActivityInfo

_NOT_BEGUN = (
    PendingActivityState.PENDING_ACTIVITY_STATE_SCHEDULED,
    PendingActivityState.PENDING_ACTIVITY_STATE_PAUSED,
)


class Attempts(NamedTuple):
    """The attempts of a pending activity."""

    begun: int
    """Number of attempts begun. Counts anew after a reset of the activity."""
    next_try: datetime | None
    """When the next attempt begins; None while an attempt runs, and before the first one."""
    last_failure: Failure | None
    """Why the last attempt ended; None if none has ended."""


def attempts_of(activity: PendingActivityInfo) -> Attempts:
    """Return the attempts of *activity*."""
    # Temporal counts an attempt from the moment at which it is scheduled.
    is_due = activity.HasField("next_attempt_schedule_time")
    is_begun = activity.state not in _NOT_BEGUN and not is_due
    return Attempts(
        begun=activity.attempt - (not is_begun),
        next_try=activity.next_attempt_schedule_time.ToDatetime(UTC) if is_due else None,
        last_failure=activity.last_failure if activity.HasField("last_failure") else None,
    )
