"""The answer to a request that failed, written and read."""

import json
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.failure.v1 import Failure

from bridge.errors import (
    OutcomeUnknownError,
    PeerHandlerError,
    UnavailableError,
    WrongHandlerError,
    bad_request,
    not_found,
)
from bridge.protocol.failure import FAILURE_TYPE, HANDLER_ERROR_TYPE, WireFailure
from bridge.protocol.handler_error import decode_handler_error, encode_handler_error
from bridge.security.redaction import readable
from tests.support.helpers import multi

JSON = {"Content-Type": "application/json"}
ANY_TEXT = st.text(st.characters())


TYPES = [
    pytest.param(HandlerErrorType.BAD_REQUEST, 400, False, id="bad request"),
    pytest.param(HandlerErrorType.UNAUTHENTICATED, 401, False, id="unauthenticated"),
    pytest.param(HandlerErrorType.UNAUTHORIZED, 403, False, id="unauthorized"),
    pytest.param(HandlerErrorType.NOT_FOUND, 404, False, id="not found"),
    pytest.param(HandlerErrorType.REQUEST_TIMEOUT, 408, True, id="request timeout"),
    pytest.param(HandlerErrorType.CONFLICT, 409, False, id="conflict"),
    pytest.param(HandlerErrorType.RESOURCE_EXHAUSTED, 429, True, id="resource exhausted"),
    pytest.param(HandlerErrorType.INTERNAL, 500, True, id="internal"),
    pytest.param(HandlerErrorType.NOT_IMPLEMENTED, 501, False, id="not implemented"),
    pytest.param(HandlerErrorType.UNAVAILABLE, 503, True, id="unavailable"),
    pytest.param(HandlerErrorType.UPSTREAM_TIMEOUT, 520, True, id="upstream timeout"),
]


@pytest.mark.parametrize(("kind", "status", "retryable"), TYPES)
def test_status_and_body_name_the_error(kind: HandlerErrorType, status: int, retryable: bool) -> None:
    """Old servers go by the status, new ones by the body: both say the same."""
    sent, headers, body = encode_handler_error(HandlerError("why", type=kind))
    assert (sent, headers) == (status, JSON)
    assert json.loads(body) == {
        "message": "why",
        "metadata": {"type": "nexus.HandlerError"},
        "details": {"type": kind.value, "retryableOverride": retryable},
    }


@pytest.mark.parametrize(("kind", "status", "retryable"), TYPES)
def test_a_status_alone_names_the_error(kind: HandlerErrorType, status: int, retryable: bool) -> None:
    """A peer may answer without a body, or with one that is no Failure."""
    for headers, body in [({}, b""), (JSON, b"{"), ({"Content-Type": "text/plain"}, b'{"message":"no"}')]:
        error = decode_handler_error(status, headers, body)
        assert (error.type, error.retryable, error.retryable_override) == (kind, retryable, None)
        assert error.message == f"answered with status {status}"


@pytest.mark.parametrize("override", [None, True, False])
@pytest.mark.parametrize(("kind", "status", "retryable"), TYPES)
def test_an_error_comes_back_with_its_retryability(
    kind: HandlerErrorType, status: int, retryable: bool, override: bool | None
) -> None:
    """An override is kept. A value that equals the default is not an override."""
    sent, headers, body = encode_handler_error(HandlerError("why", type=kind, retryable_override=override))
    assert headers.get("Nexus-Request-Retryable") == {None: None, True: "true", False: "false"}[override]
    error = decode_handler_error(sent, multi(headers), body)
    assert (sent, error.type, error.message) == (status, kind, "why")
    assert error.retryable == (retryable if override is None else override)
    assert error.retryable_override == (None if override == retryable else override)


def test_an_unknown_error_is_sent_as_internal() -> None:
    """UNKNOWN is for reading only."""
    status, _, body = encode_handler_error(HandlerError("why", type=HandlerErrorType.UNKNOWN))
    assert status == 500
    assert json.loads(body)["details"] == {"type": "INTERNAL", "retryableOverride": True}


@pytest.mark.parametrize("status", [202, 204, 302, 307, 402, 405, 410, 413, 418, 422, 502, 504, 599, 999])
def test_a_status_outside_the_table_is_unexpected_and_retryable(status: int) -> None:
    """Such an answer reports nothing about the operation."""
    error = decode_handler_error(status, {}, b"")
    assert (error.type, error.retryable) == (HandlerErrorType.UNKNOWN, True)
    assert error.message == f"unexpected answer with status {status}"


