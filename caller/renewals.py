"""When a waiting call asks its handler again. Pure: no clock, no I/O.

All instants are of the server's clock, by which the activity's timeouts run. The server adds a delay to the moment at
which it gets the report, and ends the activity at once where the sum passes the activity's deadline (server,
`service/history/workflow/retry.go`). So a delay is never longer than half of what remains.
"""

from datetime import datetime, timedelta

from bridge.workflow.call import OperationCall

LAST_ATTEMPT = timedelta(seconds=1)
"""With less time left than this, an attempt waits for the callback instead of asking again."""

_MAX_RETRY_AFTER = timedelta(hours=1)


def next_delay(
    wanted: timedelta, *, now: datetime, deadline: datetime, until: datetime | None = None
) -> timedelta | None:
    """How long after *now* the next attempt begins, or None if the attempt should wait for the callback instead.

    *wanted*, but at most half of what remains to *deadline*. No delay passes *until*, when the next attempt has to
    give up.
    """
    remaining = deadline - now
    if remaining < LAST_ATTEMPT:
        return None
    delay = min(wanted, remaining / 2)
    return delay if until is None else min(delay, max(until - now, timedelta(milliseconds=1)))


def renewal_step(call: OperationCall, *, now: datetime, jitter: float) -> timedelta:
    """The delay that the call's renewals want after *now*.

    The step is found from the time that has passed, not from the attempt's number: attempts that could not reach the
    handler, and a reset of the activity, change the number but not the time. *jitter* is in [-1, 1] and moves the
    delay by up to ten per cent.
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
    """How long to wait after the handler could not be reached: 1 s, doubled up to 30 s, or what it asked for."""
    step = min(timedelta(seconds=2.0 ** min(attempt - 1, 5)), timedelta(seconds=30))
    return max(step, min(retry_after, _MAX_RETRY_AFTER))
