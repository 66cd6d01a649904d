"""The completion: the message that tells an outcome to whoever waits for it. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from nexusrpc import HandlerErrorType

from bridge.protocol import headers as wire
from bridge.protocol.link import WorkflowRef, decode_links, encode_links
from bridge.protocol.outcome import Outcome, decode_outcome, encode_outcome
from bridge.protocol.payload import is_json

_FINAL_STATUSES = frozenset({410, 413, 422}) | frozenset(range(300, 400))
_GONE_STATUSES = frozenset({404, 409, 410})
_NOT_FOUND = 404
_TOO_EARLY = 425

_RESERVED_PREFIXES = ("content-", "nexus-", "proxy-")
_RESERVED = frozenset({"connection", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An outcome with what identifies it."""

    outcome: Outcome
    target: WorkflowRef | None
    """The run that ended so; None from a peer without Temporal."""
    operation_token: str | None = None
    start_time: datetime | None = None
    close_time: datetime | None = None


class DeliveryAnswer(Enum):
    """What one attempt to deliver was told."""

    ACCEPTED = "accepted"
    AGAIN_LATER = "again later"
    GONE = "gone"
    """Final: nobody waits any more, or another outcome is recorded."""
    REFUSED = "refused"
    """Final: the receiver does not take this message; mending the cause and sending it again may help."""


def encode_completion(completion: Completion, *, callback_headers: Mapping[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body. No header of the caller's choice replaces what the protocol or the connection says.

    A `Content-…` header more than the protocol's own would spoil the result, so a caller's is left out as well.
    """
    content, body = encode_outcome(completion.outcome)
    headers = {name.title(): value for name, value in callback_headers.items() if not _is_reserved(name.lower())}
    headers |= content
    headers[wire.OPERATION_STATE] = completion.outcome.state.value
    if completion.operation_token is not None:
        headers[wire.OPERATION_TOKEN] = completion.operation_token
    if completion.start_time is not None:
        headers[wire.OPERATION_START_TIME] = wire.encode_http_date(completion.start_time)
    if completion.close_time is not None:
        headers[wire.OPERATION_CLOSE_TIME] = wire.encode_instant(completion.close_time)
    if completion.target is not None:
        headers[wire.LINK] = encode_links([completion.target.to_link()])
    return headers, body


def decode_completion(headers: Mapping[str, str], links: Sequence[str], body: bytes) -> Completion:
    """Read one completion after its proofs held.

    Raises:
        RemoteProtocolError: Unknown state, or content that the state does not allow.
    """
    state = wire.require_state(headers.get(wire.OPERATION_STATE))
    return Completion(
        outcome=decode_outcome(state, headers, body),
        target=WorkflowRef.from_links(decode_links(links)),
        operation_token=headers.get(wire.OPERATION_TOKEN),
        close_time=wire.decode_instant(headers.get(wire.OPERATION_CLOSE_TIME, "")),
    )


def classify_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime
) -> tuple[DeliveryAnswer, timedelta | None]:
    """What the receiver's answer asks of us, and the wait it named."""
    retry_after = wire.decode_retry_after(headers, now=now)
    if 200 <= status < 300:
        return DeliveryAnswer.ACCEPTED, None
    error = wire.decode_handler_error(status, headers, body)
    if status in _FINAL_STATUSES:
        is_final = True
    elif status == _NOT_FOUND and not is_json(headers):
        # No receiver's word, but that of a proxy in front of none: during a deploy, say.
        is_final = False
    elif error.type is not HandlerErrorType.UNKNOWN:
        # A type in the body, or a retry hint, beats the status, also one that says that nobody waits.
        is_final = not error.retryable
    else:
        is_final = 400 <= status < 500 and status != _TOO_EARLY
    if not is_final:
        return DeliveryAnswer.AGAIN_LATER, retry_after
    return DeliveryAnswer.GONE if status in _GONE_STATUSES else DeliveryAnswer.REFUSED, None


def _is_reserved(lower: str) -> bool:
    return lower in _RESERVED or lower.startswith(_RESERVED_PREFIXES)