def handler_error(**details: Any) -> bytes:
    return json.dumps({"message": "m", "metadata": {"type": "nexus.HandlerError"}, "details": details}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "kind", "retryable"),
    [
        pytest.param(
            500, {}, handler_error(type="NOT_FOUND"), HandlerErrorType.NOT_FOUND, False, id="type beats status"
        ),
        pytest.param(
            410,
            {},
            handler_error(type="NOT_FOUND"),
            HandlerErrorType.NOT_FOUND,
            False,
            id="type for a status without one",
        ),
        pytest.param(
            404, {}, handler_error(type="TEAPOT"), HandlerErrorType.NOT_FOUND, False, id="unheard-of type, known status"
        ),
        pytest.param(410, {}, handler_error(type="TEAPOT"), HandlerErrorType.UNKNOWN, True, id="nothing known"),
        pytest.param(404, {}, handler_error(type=["x"]), HandlerErrorType.NOT_FOUND, False, id="type of a wrong type"),
        pytest.param(404, {}, handler_error(), HandlerErrorType.NOT_FOUND, False, id="no type"),
        pytest.param(
            500,
            {},
            handler_error(type="INTERNAL", retryableOverride=False),
            HandlerErrorType.INTERNAL,
            False,
            id="override in the body",
        ),
        pytest.param(
            500,
            {},
            handler_error(type="INTERNAL", retryableOverride="no"),
            HandlerErrorType.INTERNAL,
            True,
            id="override of a wrong type",
        ),
        pytest.param(
            404, {"Nexus-Request-Retryable": "True"}, b"", HandlerErrorType.NOT_FOUND, True, id="override in the header"
        ),
        pytest.param(
            503, {"Nexus-Request-Retryable": "false"}, b"", HandlerErrorType.UNAVAILABLE, False, id="header says no"
        ),
        pytest.param(
            503, {"Nexus-Request-Retryable": "perhaps"}, b"", HandlerErrorType.UNAVAILABLE, True, id="header unclear"
        ),
        pytest.param(
            404,
            {"Nexus-Request-Retryable": "true"},
            handler_error(type="NOT_FOUND", retryableOverride=False),
            HandlerErrorType.NOT_FOUND,
            False,
            id="body beats header",
        ),
        pytest.param(
            404,
            {},
            b'{"message":"m","details":{"type":"INTERNAL"}}',
            HandlerErrorType.NOT_FOUND,
            False,
            id="any Failure is a cause, not a type",
        ),
    ],
)
def test_body_header_and_status_decide_in_this_order(
    status: int, headers: dict[str, str], body: bytes, kind: HandlerErrorType, retryable: bool
) -> None:
    """Old and new servers put the type in different places."""
    error = decode_handler_error(status, multi(JSON | headers), body)
    assert (error.type, error.retryable) == (kind, retryable)


def test_a_charset_does_no_harm_to_an_error() -> None:
    """Unlike in a payload, a parameter of the media type changes nothing."""
    headers = multi({"content-type": "Application/JSON; charset=utf-8"})
    assert decode_handler_error(500, headers, handler_error(type="NOT_FOUND")).type is HandlerErrorType.NOT_FOUND


def test_a_long_message_is_cut() -> None:
    """A peer's text goes into our history."""
    body = json.dumps({"message": "x" * 5000}).encode()
    assert decode_handler_error(500, JSON, body).message == "x" * 1000


def test_an_unknown_outcome_is_recognized_by_its_mark() -> None:
    """Only a 404 of ours ends a call that is known to run; a proxy's 404 does not."""
    status, headers, body = encode_handler_error(OutcomeUnknownError("too old"))
    error = decode_handler_error(status, multi(headers), body)
    assert (status, error.message, error.retryable) == (404, "too old", False)
    assert isinstance(error, OutcomeUnknownError)


@pytest.mark.parametrize("text", ["x", "\x1f", "\u20ac"])
def test_a_long_message_makes_no_answer_that_the_peer_would_not_read(text: str) -> None:
    """The peer's client reads 16 KiB of the answer to a cancel. It would repeat a request with a longer answer."""
    error = HandlerError(text * 5_000_000, type=HandlerErrorType.BAD_REQUEST)
    status, headers, body = encode_handler_error(error)
    assert len(body) < 16384
    assert decode_handler_error(status, headers, body).type is HandlerErrorType.BAD_REQUEST


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(encode_handler_error(not_found("no"))[2], id="an ordinary 404 of ours"),
        pytest.param(b'{"message":"m","metadata":{"bridge":"outcome-unknown"}}', id="mark without the type"),
        pytest.param(
            b'{"metadata":{"type":"nexus.HandlerError","bridge":"other"},"details":{"type":"NOT_FOUND"}}',
            id="other mark",
        ),
        pytest.param(b"", id="a proxy's 404"),
    ],
)
def test_any_other_404_leaves_the_outcome_open(body: bytes) -> None:
    """Without the mark it is no word about the operation."""
    assert not isinstance(decode_handler_error(404, JSON, body), OutcomeUnknownError)


@pytest.mark.parametrize(
    ("wait", "seconds"),
    [
        pytest.param(timedelta(milliseconds=10), "1", id="at least one"),
        pytest.param(timedelta(seconds=30), "30", id="seconds"),
    ],
)
def test_an_overloaded_service_names_a_wait(wait: timedelta, seconds: str) -> None:
    """In whole seconds, never none at all."""
    status, headers, _ = encode_handler_error(UnavailableError("busy", retry_after=wait))
    assert (status, headers["Retry-After"]) == (503, seconds)


