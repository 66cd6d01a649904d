"""When a waiting call asks again: with any jitter it sends few requests, and none of them too late."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.workflow.call import OperationCall
from caller.waiting.renewals import LAST_ATTEMPT, next_delay, renewal_step, unreached_step

SCHEDULED = datetime(2026, 11, 23, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
RETRY_INTERVAL = timedelta(seconds=1)
"""Delay between the end of the first lease and the next attempt, by the activity's retry policy."""
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def milliseconds(duration: timedelta) -> int:
    return duration // timedelta(milliseconds=1)


def call(
    *, deadline: timedelta = 7 * DAY, lease: timedelta = LEASE, initial: timedelta = MINUTE, coefficient: float = 2.0
) -> OperationCall:
    return OperationCall(
        endpoint="payments",
        service="PaymentService",
        operation="process",
        scheduled_time_ms=milliseconds(SCHEDULED - datetime.fromtimestamp(0, UTC)),
        schedule_to_close_ms=milliseconds(deadline),
        first_lease_ms=milliseconds(lease),
        renewal_initial_ms=milliseconds(initial),
        renewal_maximum_ms=milliseconds(max(HOUR, initial)),
        renewal_coefficient=coefficient,
    )


def requests(one: OperationCall, jitters: Iterator[float], *, latency: timedelta = timedelta(0)) -> Iterator[timedelta]:
    """Yield the time of each request since the scheduling, if the handler always answers 201 (still running)."""
    yield timedelta(0)
    elapsed = timedelta(milliseconds=one.first_lease_ms) + RETRY_INTERVAL
    while elapsed < one.deadline - SCHEDULED:
        yield elapsed
        elapsed += latency
        now = SCHEDULED + elapsed
        delay = next_delay(renewal_step(one, now=now, jitter=next(jitters)), now=now, deadline=one.deadline)
        if delay is None:
            return
        elapsed += delay


def steady(jitter: float) -> Iterator[float]:
    while True:
        yield jitter


def test_the_schedule_without_jitter() -> None:
    """After the first lease of 30 s, renewals are about 1, 2, 4, 8, 16, 32 minutes apart, then an hour."""
    sent = [each for each in requests(call(deadline=DAY), steady(0)) if each < 5 * HOUR]
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert gaps[0] == timedelta(seconds=31)
    assert gaps[1:7] == [MINUTE * 2**power for power in range(6)]
    assert set(gaps[7:]) == {HOUR}


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=200, max_size=200), st.integers(0, 10_000))
@example([-1.0] * 200, 0)
@example([1.0] * 200, 0)
@example([-1.0, 1.0] * 100, 10_000)
def test_a_day_of_waiting_costs_few_requests(jitters: list[float], latency_ms: int) -> None:
    """At most 12 in the first hour and 40 in a day, with any jitter and any latency."""
    sent = list(requests(call(deadline=30 * DAY), iter(jitters * 10), latency=timedelta(milliseconds=latency_ms)))
    assert len([each for each in sent if each < HOUR]) <= 12
    for start in sent[:20]:
        assert len([each for each in sent if start <= each < start + DAY]) <= 40


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=20, max_size=20))
def test_no_jitter_repeats_or_skips_a_step(jitters: list[float]) -> None:
    """Each delay is the next step, changed by at most a tenth."""
    sent = list(requests(call(), iter(jitters * 20)))
    steps = [MINUTE * 2**power for power in range(6)]
    for step, (earlier, later) in zip(steps, pairwise(sent[1:]), strict=False):
        assert 0.899 * step <= later - earlier <= 1.101 * step


def test_a_long_outage_does_not_bring_the_first_steps_back() -> None:
    """The step follows from the elapsed time. A reset of the activity changes only the number of attempts."""
    assert renewal_step(call(), now=SCHEDULED + DAY, jitter=0) == HOUR
    assert renewal_step(call(), now=SCHEDULED + 4 * MINUTE, jitter=0) == 4 * MINUTE


def test_a_coefficient_of_one_keeps_the_first_step() -> None:
    """The interval is then fixed, as for polling."""
    polling = call(initial=MINUTE, coefficient=1.0)
    assert {renewal_step(polling, now=SCHEDULED + n * HOUR, jitter=0) for n in range(1, 50)} == {MINUTE}


@settings(deadline=None)
@given(
    st.timedeltas(SECOND / 100, 200 * 365 * DAY),
    st.timedeltas(-DAY, 100 * 365 * DAY),
    st.none() | st.timedeltas(-HOUR, DAY),
)
@example(HOUR, LAST_ATTEMPT, None)
@example(HOUR, LAST_ATTEMPT - SECOND / 1000, None)
def test_no_delay_comes_near_the_deadline_but_a_short_one(
    wanted: timedelta, remaining: timedelta, until: timedelta | None
) -> None:
    """A delay is at most half of the remaining time, which allows for clock errors. In the last second it is None."""
    delay = next_delay(
        wanted,
        now=SCHEDULED,
        deadline=SCHEDULED + remaining,
        until=None if until is None else SCHEDULED + until,
    )
    assert (delay is None) == (remaining < LAST_ATTEMPT)
    if delay is not None:
        assert timedelta(0) < delay <= min(wanted, remaining / 2)
        assert until is None or delay <= max(until, SECOND / 1000)


@pytest.mark.parametrize(
    ("remaining", "until", "delay"),
    [
        pytest.param(DAY, None, MINUTE, id="what is wanted"),
        pytest.param(MINUTE, None, MINUTE / 2, id="half of what remains"),
        pytest.param(DAY, 7 * SECOND, 7 * SECOND, id="until the operation may run no longer"),
        pytest.param(DAY, -SECOND, SECOND / 1000, id="it may not run any longer"),
        pytest.param(SECOND, None, SECOND / 2, id="the last attempt"),
        pytest.param(SECOND / 2, None, None, id="too late for another"),
        pytest.param(-HOUR, None, None, id="past the deadline"),
    ],
)
def test_a_delay_is_what_is_wanted_or_what_fits(
    remaining: timedelta, until: timedelta | None, delay: timedelta | None
) -> None:
    """The rule is the same for renewals, polls and handlers that were not reached."""
    limit = None if until is None else SCHEDULED + until
    assert next_delay(MINUTE, now=SCHEDULED, deadline=SCHEDULED + remaining, until=limit) == delay


def test_the_longest_steps_can_be_computed() -> None:
    """A call that waits a century with the largest coefficient causes no overflow."""
    century = 36_525 * DAY
    one = call(deadline=century, initial=century, coefficient=1000)
    assert renewal_step(one, now=SCHEDULED + century, jitter=1) == century * 1.1


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (7, 30), (5000, 30)]
)
def test_an_unreached_handler_is_tried_again_soon(attempt: int, seconds: int) -> None:
    """The delay is 1 s, doubled up to 30 s."""
    assert unreached_step(attempt, retry_after=timedelta(0)) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("retry_after", "delay"),
    [
        pytest.param(timedelta(0), timedelta(seconds=4), id="sooner than our step"),
        pytest.param(timedelta(seconds=7), timedelta(seconds=7), id="later than our step"),
        pytest.param(5 * HOUR, HOUR, id="more than an hour"),
    ],
)
def test_a_handler_may_name_the_delay(retry_after: timedelta, delay: timedelta) -> None:
    """The caller follows `Retry-After`, up to an hour."""
    assert unreached_step(3, retry_after=retry_after) == delay
