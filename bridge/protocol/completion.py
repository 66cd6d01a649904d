"""The completion: the message that tells an outcome to whoever waits for it. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from bridge.protocol import headers as wire
from bridge.protocol.link import WorkflowRef, decode_links, encode_links
from bridge.protocol.outcome import Outcome, decode_outcome, encode_outcome

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
    """What one attempt to deliver a completion has come to."""

    ACCEPTED = "accepted"
    AGAIN_LATER = "again later"
    GONE = "gone"
    """Final: the caller does not wait any more, or has another outcome."""
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


def _is_reserved(lower: str) -> bool:
    return lower in _RESERVED or lower.startswith(_RESERVED_PREFIXES)
