"""What an answer means: the whole table, signed and not, and every way in which an answer can be spoilt."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict
from nexusrpc import HandlerError

from bridge.errors import OutcomeUnknownError, RemoteProtocolError, UnsignedAnswerError
from bridge.protocol.answers import Answer, Meaning, Sent, read_answer
from bridge.security.signatures import MessageKind, MessageSigner, RequestProof
from tests.support.helpers import key_set

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
JSON = {"Content-Type": "application/json"}
SUCCEEDED = JSON | {"Nexus-Operation-State": "succeeded"}
SIGNER = MessageSigner(key_set())
EVERY_STATUS = [*range(200, 600)]
KNOWN: Mapping[Sent, Mapping[int, Meaning]] = {
    Sent.START: {
        **dict.fromkeys((200, 424), Meaning.OUTCOME),
        201: Meaning.RUNNING,
        **dict.fromkeys((400, 403, 404, 409, 501), Meaning.REFUSED),
    },
    Sent.CANCEL: {202: Meaning.ACCEPTED, **dict.fromkeys((400, 403, 404, 501), Meaning.REFUSED)},
    Sent.COMPLETION: {
        **dict.fromkeys(range(200, 300), Meaning.ACCEPTED),
        400: Meaning.REFUSED,
        **dict.fromkeys((404, 410), Meaning.GONE),
        409: Meaning.CONFLICT,
    },
    Sent.QUESTION: {200: Meaning.ACCEPTED, **dict.fromkeys((404, 410), Meaning.GONE)},
    Sent.ECHO: {200: Meaning.ACCEPTED},
}
ENDS_SOMETHING = {Meaning.OUTCOME, Meaning.RUNNING, Meaning.ACCEPTED, Meaning.REFUSED, Meaning.CONFLICT, Meaning.GONE}


def proof(body: bytes = b"") -> RequestProof:
    headers = CIMultiDict({"Nexus-Request-Id": "7"})
    return SIGNER.sign(MessageKind.START, "https://payments.example/op", headers, body)


def error_body(kind: str, *, mark: str | None = None, **details: Any) -> bytes:
    metadata = {"type": "nexus.HandlerError"} | ({"bridge": mark} if mark else {})
    return json.dumps({"message": "no", "metadata": metadata, "details": {"type": kind, **details}}).encode()


def signed(sent: Sent, status: int, headers: Mapping[str, str] = JSON, body: bytes = b"") -> Answer:
    asked, answer_headers = proof(), CIMultiDict(headers)
    asked.sign_answer(status, answer_headers, body)
    return read_answer(sent, asked, status, answer_headers, body)


def unsigned_peer(
    sent: Sent, status: int, headers: Mapping[str, str] = JSON, body: bytes = b"", *, is_first: bool = True
) -> Answer:
    return read_answer(sent, None, status, CIMultiDict(headers), body, is_first=is_first)


@pytest.mark.parametrize("sent", Sent)
def test_every_signed_status_means_what_the_table_says(sent: Sent) -> None:
    """What is in no row is a fault of the peer, or a matter of time: asked again."""
    for status in EVERY_STATUS:
        answer = signed(sent, status)
        assert answer.meaning is KNOWN[sent].get(status, Meaning.AGAIN), status
        assert (answer.error is None) == (answer.meaning in {Meaning.OUTCOME, Meaning.RUNNING, Meaning.ACCEPTED})
        # What a HandlerError that is not retryable ends is ended by it alone.
        is_final = isinstance(answer.error, HandlerError) and not answer.error.retryable
        assert is_final <= (answer.meaning in {Meaning.REFUSED, Meaning.CONFLICT, Meaning.GONE}), status


@pytest.mark.parametrize("sent", Sent)
def test_no_status_ends_anything_without_a_signature(sent: Sent) -> None:
    """200 and 202, 404 and 410, 413, 414 and 431, with any body: not reached."""
    bodies = [b"", b"<html>", b'{"key":"maintenance"}', error_body("NOT_FOUND", mark="outcome-unknown")]
    for status in EVERY_STATUS:
        for body in bodies:
            answer_headers = CIMultiDict(SUCCEEDED | {"Retry-After": "3600", "Nexus-Request-Retryable": "false"})
            answer = read_answer(sent, proof(), status, answer_headers, body)
            assert (answer.meaning, answer.retry_after) == (Meaning.NOT_REACHED, None)
            assert isinstance(answer.error, UnsignedAnswerError)
            assert not answer.headers
            assert not answer.body


@pytest.mark.parametrize(
    ("sent", "status", "body", "meaning"),
    [
        pytest.param(
            Sent.START, 400, error_body("BAD_REQUEST", retryableOverride=True), Meaning.AGAIN, id="deployment"
        ),
        pytest.param(Sent.START, 404, error_body("UNAVAILABLE"), Meaning.AGAIN, id="404 of a retryable type"),
        pytest.param(Sent.START, 500, error_body("INTERNAL", retryableOverride=False), Meaning.REFUSED, id="gave up"),
        pytest.param(Sent.START, 503, error_body("UNAVAILABLE", retryableOverride=True), Meaning.AGAIN, id="busy"),
        pytest.param(Sent.START, 503, error_body("BAD_REQUEST"), Meaning.AGAIN, id="503 of a final type"),
        pytest.param(Sent.START, 401, error_body("UNAUTHENTICATED", retryableOverride=False), Meaning.AGAIN, id="401"),
        pytest.param(Sent.START, 421, error_body("NOT_FOUND", retryableOverride=False), Meaning.AGAIN, id="421"),
        pytest.param(Sent.START, 413, error_body("BAD_REQUEST", retryableOverride=False), Meaning.AGAIN, id="413"),
        pytest.param(Sent.START, 404, error_body("NOT_FOUND", mark="outcome-unknown"), Meaning.REFUSED, id="too old"),
        pytest.param(Sent.CANCEL, 409, error_body("CONFLICT"), Meaning.AGAIN, id="cancel, 409"),
        pytest.param(
            Sent.CANCEL, 404, error_body("NOT_FOUND", retryableOverride=True), Meaning.AGAIN, id="cancel, 404"
        ),
        pytest.param(Sent.CANCEL, 200, b"", Meaning.AGAIN, id="cancel, 200"),
        pytest.param(Sent.COMPLETION, 401, error_body("UNAUTHENTICATED"), Meaning.AGAIN, id="completion, 401"),
        pytest.param(Sent.COMPLETION, 403, error_body("UNAUTHORIZED"), Meaning.AGAIN, id="completion, 403"),
        pytest.param(Sent.COMPLETION, 422, error_body("BAD_REQUEST"), Meaning.AGAIN, id="completion, 422"),
        pytest.param(Sent.COMPLETION, 307, b"", Meaning.AGAIN, id="completion, a redirect"),
    ],
)
def test_a_signed_error_says_whether_it_is_final(sent: Sent, status: int, body: bytes, meaning: Meaning) -> None:
    """Nothing about the deployment is: keys, clocks, callback hosts, the wrong endpoint."""
    answer = signed(sent, status, JSON, body)
    assert answer.meaning is meaning
    if meaning is Meaning.AGAIN:
        assert isinstance(answer.error, RemoteProtocolError) or (
            isinstance(answer.error, HandlerError) and answer.error.retryable
        )


def test_an_outcome_unknown_is_known_by_its_mark() -> None:
    """It ends a call whose operation is known to run, too."""
    answer = signed(Sent.START, 404, JSON, error_body("NOT_FOUND", mark="outcome-unknown"))
    assert isinstance(answer.error, OutcomeUnknownError)


def test_a_wait_is_obeyed_if_it_is_signed() -> None:
    """At most an hour; anybody could make a caller wait otherwise."""
    headers = JSON | {"Retry-After": "7200"}
    assert signed(Sent.START, 503, headers).retry_after == timedelta(hours=1)
    assert unsigned_peer(Sent.START, 503, headers, error_body("UNAVAILABLE")).retry_after is None
    asked, answer_headers = proof(), CIMultiDict(JSON)
    asked.sign_answer(503, answer_headers, b"")
    answer_headers["Retry-After"] = "3600"
    assert read_answer(Sent.START, asked, 503, answer_headers, b"").retry_after is None


@pytest.mark.parametrize(
    ("sent", "status", "headers", "body", "meaning"),
    [
        pytest.param(Sent.START, 200, SUCCEEDED, b'{"paid":true}', Meaning.OUTCOME, id="result"),
        pytest.param(Sent.START, 200, {"Nexus-Operation-State": "succeeded"}, b"", Meaning.OUTCOME, id="no result"),
        pytest.param(Sent.START, 200, JSON, b'{"key":"maintenance"}', Meaning.NOT_REACHED, id="JSON page"),
        pytest.param(Sent.START, 200, {}, b"", Meaning.NOT_REACHED, id="empty page"),
        pytest.param(Sent.START, 200, SUCCEEDED, b"{", Meaning.NOT_REACHED, id="cut JSON"),
        pytest.param(
            *(Sent.START, 200, SUCCEEDED | {"Content-Type": "text/html"}, b"<html>", Meaning.NOT_REACHED), id="HTML"
        ),
        pytest.param(
            *(Sent.START, 200, SUCCEEDED | {"Content-Security-Policy": "self"}, b"1", Meaning.NOT_REACHED),
            id="added content header",
        ),
        pytest.param(
            *(Sent.START, 424, JSON | {"Nexus-Operation-State": "failed"}, b'{"message":"no"}', Meaning.OUTCOME),
            id="failure",
        ),
        pytest.param(Sent.START, 424, JSON, b'{"message":"no"}', Meaning.NOT_REACHED, id="failure without state"),
        pytest.param(Sent.START, 424, SUCCEEDED, b'{"message":"no"}', Meaning.NOT_REACHED, id="failure that succeeded"),
        pytest.param(Sent.START, 201, JSON, b'{"token":"t","state":"running"}', Meaning.RUNNING, id="running"),
        pytest.param(Sent.START, 404, JSON, error_body("NOT_FOUND"), Meaning.REFUSED, id="handler error"),
        pytest.param(Sent.START, 404, JSON, b'{"message":"no route"}', Meaning.NOT_REACHED, id="JSON 404"),
        pytest.param(Sent.START, 403, {}, b"", Meaning.NOT_REACHED, id="bare 403"),
        pytest.param(Sent.START, 503, JSON, error_body("UNAVAILABLE"), Meaning.AGAIN, id="busy"),
        pytest.param(Sent.COMPLETION, 200, {"Content-Type": "text/html"}, b"<html>", Meaning.ACCEPTED, id="taken"),
        pytest.param(Sent.COMPLETION, 404, JSON, b'{"message":"no route"}', Meaning.NOT_REACHED, id="gateway's 404"),
        pytest.param(
            *(Sent.COMPLETION, 404, JSON, b'{"message":"stale reference: state machine not found"}', Meaning.GONE),
            id="late, as Temporal's server says it",
        ),
        pytest.param(
            *(Sent.START, 404, JSON, b'{"message":"stale reference: x"}', Meaning.NOT_REACHED),
            id="of a start Temporal's server says no such thing",
        ),
        pytest.param(Sent.COMPLETION, 409, {}, b"", Meaning.NOT_REACHED, id="bare 409"),
        pytest.param(Sent.COMPLETION, 410, {}, b"", Meaning.NOT_REACHED, id="bare 410"),
        pytest.param(Sent.COMPLETION, 410, JSON, error_body("NOT_FOUND"), Meaning.GONE, id="gone"),
        pytest.param(Sent.COMPLETION, 409, JSON, error_body("CONFLICT"), Meaning.CONFLICT, id="conflict"),
        pytest.param(Sent.QUESTION, 404, JSON, error_body("NOT_FOUND"), Meaning.NOT_REACHED, id="question"),
        pytest.param(Sent.QUESTION, 410, JSON, error_body("NOT_FOUND", mark="wait-over"), Meaning.GONE, id="over"),
    ],
)
def test_a_peer_that_cannot_sign_is_read_strictly(
    sent: Sent, status: int, headers: dict[str, str], body: bytes, meaning: Meaning
) -> None:
    """Only what no proxy answers by accident counts."""
    assert unsigned_peer(sent, status, headers, body).meaning is meaning


def test_a_peer_that_cannot_sign_refuses_nothing_later_on() -> None:
    """A 504 that was processed, then a 404: the operation runs."""
    later = unsigned_peer(Sent.START, 404, JSON, error_body("NOT_FOUND"), is_first=False)
    assert later.meaning is Meaning.NOT_REACHED
    forgotten = error_body("NOT_FOUND", mark="outcome-unknown")
    assert unsigned_peer(Sent.START, 404, JSON, forgotten, is_first=False).meaning is Meaning.REFUSED


def test_who_answered_is_named_with_what_may_help() -> None:
    """Status, size, Server, Via, content type, the failed check: on the pending activity and in the log."""
    answer_headers = CIMultiDict({"Server": "nginx/1.22\x1b[31m", "Via": "1.1 edge", "Content-Type": "text/html"})
    text = str(read_answer(Sent.START, proof(), 413, answer_headers, b"<html>").error)
    for part in ("413", "6 bytes", "nginx/1.22", "1.1 edge", "text/html", "Signature-Input missing", "4 MiB"):
        assert part in text
    assert "\x1b" not in text
    answer_headers["Server"] = "https://orders.example/callbacks/7?sig=secret"
    assert "secret" not in str(read_answer(Sent.START, proof(), 401, answer_headers, b"").error)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(Sent),
    st.integers(100, 999),
    st.dictionaries(
        st.sampled_from(
            ["Signature", "Signature-Input", "Repr-Digest", "Content-Type", "Nexus-Operation-State", "Retry-After"]
        ),
        st.sampled_from(["application/json", "succeeded", "bridge=::", "7"]) | st.text(),
    ),
    st.binary() | st.sampled_from([b"{}", error_body("NOT_FOUND"), b"[" * 100_000]),
    st.booleans(),
)
def test_an_arbitrary_answer_is_read_without_an_error(
    sent: Sent, status: int, headers: dict[str, str], body: bytes, signs: bool
) -> None:
    """And never as the word of a peer that signs."""
    answer = read_answer(sent, proof() if signs else None, status, CIMultiDict(headers), body)
    assert not (signs and answer.meaning in ENDS_SOMETHING)
