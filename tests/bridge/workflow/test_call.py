"""How a waiting call paces itself: few requests, none too late, whatever the jitter."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.workflow.call import (
    DEADLINE_MARGIN,
    LAST_POLL,
    LAST_RENEWAL,
    OperationCall,
    Renewals,
    poll_delay,
    renewal_delay,
    unreached_delay,
)

SCHEDULED = datetime(2026, 11, 23, 12, tzinfo=UTC)
LEASE = timedelta(seconds=30)
RETRY_INTERVAL = timedelta(seconds=1)
"""Between the end of the first lease and the attempt after it, by the activity's retry policy."""
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
    """When each request is sent, counted from the schedule; the handler always answers that it still runs."""
    yield timedelta(0)
    elapsed = timedelta(milliseconds=one.first_lease_ms) + RETRY_INTERVAL
    while elapsed < one.deadline - SCHEDULED:
        yield elapsed
        elapsed += latency
        delay = renewal_delay(one, now=SCHEDULED + elapsed, jitter=next(jitters))
        if delay is None:
            return
        elapsed += delay


def steady(jitter: float) -> Iterator[float]:
    while True:
        yield jitter


def test_a_call_knows_its_times() -> None:
    """Milliseconds in history, aware instants in code."""
    one = call(deadline=DAY)
    assert one.scheduled_time == SCHEDULED
    assert one.deadline == SCHEDULED + DAY


def test_the_schedule_without_jitter() -> None:
    """After the first lease of 30 s: about 1, 2, 4, 8, 16, 32 minutes apart, then every hour."""
    sent = [each for each in requests(call(deadline=DAY), steady(0)) if each < 5 * HOUR]
    gaps = [later - earlier for earlier, later in pairwise(sent)]
    assert gaps[0] == timedelta(seconds=31)
    assert gaps[1:7] == [MINUTE * 2**power for power in range(6)]
    assert set(gaps[7:]) == {HOUR}


@given(st.lists(st.floats(-1, 1), min_size=200, max_size=200), st.integers(0, 10_000))
@example([-1.0] * 200, 0)
@example([1.0] * 200, 0)
@example([-1.0, 1.0] * 100, 10_000)
def test_a_day_of_waiting_costs_few_requests(jitters: list[float], latency_ms: int) -> None:
    """At most 12 in the first hour and 40 in a day, whatever the jitter and however slow the answers."""
    sent = list(requests(call(deadline=30 * DAY), iter(jitters * 10), latency=timedelta(milliseconds=latency_ms)))
    assert len([each for each in sent if each < HOUR]) <= 12
    for start in sent[:20]:
        assert len([each for each in sent if start <= each < start + DAY]) <= 40


@given(st.lists(st.floats(-1, 1), min_size=20, max_size=20))
def test_no_jitter_repeats_or_skips_a_step(jitters: list[float]) -> None:
    """Each delay is its own step, moved by a tenth at most."""
    sent = list(requests(call(), iter(jitters * 20)))
    steps = [MINUTE * 2**power for power in range(6)]
    for step, (earlier, later) in zip(steps, pairwise(sent[1:]), strict=False):
        assert 0.899 * step <= later - earlier <= 1.101 * step


def test_a_long_outage_does_not_bring_the_first_steps_back() -> None:
    """The step follows the time that has passed, not the attempts: a reset of the activity changes only those."""
    assert renewal_delay(call(), now=SCHEDULED + DAY, jitter=0) == HOUR
    assert renewal_delay(call(), now=SCHEDULED + 4 * MINUTE, jitter=0) == 4 * MINUTE


def test_a_coefficient_of_one_keeps_the_first_step() -> None:
    """A fixed interval: polling."""
    polling = call(initial=MINUTE, coefficient=1.0)
    assert {renewal_delay(polling, now=SCHEDULED + n * HOUR, jitter=0) for n in range(1, 50)} == {MINUTE}


DURATIONS = st.timedeltas(timedelta(0), 8 * DAY)


@given(DURATIONS, DURATIONS, st.floats(-1, 1), st.timedeltas(SECOND, 3 * DAY), st.floats(1, 10))
@example(7 * DAY - LAST_RENEWAL, 7 * DAY, 0.0, MINUTE, 2.0)
@example(7 * DAY - LAST_RENEWAL + SECOND / 1000, 7 * DAY, 1.0, MINUTE, 2.0)
def test_a_renewal_ends_in_time_or_is_none(
    elapsed: timedelta, deadline: timedelta, jitter: float, initial: timedelta, coefficient: float
) -> None:
    """Never within the last 5 s; with less than 10 s left the attempt waits for the callback."""
    one = call(deadline=deadline, initial=initial, coefficient=coefficient)
    remaining = one.deadline - (SCHEDULED + elapsed)
    delay = renewal_delay(one, now=SCHEDULED + elapsed, jitter=jitter)
    assert (delay is None) == (remaining < LAST_RENEWAL)
    if delay is not None:
        assert timedelta(0) < delay <= remaining - DEADLINE_MARGIN


