"""The wire's alphabet: paths, durations, instants and states."""

from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import unquote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.errors import (
    RemoteProtocolError,
)
from bridge.protocol.headers import (
    OperationState,
    decode_duration,
    decode_instant,
    decode_retry_after,
    decode_wait,
    encode_duration,
    encode_http_date,
    encode_instant,
    encode_wait,
    operation_path,
    require_state,
)
from tests.support.helpers import multi

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
JSON = {"Content-Type": "application/json"}
ANY_TEXT = st.text(st.characters())


@pytest.mark.parametrize(
    ("service", "operation", "path"),
    [
        pytest.param("PaymentService", "process", "/PaymentService/process", id="plain"),
        pytest.param("a/b", "c d,e", "/a%2Fb/c%20d,e", id="slash, space, comma"),
        pytest.param("+=:@&$", "~-._", "/+=:@&$/~-._", id="reserved and unreserved"),
        pytest.param("{a}", "[b];c(d)!*'", "/%7Ba%7D/%5Bb%5D;c(d)!*'", id="braces, brackets, sub-delimiters"),
        pytest.param("\u00e9", "%2F", "/%C3%A9/%252F", id="beyond ASCII, percent"),
    ],
)
def test_service_and_operation_are_one_segment_each(service: str, operation: str, path: str) -> None:
    """Names may hold any character; the path is in normal form, because it is signed."""
    assert operation_path(service, operation) == path


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_name_comes_back_from_its_path(service: str, operation: str) -> None:
    """Percent rules only, so that a plus stays a plus."""
    empty, first, second = operation_path(service, operation).split("/")
    assert (empty, unquote(first), unquote(second)) == ("", service, operation)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("9999ms", timedelta(milliseconds=9999), id="milliseconds"),
        pytest.param("10s", timedelta(seconds=10), id="seconds"),
        pytest.param("1.5m", timedelta(seconds=90), id="minutes with a fraction"),
        pytest.param("0s", timedelta(0), id="Go's zero"),
        pytest.param("29.998187917s", timedelta(seconds=29.998188), id="Go, nanoseconds"),
        pytest.param("1m29.9s", timedelta(seconds=89.9), id="Go, minutes"),
        pytest.param("1h0m0s", timedelta(hours=1), id="Go, hours"),
        pytest.param("1.5\u00b5s", timedelta(microseconds=2), id="Go, microseconds"),
        pytest.param("150us", timedelta(microseconds=150), id="microseconds in ASCII"),
        pytest.param("999ns", timedelta(microseconds=1), id="nanoseconds"),
        pytest.param("2562047h47m16.5s", timedelta(seconds=9223372036.5), id="Go's longest"),
        pytest.param("", None, id="empty"),
        pytest.param("10", None, id="no unit"),
        pytest.param("s", None, id="no number"),
        pytest.param("-1s", None, id="negative"),
        pytest.param("+1s", None, id="plus sign"),
        pytest.param("1 s", None, id="blank inside"),
        pytest.param(" 1s", None, id="blank before"),
        pytest.param("1s,", None, id="rest"),
        pytest.param("1d", None, id="days"),
        pytest.param("1S", None, id="capital"),
        pytest.param("1.s", None, id="no digits behind the point"),
        pytest.param("1e3s", None, id="exponent"),
        pytest.param("\u0661s", None, id="digits of another script"),
        pytest.param("infs", None, id="infinite"),
        pytest.param("1s" * 40, None, id="too long a text"),
        pytest.param("9" * 60 + "h", None, id="beyond every clock"),
        pytest.param("70000000h", None, id="beyond the last date"),
    ],
)
def test_a_duration_is_read_leniently(text: str, expected: timedelta | None) -> None:
    """The spec's grammar and Go's; anything else is None."""
    assert decode_duration(text) == expected


@pytest.mark.parametrize(
    ("duration", "text"),
    [
        pytest.param(timedelta(seconds=10), "10000ms", id="seconds"),
        pytest.param(timedelta(hours=1), "3600000ms", id="an hour"),
        pytest.param(timedelta(microseconds=1500), "2ms", id="rounded"),
        pytest.param(timedelta(seconds=-1), "0ms", id="already over"),
    ],
)
def test_a_duration_is_written_in_whole_milliseconds(duration: timedelta, text: str) -> None:
    """Temporal refuses an hour spelled as `1h`."""
    assert encode_duration(duration) == text


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=3650)))
def test_a_written_duration_is_read_back(duration: timedelta) -> None:
    """To the millisecond."""
    decoded = decode_duration(encode_duration(duration))
    assert decoded is not None
    assert abs(decoded - duration) <= timedelta(microseconds=501)


@given(ANY_TEXT | st.from_regex(r"(\d+(\.\d+)?(h|m|s|ms|us|ns))+", fullmatch=True))
def test_any_duration_can_be_added_to_the_time_of_day(text: str) -> None:
    """What a peer names never makes a deadline overflow."""
    assert NOON + (decode_duration(text) or timedelta(0)) >= NOON


def test_a_start_time_is_an_imf_fixdate() -> None:
    """Go's reader requires the literal GMT and whole seconds, for a time in any zone."""
    berlin = datetime(2026, 11, 23, 15, 39, 21, 415_000, tzinfo=timezone(timedelta(hours=1)))
    assert encode_http_date(berlin) == "Mon, 23 Nov 2026 14:39:21 GMT"


