"""The records of a call that workflow and activity share."""

from datetime import UTC, datetime, timedelta

import pytest

from bridge.workflow.call import OperationCall, Renewals

SCHEDULED = datetime(2026, 11, 23, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


def test_a_call_knows_its_times() -> None:
    """Milliseconds in history, aware instants in code."""
    one = OperationCall(
        endpoint="payments",
        service="PaymentService",
        operation="process",
        scheduled_time_ms=int(SCHEDULED.timestamp() * 1000),
        schedule_to_close_ms=86_400_000,
        first_lease_ms=1,
        renewal_initial_ms=1,
        renewal_maximum_ms=1,
        renewal_coefficient=1,
    )
    assert one.scheduled_time == SCHEDULED
    assert one.deadline == SCHEDULED + DAY


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


def test_the_default_renewals_are_those_of_the_schedule() -> None:
    """One minute, doubled, up to an hour."""
    assert Renewals() == Renewals(initial=MINUTE, coefficient=2.0, maximum=HOUR)
