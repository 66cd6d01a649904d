"""Outcomes as HTTP content: the state decides how the content is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.headers import OperationState
from bridge.protocol.outcome import OUTCOME_TOO_LARGE, Outcome, decode_outcome, encode_outcome, too_large
from bridge.protocol.payload import MAX_BODY_BYTES, MAX_PAYLOAD_BYTES
from tests.support.helpers import multi

NULL = Payload(metadata={"encoding": b"binary/null"})
JSON = {"Content-Type": "application/json"}


def declined() -> Failure:
    failure = Failure(message="card declined", stack_trace="s")
    failure.application_failure_info.type = "Declined"
    failure.cause.message = "issuer said no"
    return failure


def canceled() -> Failure:
    failure = Failure(message="operation canceled")
    failure.canceled_failure_info.details.payloads.add(data=b"x")
    return failure


OUTCOMES = [
    pytest.param(Outcome.succeeded(Payload(metadata={"encoding": b"json/plain"}, data=b"{}")), id="succeeded"),
    pytest.param(Outcome.succeeded(Payload(metadata={"encoding": b"binary/encrypted"}, data=b"x")), id="encrypted"),
    pytest.param(Outcome.succeeded(NULL), id="null"),
    pytest.param(Outcome.failed(declined()), id="failed"),
    pytest.param(Outcome.canceled(canceled()), id="canceled"),
]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_an_outcome_comes_back_from_its_content(outcome: Outcome) -> None:
    """Result and failure cross as they are."""
    headers, body = encode_outcome(outcome)
    assert decode_outcome(outcome.state, multi(headers), body) == outcome


def test_no_result_arrives_as_null() -> None:
    """A target without a result sends neither body nor type."""
    headers, body = encode_outcome(Outcome.succeeded(None))
    assert (headers, body) == ({}, b"")
    assert decode_outcome(OperationState.SUCCEEDED, headers, body) == Outcome.succeeded(NULL)


def test_a_failure_is_sent_as_bare_json() -> None:
    """Its content type carries no parameter."""
    assert encode_outcome(Outcome.failed(declined()))[0] == JSON


@pytest.mark.parametrize("member", ["message", "stack_trace"])
@pytest.mark.parametrize("state", [OperationState.FAILED, OperationState.CANCELED])
def test_a_failure_whose_json_no_reader_accepts_is_replaced(member: str, state: OperationState) -> None:
    """JSON spells a control character in six bytes, and the stack trace twice. A caller must learn the ending."""
    failure = canceled() if state is OperationState.CANCELED else declined()
    setattr(failure, member, "\x1b" * 1_000_000)
    outcome = Outcome(state=state, failure=failure)
    assert outcome.within_size_limit() is outcome
    headers, body = encode_outcome(outcome)
    assert len(body) <= MAX_BODY_BYTES
    arrived = decode_outcome(state, multi(headers), body)
    assert arrived.failure is not None
    assert "over the limit" in arrived.failure.message


def test_a_cancellation_is_made_where_there_is_none() -> None:
    """The failure becomes a cancellation, because the state is canceled, and keeps its message."""
    outcome = Outcome.canceled(Failure(message="stopped"))
    assert outcome.failure is not None
    assert outcome.failure.HasField("canceled_failure_info")
    assert outcome.failure.message == "stopped"


def test_a_cancellation_keeps_its_details() -> None:
    """What is a cancellation already stays as it is."""
    assert Outcome.canceled(canceled()).failure == canceled()


@pytest.mark.parametrize("state", [OperationState.FAILED, OperationState.CANCELED])
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param({}, b"", id="nothing"),
        pytest.param({}, b'{"message":"m"}', id="no content type"),
        pytest.param({"Content-Type": "text/plain"}, b'{"message":"m"}', id="text"),
        pytest.param({"Content-Type": "application/problem+json"}, b'{"message":"m"}', id="other json"),
        pytest.param(JSON, b"", id="no body"),
        pytest.param(JSON, b"[]", id="no Failure"),
    ],
)
def test_a_bad_ending_needs_a_failure(state: OperationState, headers: dict[str, str], body: bytes) -> None:
    """An outcome is never guessed."""
    with pytest.raises(RemoteProtocolError):
        decode_outcome(state, headers, body)


def test_a_charset_does_no_harm_to_a_failure() -> None:
    """Unlike to a payload."""
    headers = multi({"content-type": "Application/JSON; charset=utf-8"})
    outcome = decode_outcome(OperationState.FAILED, headers, b'{"message":"m"}')
    assert outcome.failure is not None
    assert outcome.failure.message == "m"


@given(
    st.sampled_from([OperationState.SUCCEEDED, OperationState.FAILED, OperationState.CANCELED]),
    st.sampled_from([{}, JSON, {"Content-Type": "application/x-temporal-payload"}]),
    st.binary() | st.sampled_from([b"{}", b"null", b'{"metadata":{"type":"temporal.api.failure.v1.Failure"}}']),
)
def test_any_content_is_an_outcome_or_refused(state: OperationState, headers: dict[str, str], body: bytes) -> None:
    """Nothing but a protocol error, and a state with its own kind of content."""
    try:
        outcome = decode_outcome(state, headers, body)
    except RemoteProtocolError:
        return
    assert outcome.state is state
    assert (outcome.failure is None) == (state is OperationState.SUCCEEDED)
    assert (outcome.result is None) != (state is OperationState.SUCCEEDED)


@pytest.mark.parametrize("outcome", [*OUTCOMES, pytest.param(Outcome.succeeded(None), id="nothing")])
def test_an_ordinary_outcome_fits(outcome: Outcome) -> None:
    """It is delivered unchanged."""
    assert outcome.within_size_limit() is outcome


def with_values(count: int) -> Failure:
    failure = Failure(message="no")
    for _ in range(count):
        metadata = {"encoding": b"json/protobuf", "messageType": b"orders.v1.Order"}
        failure.application_failure_info.details.payloads.add(metadata=metadata, data=b"{}")
    return failure


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(Outcome.succeeded(Payload(data=bytes(MAX_PAYLOAD_BYTES))), id="result"),
        pytest.param(Outcome.failed(Failure(message="x" * MAX_PAYLOAD_BYTES)), id="failure"),
        pytest.param(Outcome.failed(with_values(1001)), id="values of a failure"),
    ],
)
def test_an_outcome_over_the_limit_becomes_a_failure_that_says_so(outcome: Outcome) -> None:
    """Temporal would answer OK and then fail the activity; this failure is final and small."""
    within_size_limit = outcome.within_size_limit()
    assert within_size_limit.state is OperationState.FAILED
    assert within_size_limit.failure is not None
    assert within_size_limit.failure.application_failure_info.type == OUTCOME_TOO_LARGE
    assert within_size_limit.failure.application_failure_info.non_retryable
    assert within_size_limit.within_size_limit() is within_size_limit


def test_the_largest_outcome_still_fits() -> None:
    """The limit itself is inside."""
    payload = Payload(data=bytes(MAX_PAYLOAD_BYTES - 4))
    assert payload.ByteSize() == MAX_PAYLOAD_BYTES
    assert Outcome.succeeded(payload).within_size_limit().state is OperationState.SUCCEEDED


def test_the_largest_number_of_values_arrives() -> None:
    """The reader's limit, which holds before a body is parsed, leaves room for them and for the longest chain."""
    failure = with_values(500)
    last = failure
    for _ in range(56):
        last = last.cause
        last.message = "a cause"
    last.application_failure_info.CopyFrom(with_values(500).application_failure_info)
    outcome = Outcome.failed(failure)
    assert outcome.within_size_limit() is outcome
    headers, body = encode_outcome(outcome)
    assert decode_outcome(OperationState.FAILED, headers, body).failure == failure


def test_a_failure_too_large_names_size_and_limit() -> None:
    """What a person needs to mend it."""
    failure = too_large(7, 5).failure
    assert failure is not None
    assert failure.message == "the operation's outcome of 7 bytes is over the limit of 5 bytes"