def test_an_instant_is_written_in_utc_with_milliseconds() -> None:
    """RFC 3339 with a Z."""
    berlin = datetime(2026, 11, 23, 15, 39, 27, 415_999, tzinfo=timezone(timedelta(hours=1)))
    assert encode_instant(berlin) == "2026-11-23T14:39:27.415Z"
    assert encode_instant(NOON) == "2026-11-23T12:00:00.000Z"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("2026-11-23T12:00:00Z", NOON, id="no fraction"),
        pytest.param("2026-11-23T12:00:00.000Z", NOON, id="milliseconds"),
        pytest.param("2026-11-23T12:00:00.161070999Z", NOON.replace(microsecond=161070), id="nanoseconds"),
        pytest.param("2026-11-23T12:00:00.5Z", NOON.replace(microsecond=500_000), id="one digit"),
        pytest.param("2026-11-23T13:30:00+01:30", NOON, id="offset"),
        pytest.param("2026-11-23t12:00:00z", NOON, id="small letters"),
        pytest.param("", None, id="empty"),
        pytest.param("2026-11-23T12:00:00", None, id="no zone"),
        pytest.param("2026-11-23", None, id="only a date"),
        pytest.param("20261123T120000Z", None, id="another ISO 8601"),
        pytest.param("2026-W48-1T12:00:00Z", None, id="week date"),
        pytest.param("2026-11-23T12:00:0000Z", None, id="too many digits"),
        pytest.param("2026-13-23T12:00:00Z", None, id="no such month"),
        pytest.param("Mon, 23 Nov 2026 12:00:00 GMT", None, id="HTTP date"),
        pytest.param("0001-01-01T00:00:00+23:59", None, id="before the first date"),
        pytest.param("9999-12-31T23:59:59-23:59", None, id="after the last date"),
    ],
)
def test_an_instant_is_read_as_rfc_3339(text: str, expected: datetime | None) -> None:
    """In UTC, with up to nine digits; anything else is None."""
    assert decode_instant(text) == expected


@given(ANY_TEXT | st.from_regex(r"[0-9]{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", fullmatch=True))
def test_any_instant_is_read_or_none(text: str) -> None:
    """No text raises."""
    instant = decode_instant(text)
    assert instant is None or instant.tzinfo is UTC


@given(st.datetimes(min_value=datetime(1000, 1, 2), timezones=st.timezones(), allow_imaginary=False))  # noqa: DTZ001
@example(NOON)
def test_a_written_instant_is_read_back(instant: datetime) -> None:
    """To the millisecond, in any zone."""
    decoded = decode_instant(encode_instant(instant))
    assert decoded is not None
    assert timedelta(0) <= instant - decoded < timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("0", timedelta(0), id="at once"),
        pytest.param("7", timedelta(seconds=7), id="seconds"),
        pytest.param(" 7 ", timedelta(seconds=7), id="blanks"),
        pytest.param("999999999", timedelta(hours=1), id="capped"),
        pytest.param("Mon, 23 Nov 2026 12:00:30 GMT", None, id="date"),
        pytest.param("", None, id="empty"),
        pytest.param("-7", None, id="negative"),
        pytest.param("7.5", None, id="fraction"),
        pytest.param("soon", None, id="a word"),
        pytest.param("\u0667", None, id="digits of another script"),
    ],
)
def test_a_wait_is_read_as_seconds(text: str, expected: timedelta | None) -> None:
    """At most an hour, never negative, None where none can be read."""
    assert decode_retry_after(multi({"retry-after": text})) == expected


def test_no_wait_is_none() -> None:
    """Most answers name none."""
    assert decode_retry_after({}) is None


@given(ANY_TEXT | st.integers().map(str))
def test_any_wait_is_within_the_hour_or_none(text: str) -> None:
    """No text raises, and none makes us wait longer than an hour."""
    wait = decode_retry_after({"Retry-After": text})
    assert wait is None or timedelta(0) <= wait <= timedelta(hours=1)


@pytest.mark.parametrize("state", [OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELED])
def test_a_final_state_is_read(state: OperationState) -> None:
    """The three states of a completion."""
    assert require_state(state.value) is state


@pytest.mark.parametrize("text", [None, "", "running", "SUCCEEDED", " failed", "cancelled", "\udcff"])
def test_no_other_state_ends_an_operation(text: str | None) -> None:
    """Missing, running or misspelled: the peer broke the protocol."""
    with pytest.raises(RemoteProtocolError):
        require_state(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("wait=5", 5),
        ("Wait=10", 10),
        ("respond-async, wait=10", 10),
        ("respond-async; wait=1, handling=lenient", 1),
        ('wait = "7"', 7),
        ("wait=0", None),
        ("wait=-1", None),
        ("wait=5s", None),
        ("wait=1.5", None),
        ("await=5", None),
        ("wait", None),
        ("wait=9999999", None),
        ("", None),
    ],
)
def test_a_preference_to_wait_is_read_leniently(text: str, seconds: int | None) -> None:
    """RFC 7240: several preferences in one line, any order; what cannot be read is no preference."""
    assert decode_wait(text) == (None if seconds is None else timedelta(seconds=seconds))


def test_a_preference_to_wait_is_written_in_whole_seconds() -> None:
    """RFC 7240 knows no fractions."""
    assert encode_wait(timedelta(seconds=4.9)) == "wait=4"