@pytest.mark.parametrize(
    ("left", "delay"),
    [
        pytest.param(timedelta(0), None, id="at the deadline"),
        pytest.param(-HOUR, None, id="past it"),
        pytest.param(timedelta(seconds=9.999), None, id="less than ten seconds"),
        pytest.param(timedelta(seconds=10), timedelta(seconds=5), id="ten seconds"),
        pytest.param(timedelta(minutes=30), timedelta(minutes=30) - DEADLINE_MARGIN, id="less than a step"),
    ],
)
def test_the_last_renewal_is_five_seconds_before_the_deadline(left: timedelta, delay: timedelta | None) -> None:
    """A delay that reached past the deadline would end the activity at once, with the wrong error."""
    one = call()
    assert renewal_delay(one, now=one.deadline - left, jitter=1) == delay


@pytest.mark.parametrize(
    ("attempt", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 30), (7, 30), (5000, 30)]
)
def test_an_unreached_handler_is_tried_again_soon(attempt: int, seconds: int) -> None:
    """1 s, doubled up to 30 s."""
    assert unreached_delay(attempt, retry_after=None, remaining=DAY) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("retry_after", "delay"),
    [
        pytest.param(timedelta(0), timedelta(seconds=4), id="sooner than our step"),
        pytest.param(timedelta(seconds=7), timedelta(seconds=7), id="later than our step"),
        pytest.param(5 * HOUR, HOUR, id="more than an hour"),
    ],
)
def test_an_unreached_handler_names_its_own_wait(retry_after: timedelta, delay: timedelta) -> None:
    """It is obeyed, within reason."""
    assert unreached_delay(3, retry_after=retry_after, remaining=DAY) == delay


@pytest.mark.parametrize(
    ("remaining", "delay"),
    [
        pytest.param(timedelta(seconds=20), timedelta(seconds=15), id="shortened"),
        pytest.param(timedelta(seconds=10), timedelta(seconds=5), id="shortened to the last moment"),
        pytest.param(timedelta(seconds=9), None, id="too late"),
        pytest.param(timedelta(0), None, id="at the deadline"),
        pytest.param(-HOUR, None, id="past it"),
    ],
)
def test_a_wait_for_the_handler_ends_in_time(remaining: timedelta, delay: timedelta | None) -> None:
    """Else the attempt waits for a callback that may yet come."""
    assert unreached_delay(6, retry_after=None, remaining=remaining) == delay


@given(st.integers(1, 10_000), st.none() | st.timedeltas(timedelta(0), DAY), st.timedeltas(-DAY, 3 * DAY))
def test_any_wait_for_the_handler_ends_in_time_or_is_none(
    attempt: int, retry_after: timedelta | None, remaining: timedelta
) -> None:
    """Five seconds before the deadline while there is room, before it always; a short call is tried again too."""
    delay = unreached_delay(attempt, retry_after=retry_after, remaining=remaining)
    if delay is None:
        assert remaining < LAST_RENEWAL
    else:
        assert timedelta(0) < delay < remaining
        assert remaining < LAST_RENEWAL or delay <= remaining - DEADLINE_MARGIN


@pytest.mark.parametrize(
    ("initial", "coefficient", "maximum"),
    [
        pytest.param(timedelta(0), 2.0, HOUR, id="no delay"),
        pytest.param(-MINUTE, 2.0, HOUR, id="negative delay"),
        pytest.param(HOUR, 2.0, MINUTE, id="maximum below the initial"),
        pytest.param(MINUTE, 0.5, HOUR, id="ever sooner"),
        pytest.param(MINUTE, float("nan"), HOUR, id="not a number"),
        pytest.param(MINUTE, float("inf"), HOUR, id="infinite"),
        pytest.param(MINUTE, 1e300, HOUR, id="more than a duration can hold"),
    ],
)
def test_renewals_without_sense_are_refused(initial: timedelta, coefficient: float, maximum: timedelta) -> None:
    """At import of the workflow, not in the middle of a call."""
    with pytest.raises(ValueError, match="renewals"):
        Renewals(initial=initial, coefficient=coefficient, maximum=maximum)


@pytest.mark.parametrize(
    ("left", "until", "delay"),
    [
        pytest.param(HOUR, HOUR, 5 * SECOND, id="the interval"),
        pytest.param(4 * SECOND, 4 * SECOND, 3 * SECOND, id="the last one is a second before the deadline"),
        pytest.param(1.9 * SECOND, HOUR, None, id="too late for another"),
        pytest.param(HOUR, 2 * SECOND, 2 * SECOND, id="until the operation may run no longer"),
        pytest.param(HOUR, -SECOND, LAST_POLL, id="which it may not any more"),
    ],
)
def test_a_poll_comes_at_a_fixed_interval_and_in_time(
    left: timedelta, until: timedelta, delay: timedelta | None
) -> None:
    """No jitter and no growth: whoever polls has said how often."""
    one = call(deadline=HOUR)
    now = one.deadline - left
    assert poll_delay(one, now=now, interval=5 * SECOND, until=now + until) == delay


def test_the_default_renewals_are_those_of_the_schedule() -> None:
    """One minute, doubled, up to an hour."""
    assert Renewals() == Renewals(initial=MINUTE, coefficient=2.0, maximum=HOUR)
