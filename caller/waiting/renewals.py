"""When a waiting call asks its handler again. Pure: no clock, no I/O.

All instants are of the server's clock, which also measures the activity's timeouts. The server adds a delay to the
moment at which it receives the report. If the sum passes the activity's deadline, the server ends the activity at once
(server, `service/history/workflow/retry.go`). A delay is therefore never longer than half of the remaining time.
"""

from datetime import datetime, timedelta

from bridge.workflow.call import OperationCall

LAST_ATTEMPT = timedelta(seconds=1)
"""If less time is left than this, an attempt waits for the callback instead of asking again."""

_MAX_RETRY_AFTER = timedelta(hours=1)


def next_delay(
    wanted: timedelta, *, now: datetime, deadline: datetime, until: datetime | None = None
) -> timedelta | None:
    """Return the delay from *now* to the next attempt; None if the attempt should wait for the callback instead.

    The delay is *wanted*, but at most half of the time to *deadline*. No delay passes *until*, the instant at which the
    next attempt ends the call as timed out. It is at least 1 ms, because 0 means the interval of the retry policy.
    """
    remaining = deadline - now
    if remaining < LAST_ATTEMPT:
        return None
    return max(min(wanted, remaining / 2, (until or deadline) - now), timedelta(milliseconds=1))


def renewal_step(call: OperationCall, *, now: datetime, jitter: float) -> timedelta:
    """Return the delay to the call's next renewal, by its renewal settings.

    The step follows from the elapsed time, not from the attempt's number: attempts that could not reach the handler and
    a reset of the activity change the number but not the time. *jitter* is in [-1, 1] and changes the delay by up to
    ten per cent.
    """
    initial, maximum = (timedelta(milliseconds=ms) for ms in (call.renewal_initial_ms, call.renewal_maximum_ms))
    due, step = timedelta(milliseconds=call.first_lease_ms), initial
    elapsed = now - call.scheduled_time
    # A jittered renewal comes up to a tenth early: from three quarters of a step on, that step counts as done.
    while call.renewal_coefficient > 1 and step < maximum and due + step * 0.75 <= elapsed:
        due += step
        step = min(step * call.renewal_coefficient, maximum)
    return step * (1 + 0.1 * jitter)


def unreached_step(attempt: int, *, retry_after: timedelta) -> timedelta:
    """Return the delay after the handler could not be reached: 1 s, doubled up to 30 s; *retry_after* if longer."""
    step = min(timedelta(seconds=2.0 ** min(attempt - 1, 5)), timedelta(seconds=30))
    return max(step, min(retry_after, _MAX_RETRY_AFTER))
