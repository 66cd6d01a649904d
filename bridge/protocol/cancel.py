"""The cancel of an operation: its request, in both forms that Temporal's servers send, and its answers. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from bridge.errors import RemoteProtocolError
from bridge.protocol import headers as wire


@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """The wish to end an operation; it may still end otherwise."""

    service: str
    operation: str
    operation_token: str
    headers: Mapping[str, str] = field(default_factory=dict)
    """The caller's own."""


def encode_cancel(request: CancelRequest, *, request_timeout: timedelta) -> tuple[str, dict[str, str], bytes]:
    """Path below the endpoint's URL, headers, and an empty body."""
    headers = dict(request.headers)
    headers[wire.OPERATION_TOKEN] = request.operation_token
    headers[wire.REQUEST_TIMEOUT] = wire.encode_duration(request_timeout)
    return f"{wire.operation_path(request.service, request.operation)}/cancel", headers, b""


def decode_cancel(headers: Mapping[str, str], *, in_path: str | None, in_query: Sequence[str]) -> str:
    """The operation token: in the header (the spec), the query (the spec's alternative) or the path (server 1.29).

    Raises:
        RemoteProtocolError: None, or more than one.
    """
    found = [*filter(None, (headers.get(wire.OPERATION_TOKEN), in_path)), *in_query]
    if len(found) != 1 or not 0 < len(found[0]) <= wire.MAX_OPERATION_TOKEN:
        message = f"a cancel names exactly one operation token of at most {wire.MAX_OPERATION_TOKEN} characters"
        raise RemoteProtocolError(message)
    return found[0]
