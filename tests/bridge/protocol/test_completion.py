"""The completion and what its receiver's answer asks of the sender."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.completion import Completion, DeliveryAnswer, classify_answer, decode_completion, encode_completion
from bridge.protocol.headers import OperationState
from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from tests.support.helpers import multi

ACCEPTED, AGAIN_LATER = DeliveryAnswer.ACCEPTED, DeliveryAnswer.AGAIN_LATER
GONE, REFUSED = DeliveryAnswer.GONE, DeliveryAnswer.REFUSED

JSON = {"Content-Type": "application/json"}
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
STARTED = datetime(2026, 11, 23, 14, 39, 21, 999_000, tzinfo=UTC)
CLOSED = datetime(2026, 11, 23, 14, 39, 27, 415_000, tzinfo=UTC)
PAID = Payload(metadata={"encoding": b"json/plain"}, data=b'{"payment_id":"p-1","status":"paid"}')
TARGET = WorkflowRef(namespace="payment-prod", workflow_id="payment-7", run_id="02b3")


def declined() -> Failure:
    failure = Failure(message="card declined")
    failure.application_failure_info.type = "Declined"
    return failure


def stopped() -> Failure:
    failure = Failure(message="operation canceled")
    failure.canceled_failure_info.SetInParent()
    return failure


def completion(outcome: Outcome | None = None, **changes: Any) -> Completion:
    members: dict[str, Any] = {
        "outcome": outcome or Outcome.succeeded(PAID),
        "target": TARGET,
        "operation_token": "eyJ0",
        "start_time": STARTED,
        "close_time": CLOSED,
    }
    return Completion(**members | changes)


def test_a_completion_is_written_as_the_protocol_has_it() -> None:
    """The worked example."""
    headers, body = encode_completion(
        completion(), callback_headers={"source": "5b00", "temporal-callback-token": "{}"}
    )
    assert body == PAID.data
    assert headers == {
        "Source": "5b00",
        "Temporal-Callback-Token": "{}",
        "Nexus-Operation-State": "succeeded",
        "Nexus-Operation-Token": "eyJ0",
        "Nexus-Operation-Start-Time": "Mon, 23 Nov 2026 14:39:21 GMT",
        "Nexus-Operation-Close-Time": "2026-11-23T14:39:27.415Z",
        "Nexus-Link": f'<{TARGET.to_link().url}>; type="temporal.api.common.v1.Link.WorkflowEvent"',
        "Content-Type": "application/json",
    }


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        pytest.param(Outcome.succeeded(PAID), "succeeded", id="succeeded"),
        pytest.param(Outcome.failed(declined()), "failed", id="failed"),
        pytest.param(Outcome.canceled(stopped()), "canceled", id="canceled"),
    ],
)
def test_a_completion_comes_back_from_the_wire(outcome: Outcome, state: str) -> None:
    """The outcome, who ended so, its token and its close."""
    headers, body = encode_completion(completion(outcome), callback_headers={})
    assert headers["Nexus-Operation-State"] == state
    assert decode_completion(multi(headers), [headers["Nexus-Link"]], body) == completion(outcome, start_time=None)


def test_a_completion_says_nothing_that_it_does_not_know() -> None:
    """A target without result, token, times or link: the state alone."""
    bare = Completion(outcome=Outcome.succeeded(None), target=None)
    assert encode_completion(bare, callback_headers={}) == ({"Nexus-Operation-State": "succeeded"}, b"")


def test_a_completion_of_an_old_server_is_read() -> None:
    """1.29 sends neither token nor close time, and a null result without a content type."""
    headers = multi(
        {"nexus-operation-state": "succeeded", "nexus-operation-start-time": "Mon, 23 Nov 2026 14:39:21 GMT"}
    )
    null = Payload(metadata={"encoding": b"binary/null"})
    assert decode_completion(headers, [], b"") == Completion(outcome=Outcome.succeeded(null), target=None)


def test_nine_digits_of_a_close_time_are_read() -> None:
    """As servers from 1.31 send it."""
    headers = multi(
        {"Nexus-Operation-State": "succeeded", "Nexus-Operation-Close-Time": "2026-11-23T15:12:21.848161070Z"}
    )
    assert decode_completion(headers, [], b"").close_time == datetime(2026, 11, 23, 15, 12, 21, 848161, tzinfo=UTC)


def test_what_is_only_information_spoils_no_completion() -> None:
    """An outcome is not refused for a bad link or time."""
    headers = multi({"Nexus-Operation-State": "succeeded", "Nexus-Operation-Close-Time": "0001-01-01T00:00:00+23:59"})
    assert decode_completion(headers, ["nonsense"], b"").close_time is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param({}, b"", id="no state"),
        pytest.param({"Nexus-Operation-State": "running"}, b"", id="still running"),
        pytest.param({"Nexus-Operation-State": "done"}, b"", id="unknown state"),
        pytest.param({"Nexus-Operation-State": "failed"}, b'{"message":"m"}', id="failure without a type"),
        pytest.param({"Nexus-Operation-State": "canceled"} | JSON, b"{", id="cancellation without JSON"),
        pytest.param(
            {"Nexus-Operation-State": "succeeded", "Content-Type": "application/x-temporal-payload"},
            b"\xff",
            id="unparsable payload",
        ),
    ],
)
def test_a_completion_without_a_clear_outcome_is_refused(headers: dict[str, str], body: bytes) -> None:
    """An outcome is never guessed."""
    with pytest.raises(RemoteProtocolError):
        decode_completion(multi(headers), [], body)


CHOSEN = (
    "Nexus-Operation-State nexus-operation-token Nexus-Operation-Start-Time NEXUS-OPERATION-CLOSE-TIME Nexus-Link "
    "content-type Content-Length Content-Encoding content-digest Host Connection Transfer-Encoding TE"
)


@pytest.mark.parametrize("name", CHOSEN.split())
@pytest.mark.parametrize("full", [True, False])
def test_no_header_of_the_callers_choice_says_what_the_protocol_says(name: str, full: bool) -> None:
    """Else a caller could turn a failure into a success, or spoil its own result."""
    one = completion() if full else Completion(outcome=Outcome.succeeded(None), target=None)
    assert encode_completion(one, callback_headers={name: "x", "Bridge-Token": "t"}) == (
        encode_completion(one, callback_headers={"Bridge-Token": "t"})
    )


@given(st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z-]{0,20}", fullmatch=True), st.text(max_size=5)))
def test_any_callback_headers_leave_the_outcome_as_it_is(chosen: dict[str, str]) -> None:
    """What is read is what was told."""
    headers, body = encode_completion(completion(), callback_headers=chosen)
    assert decode_completion(multi(headers), [headers["Nexus-Link"]], body) == completion(start_time=None)


@given(
    st.dictionaries(
        st.sampled_from(["Nexus-Operation-State", "Content-Type", "Nexus-Operation-Close-Time"]),
        st.sampled_from(["succeeded", "failed", "canceled", "application/json"]) | st.text(),
    ),
    st.lists(st.text()),
    st.binary() | st.sampled_from([b"{}", b'{"message":"m"}']),
)
def test_any_completion_is_read_or_refused(headers: dict[str, str], links: list[str], body: bytes) -> None:
    """Nothing but a protocol error."""
    try:
        decoded = decode_completion(headers, links, body)
    except RemoteProtocolError:
        return
    assert decoded.outcome.state is not OperationState.RUNNING


def told(kind: str, **details: Any) -> bytes:
    return json.dumps({"metadata": {"type": "nexus.HandlerError"}, "details": {"type": kind, **details}}).encode()


def classify(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[DeliveryAnswer, timedelta | None]:
    return classify_answer(status, multi(JSON | dict(headers or {})), body, now=NOON)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *[pytest.param(status, ACCEPTED, id=f"{status}") for status in (200, 201, 202, 204, 299)],
        *[pytest.param(status, REFUSED, id=f"{status}") for status in (300, 301, 302, 303, 304, 307, 308)],
        *[pytest.param(status, REFUSED, id=f"{status}") for status in (400, 401, 403)],
        *[
            pytest.param(status, REFUSED, id=f"{status}")
            for status in (402, 405, 406, 411, 413, 415, 418, 422, 431, 451)
        ],
        *[pytest.param(status, GONE, id=f"{status}") for status in (404, 409, 410)],
        *[pytest.param(status, AGAIN_LATER, id=f"{status}") for status in (408, 425, 429)],
        *[pytest.param(status, AGAIN_LATER, id=f"{status}") for status in (500, 502, 503, 504, 507, 520, 599)],
        pytest.param(501, REFUSED, id="501"),
    ],
)
def test_a_status_tells_what_becomes_of_the_delivery(status: int, expected: DeliveryAnswer) -> None:
    """The whole table, for a receiver that sends nothing but a status."""
    assert classify(status) == (expected, None)


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        pytest.param(503, {}, told("BAD_REQUEST"), REFUSED, id="503, final type"),
        pytest.param(502, {}, told("UNAUTHENTICATED"), REFUSED, id="502, final type"),
        pytest.param(500, {}, told("INTERNAL", retryableOverride=False), REFUSED, id="500, override in the body"),
        pytest.param(400, {}, told("UNAVAILABLE"), AGAIN_LATER, id="400, retryable type"),
        pytest.param(405, {}, told("UNAVAILABLE"), AGAIN_LATER, id="405, retryable type"),
        pytest.param(404, {}, told("UNAVAILABLE"), AGAIN_LATER, id="404, retryable type"),
        pytest.param(501, {}, told("UNAVAILABLE"), AGAIN_LATER, id="501, retryable type"),
        pytest.param(405, {}, told("BAD_REQUEST"), REFUSED, id="405, final type"),
        pytest.param(410, {}, told("NOT_FOUND"), GONE, id="410, final type"),
        pytest.param(410, {}, told("UNAVAILABLE"), GONE, id="410 is final whatever it says"),
        pytest.param(413, {}, told("RESOURCE_EXHAUSTED"), REFUSED, id="413 is final whatever it says"),
        pytest.param(422, {"Nexus-Request-Retryable": "true"}, b"", REFUSED, id="422 is final whatever it says"),
        pytest.param(307, {"Nexus-Request-Retryable": "true"}, b"", REFUSED, id="a redirect is final whatever it says"),
        pytest.param(400, {"Nexus-Request-Retryable": "true"}, b"", AGAIN_LATER, id="400, header says yes"),
        pytest.param(404, {}, told("NOT_FOUND"), GONE, id="404, final type"),
        pytest.param(404, {}, b'{"message":"stale reference"}', GONE, id="404, as Temporal's server has it"),
        pytest.param(404, {"Content-Type": "text/html"}, b"<html>", AGAIN_LATER, id="404, a proxy's page"),
        pytest.param(404, {"Content-Type": ""}, b"", AGAIN_LATER, id="404, a proxy's word"),
        pytest.param(404, {"Nexus-Request-Retryable": "true"}, b"", AGAIN_LATER, id="404, header says yes"),
        pytest.param(409, {"Nexus-Request-Retryable": "true"}, b"", AGAIN_LATER, id="409, header says yes"),
        pytest.param(501, {"Nexus-Request-Retryable": "true"}, b"", AGAIN_LATER, id="501, header says yes"),
        pytest.param(503, {"Nexus-Request-Retryable": "false"}, b"", REFUSED, id="503, header says no"),
        pytest.param(502, {"Nexus-Request-Retryable": "false"}, b"", AGAIN_LATER, id="502 has no type to override"),
        pytest.param(
            400,
            {"Nexus-Request-Retryable": "true"},
            told("BAD_REQUEST", retryableOverride=False),
            REFUSED,
            id="body beats header",
        ),
        pytest.param(400, {}, b"<html>", REFUSED, id="400, a proxy's page"),
        pytest.param(503, {}, b'{"message":"m"}', AGAIN_LATER, id="503, any Failure"),
    ],
)
def test_a_type_or_a_hint_beats_the_status(
    status: int, headers: dict[str, str], body: bytes, expected: DeliveryAnswer
) -> None:
    """The body beats the header, the header the status; 410, 413, 422 and redirects are final all the same."""
    assert classify(status, body, headers)[0] is expected


@pytest.mark.parametrize(
    ("status", "wait"),
    [
        pytest.param(503, timedelta(seconds=7), id="again later"),
        pytest.param(429, timedelta(seconds=7), id="overloaded"),
        pytest.param(200, None, id="accepted"),
        pytest.param(404, None, id="gone"),
        pytest.param(400, None, id="refused"),
    ],
)
def test_a_wait_is_obeyed_where_there_is_another_try(status: int, wait: timedelta | None) -> None:
    """`Retry-After` is not part of Nexus; our sender obeys it."""
    assert classify(status, headers={"Retry-After": "7"})[1] == wait


@given(
    st.integers(200, 999),
    st.dictionaries(
        st.sampled_from(["Retry-After", "Nexus-Request-Retryable", "Content-Type"]),
        st.sampled_from(["application/json", "true", "false", "7"]) | st.text(),
    ),
    st.binary() | st.sampled_from([told("NOT_FOUND"), told("UNAVAILABLE"), told("X")]),
)
def test_any_answer_is_one_of_the_four(status: int, headers: dict[str, str], body: bytes) -> None:
    """Accepted by a 2xx and by nothing else; a wait only where there is another try."""
    answer, wait = classify_answer(status, headers, body, now=NOON)
    assert (answer is ACCEPTED) == (status < 300)
    assert wait is None or (answer is AGAIN_LATER and timedelta(0) <= wait <= timedelta(hours=1))
