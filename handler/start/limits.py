"""How much one caller may start, and how many calls one run may have. Each copy of the service counts for itself.

A request over a limit is answered 429 and ends no call: the caller repeats it after the time in `Retry-After`.
"""

import time
from collections.abc import Callable
from datetime import timedelta

from bridge.errors import over_limit
from handler.delivery.close_reporter import MAX_ATTACHED
from handler.start.runs import Run

MAX_EVENTS = 10_240
MAX_HISTORY_BYTES = 10 * 1024 * 1024
"""History from which on no further call attaches. From here on Temporal warns; at five times as much it terminates."""

REFUSAL_DELAY_S = 0.5
"""How long a refusal by the rate is held back. A caller that ignores `Retry-After` would otherwise get hundreds of
refusals a second, and take the processor from the others."""

_MAX_RUNS = 500
"""Runs of which the calls are counted. If a run drops out, its count begins again, and the length of its history is the
limit."""
_LONGEST_WAIT_S = 60.0


class TokenBucket:
    """Tokens that refill at a steady rate."""

    def __init__(self, *, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        """*burst* is the number of tokens of a full bucket. *clock* returns seconds."""
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._tokens = float(burst)
        self._filled = self._promised = clock()

    def take(self) -> None:
        """Take a token.

        Raises:
            nexusrpc.HandlerError: RESOURCE_EXHAUSTED, the bucket is empty. Each refusal names a later time than the one
                before, so that the refused requests come back at the rate of the refill.
        """
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._per_second)
        self._filled = now
        if self._tokens < 1:
            self._promised = min(max(self._promised, now) + 1 / self._per_second, now + _LONGEST_WAIT_S)
            message = f"this caller may make {self._per_second:g} starts a second, and {self._burst} at once"
            raise over_limit(message, retry_after=timedelta(seconds=self._promised - now))
        self._tokens -= 1


class AttachedCalls:
    """Counts the calls that attach to a run or to a run that continues it."""

    def __init__(self) -> None:
        self._calls: dict[str, set[str]] = {}
        """Temporal's request ids of the calls, by first run. The run that was asked for last comes last."""

    def admit(self, call_id: str, run: Run) -> bool:
        """Count a call, once for all its repeats. False if the run has the maximum of calls, or a long history."""
        calls = self._calls.pop(run.first_run_id, set())
        self._calls[run.first_run_id] = calls
        if len(self._calls) > _MAX_RUNS:
            del self._calls[next(iter(self._calls))]
        if run.events >= MAX_EVENTS or run.history_bytes >= MAX_HISTORY_BYTES:
            return False
        if len(calls) < MAX_ATTACHED:
            calls.add(call_id)
        return call_id in calls
