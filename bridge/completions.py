"""The completion: the message that tells an outcome to whoever waits for it. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum

from bridge import wire
from bridge.links import WorkflowRef, decode_links, encode_links
from bridge.outcomes import Outcome, decode_outcome, encode_outcome

_FINAL_STATUSES = frozenset({410, 413, 422, 501}) | frozenset(range(300, 400))


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


def encode_completion(
    completion: Completion, *, callback_headers: Mapping[str, str]
) -> tuple[dict[str, str], bytes]:
    """Headers and body. What the protocol says is set last: no header of the caller's choice replaces it."""
    content, body = encode_outcome(completion.outcome)
    headers = {name.title(): value for name, value in callback_headers.items()}
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
    if status in {404, 409, 410}:
        return DeliveryAnswer.GONE, None
    is_final = status in _FINAL_STATUSES or (400 <= status < 500 and status not in {408, 425, 429})
    if error.type.value != "UNKNOWN" and status not in _FINAL_STATUSES:
        is_final = not error.retryable
    return (DeliveryAnswer.REFUSED, None) if is_final else (DeliveryAnswer.AGAIN_LATER, retry_after)