@given(ANY_TEXT)
@example("order '\ud800' is refused")
def test_any_message_can_be_answered(message: str) -> None:
    """A refusal may quote its input, and JSON can spell what UTF-8 cannot."""
    status, headers, body = encode_handler_error(bad_request(message))
    error = decode_handler_error(status, headers, body)
    assert error.type is HandlerErrorType.BAD_REQUEST
    assert message.isascii() is False or error.message == (readable(message, 1000) or "answered with status 400")


def test_what_a_terminal_could_obey_is_taken_out_of_an_error() -> None:
    """An escape sequence of a peer colors nothing, and no text runs backwards."""
    status, headers, body = encode_handler_error(bad_request("no \x1b[31mred\x07 \u202ekcab\r, but\n\ta tab"))
    assert (
        decode_handler_error(status, headers, body).message == "no \ufffd[31mred\ufffd \ufffdkcab\ufffd, but\n\ta tab"
    )
    for each in "\u061c\u200e\u200f\u2066":
        assert readable(f"100 {each}EUR", 99) == "100 \ufffdEUR", "a mark moves the text next to it"


@given(
    st.integers(100, 999),
    st.dictionaries(
        st.sampled_from(["Content-Type", "Nexus-Request-Retryable"]), st.sampled_from(["application/json"]) | ANY_TEXT
    ),
    st.binary() | st.dictionaries(st.text(), st.text()).map(lambda each: json.dumps(each).encode()),
)
def test_any_answer_is_an_error_of_the_protocol(status: int, headers: dict[str, str], body: bytes) -> None:
    """Any answer of a peer, a proxy or a stranger becomes an error."""
    assert isinstance(decode_handler_error(status, headers, body), HandlerError)


@pytest.mark.parametrize("encoded", range(4))
def test_a_gateways_error_text_loses_the_url_it_quotes(encoded: int) -> None:
    """What an error says stands in histories and logs; a callback URL must not.

    A gateway that sends to a login quotes the request as a parameter, and encodes it once more.
    """
    request = "/c/order?callback=https%3A%2F%2Fx%2Fcallbacks%2F1%3Fsig%3Dsecret"
    for _ in range(encoded):
        request = quote(request, safe="")
    body = json.dumps({"message": f"Cannot POST {request} now"}).encode()
    error = decode_handler_error(404, {"Content-Type": "application/json"}, body)
    assert "secret" not in error.message
    assert error.message.startswith("Cannot POST")


def caused(cause: Failure) -> HandlerError:
    error = PeerHandlerError("no", type=HandlerErrorType.BAD_REQUEST)
    error.remote_cause = cause
    return error


def test_a_cause_crosses_undecoded() -> None:
    """With its own chain, type and payloads."""
    cause = Failure(message="why", stack_trace="here")
    cause.application_failure_info.type = "Declined"
    cause.application_failure_info.details.payloads.add(metadata={"encoding": b"binary/scrambled"}, data=b"\xff")
    cause.cause.message = "the innermost"
    status, headers, body = encode_handler_error(caused(cause))
    error = decode_handler_error(status, multi(headers), body)
    assert isinstance(error, PeerHandlerError)
    assert error.remote_cause == cause


@pytest.mark.parametrize("part", ["encoded", "decoded"])
def test_a_cause_too_large_for_an_activity_is_left_out(part: str) -> None:
    """The writer and the reader leave it out."""
    large = WireFailure(message="x" * (256 * 1024 + 1))
    body = WireFailure(
        message="no", metadata={"type": HANDLER_ERROR_TYPE}, details={"type": "BAD_REQUEST"}, cause=large
    ).to_json()
    if part == "encoded":
        _, _, body = encode_handler_error(caused(Failure(message=large.message)))
    error = decode_handler_error(400, multi(JSON), body)
    assert isinstance(error, PeerHandlerError)
    assert error.remote_cause is None
    assert error.message == "no"


def test_a_cause_that_is_none_spoils_nothing() -> None:
    """The error itself counts."""
    broken = {"message": "", "metadata": {"type": FAILURE_TYPE}, "details": {"applicationFailureInfo": 7}}
    body = json.dumps(
        {"message": "no", "metadata": {"type": HANDLER_ERROR_TYPE}, "details": {"type": "NOT_FOUND"}, "cause": broken}
    ).encode()
    error = decode_handler_error(404, multi(JSON), body)
    assert isinstance(error, PeerHandlerError)
    assert (error.type, error.message, error.remote_cause) == (HandlerErrorType.NOT_FOUND, "no", None)


def test_a_handler_that_does_not_have_the_operation_answers_421_which_may_be_repeated() -> None:
    """The caller recognizes the error by its mark. The body's type is one that every reader repeats."""
    status, headers, body = encode_handler_error(WrongHandlerError("elsewhere"))
    error = decode_handler_error(status, multi(headers), body)
    assert (status, type(error), error.message, error.retryable) == (421, WrongHandlerError, "elsewhere", True)
