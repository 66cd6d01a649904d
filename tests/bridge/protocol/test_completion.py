"""The completion, written and read."""

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.completion import Completion, decode_completion, encode_completion
from bridge.protocol.headers import OperationState
from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from tests.support.helpers import multi

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
    """Reading gives the completion that was written."""
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
