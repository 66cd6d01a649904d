"""The completion: the message that delivers an outcome to the caller that waits for it. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from bridge.protocol import headers as wire
from bridge.protocol.link import WorkflowRef, decode_links, encode_links
from bridge.protocol.outcome import Outcome, decode_outcome, encode_outcome

_RESERVED_PREFIXES = ("content-", "nexus-", "proxy-")
_RESERVED = frozenset({"connection", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})


@dataclass(frozen=True, kw_only=True)
class Completion:
    """An outcome, and the run and operation that it belongs to."""

    outcome: Outcome
    """How the operation ended."""
    target: WorkflowRef | None
    """The run that ended; None from a peer without Temporal."""
    operation_token: str | None = None
    """The handler's name for the operation; None if the peer sent none."""
    start_time: datetime | None = None
    """When the target was started, UTC. Sent, but not read back."""
    close_time: datetime | None = None
    """When the target closed, UTC."""


def encode_completion(completion: Completion, *, callback_headers: Mapping[str, str]) -> tuple[dict[str, str], bytes]:
    """Headers and body. A callback header never replaces a header of the protocol or of the connection.

    Callback headers named `Content-…` are left out too, because Nexus would take them for a part of the result.
    """
    content, body = encode_outcome(completion.outcome)
    headers = {
        name.title(): value
        for name, value in callback_headers.items()
        if name.lower() not in _RESERVED and not name.lower().startswith(_RESERVED_PREFIXES)
    }
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
    """Read one completion. Verify its callback token and its signature first.

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
