"""What an answer means to a start, a cancel, a completion, a question or an echo. The table is in docs/protocol.md.

An answer counts only if the peer has signed it for this request. Any other answer, with any status, may come from a
proxy: it means that the peer was not reached, and the request is sent again. Pure functions.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from multidict import CIMultiDict
from nexusrpc import HandlerError

from bridge.errors import (
    BridgeError,
    OutcomeUnknownError,
    PeerHandlerError,
    RemoteProtocolError,
    UnsignedAnswerError,
    UntrustedError,
    WaitOverError,
)
from bridge.protocol import headers as wire
from bridge.protocol.handler_error import decode_handler_error
from bridge.protocol.headers import OperationState
from bridge.protocol.outcome import decode_outcome
from bridge.protocol.payload import CONTENT_TYPE, is_json, is_known
from bridge.security.redaction import redacted
from bridge.security.signatures import MessageKind, RequestProof


class Sent(Enum):
    """The kind of request that was sent. A question asks whether the caller of an operation still waits."""

    START = "start"
    CANCEL = "cancel"
    COMPLETION = "completion"
    QUESTION = "question"
    ECHO = "echo"

    @property
    def kind(self) -> MessageKind:
        """The purpose for which such a request is signed."""
        return MessageKind.COMPLETION if self is Sent.QUESTION else MessageKind[self.name]


class Meaning(Enum):
    """What an answer means for the request."""

    OUTCOME = "outcome"
    """Answer to a start: the operation has ended, and the answer holds its outcome."""
    RUNNING = "running"
    """Answer to a start: the operation has not ended."""
    ACCEPTED = "accepted"
    """Answer to a cancel or a completion: accepted. Answer to a question: the caller waits."""
    REFUSED = "refused"
    """The peer never accepts this request. Do not repeat it."""
    CONFLICT = "conflict"
    """Answer to a completion: another outcome is recorded."""
    GONE = "gone"
    """Answer to a completion or a question: the caller does not wait any more."""
    AGAIN = "again"
    """The peer answered and reported nothing about the operation. Send the request again."""
    NOT_REACHED = "not reached"
    """The peer did not answer. Send the request again."""


_FINAL = {400: Meaning.REFUSED, 403: Meaning.REFUSED, 404: Meaning.REFUSED, 501: Meaning.REFUSED}
_TABLE: Mapping[Sent, Mapping[int, Meaning]] = {
    Sent.START: _FINAL | {200: Meaning.OUTCOME, 424: Meaning.OUTCOME, 201: Meaning.RUNNING, 409: Meaning.REFUSED},
    Sent.CANCEL: _FINAL | {202: Meaning.ACCEPTED},
    Sent.COMPLETION: dict.fromkeys(range(200, 300), Meaning.ACCEPTED)
    | {400: Meaning.REFUSED, 404: Meaning.GONE, 409: Meaning.CONFLICT, 410: Meaning.GONE},
    Sent.QUESTION: {200: Meaning.ACCEPTED, 404: Meaning.GONE, 410: Meaning.GONE},
    Sent.ECHO: {200: Meaning.ACCEPTED},
}
"""Every other status means `AGAIN`. So do 401 and 421, because an operator can repair keys and routes."""
_LATE_FOR_TEMPORAL = ("stale reference", "workflow execution already completed")
"""Beginnings of the message with which Temporal's server, which does not sign, answers 404 to a completion that is late
or repeated."""
_RETRYABLE = frozenset({408, 429, 500, 503, 520})
"""Statuses with which a handler may refuse a start permanently, by `retryableOverride: false`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The part of an answer that counts."""

    meaning: Meaning
    """What the answer means for the request."""
    status: int
    """HTTP status, also of an answer that does not count."""
    headers: CIMultiDict[str]
    """The signed headers. All headers if the peer cannot sign. Empty for `NOT_REACHED`."""
    body: bytes
    """As received. Empty for `NOT_REACHED`."""
    error: HandlerError | BridgeError | None = None
    """Why the request had no effect, None if it had one. For `REFUSED` it is a HandlerError that is not retryable, for
    `AGAIN` and `NOT_REACHED` any other error."""
    retry_after: timedelta | None = None
    """The wait that the peer asked for in a signed `Retry-After`, at most an hour."""


def read_answer(
    sent: Sent,
    proof: RequestProof | None,
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    is_first: bool = True,
) -> Answer:
    """Read the answer to a request.

    Args:
        sent: The kind of the request.
        proof: The request's signature; None if the settings say that the peer cannot sign its answers.
        status: HTTP status of the answer.
        headers: All headers of the answer.
        body: Body of the answer, as received.
        is_first: Whether no earlier request of this call can have had an effect. A later refusal of a peer that cannot
            sign is ignored, because a proxy may have sent it while the operation is running.
    """
    signed = CIMultiDict(headers.items())
    if proof is not None:
        try:
            signed = proof.verify_answer(status, headers, body)
        except UntrustedError as untrusted:
            return _not_reached(status, signed, body, untrusted.reason)
    meaning = _TABLE[sent].get(status, Meaning.AGAIN)
    if meaning in {Meaning.OUTCOME, Meaning.RUNNING, Meaning.ACCEPTED}:
        if proof is None and sent is Sent.START and not _is_plausible(status, signed, body):
            return _not_reached(status, signed, body, "not the answer of an unsigned peer")
        return Answer(meaning=meaning, status=status, headers=signed, body=body)
    error = decode_handler_error(status, signed, body)
    if meaning is Meaning.REFUSED and error.retryable:
        meaning = Meaning.AGAIN
    if sent is Sent.START and status in _RETRYABLE and error.retryable_override is False:
        meaning = Meaning.REFUSED
    if proof is None and not _is_refusal_of_peer(sent, meaning, error, is_first=is_first):
        return _not_reached(status, signed, body, "not a refusal that an unsigned peer may give")
    reason: HandlerError | BridgeError = error
    if meaning is Meaning.AGAIN and not error.retryable:
        # Only `REFUSED` may carry a HandlerError that is not retryable: such an error ends the call.
        reason = RemoteProtocolError(f"the peer answered {status}: {error.message}")
    retry_after = wire.decode_retry_after(signed) if proof is not None else None
    return Answer(meaning=meaning, status=status, headers=signed, body=body, error=reason, retry_after=retry_after)


def _is_plausible(status: int, headers: Mapping[str, str], body: bytes) -> bool:
    """Whether an unsigned answer can be an outcome: its state and content fit. An error page of a proxy does not."""
    if status not in {200, 424} or wire.OPERATION_STATE not in headers:
        return status not in {200, 424}
    try:
        state = wire.require_state(headers[wire.OPERATION_STATE])
        outcome = decode_outcome(state, headers, body)
        if is_json(headers):
            json.loads(body)
    except (RemoteProtocolError, ValueError, RecursionError):
        return False
    is_success = state is OperationState.SUCCEEDED
    return is_success == (status == 200) and (outcome.result is None or is_known(outcome.result))


def _is_refusal_of_peer(sent: Sent, meaning: Meaning, error: HandlerError, *, is_first: bool) -> bool:
    """Whether an unsigned error counts. A proxy writes neither the body of a HandlerError nor Temporal's messages."""
    if sent is Sent.COMPLETION and meaning is Meaning.GONE and error.message.startswith(_LATE_FOR_TEMPORAL):
        return True
    if sent is Sent.QUESTION or not isinstance(error, PeerHandlerError):
        return isinstance(error, WaitOverError)
    return is_first or meaning is not Meaning.REFUSED or isinstance(error, OutcomeUnknownError)


def _not_reached(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> Answer:
    error = UnsignedAnswerError(_describe(status, headers, body, reason))
    return Answer(meaning=Meaning.NOT_REACHED, status=status, headers=CIMultiDict(), body=b"", error=error)


def _describe(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> str:
    """The probable sender of an answer, and a remedy. The pending activity and the log show this text."""
    parts = [f"{name}: {redacted(headers[name], 80)}" for name in ("Server", "Via", CONTENT_TYPE) if name in headers]
    answered = ", ".join([f"answered {status}", f"{len(body)} bytes", *parts])
    return f"{answered}; this does not count, because it is not signed by the peer ({reason}). {_cure(status)}"


def _cure(status: int) -> str:
    match status:
        case 401:
            return "If the peer itself answered: compare keys, key ids and clocks; its log names the check that failed"
        case 413 | 414 | 431:
            return "Probably a proxy's limit: it must pass bodies of 4 MiB and headers of 16 kB"
        case _ if 200 <= status < 300:
            return 'Either the URL leads elsewhere, or the peer cannot sign: then answers = "unsigned" in its settings'
        case _:
            return "Probably a proxy's own answer: the peer may be down, or the URL lead elsewhere"
