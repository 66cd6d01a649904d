"""The request to cancel an operation, in every form that Temporal's servers send. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from bridge.errors import RemoteProtocolError
from bridge.protocol import headers as wire


@dataclass(frozen=True, kw_only=True)
class CancelRequest:
    """A request to end an operation. The operation may still succeed or fail."""

    service: str
    """Name of the service."""
    operation: str
    """Name of the operation."""
    operation_token: str
    """The handler's name for the running operation, from the answer to its start."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The headers that the caller's workflow set."""


def encode_cancel(request: CancelRequest, *, request_timeout: timedelta) -> tuple[str, dict[str, str], bytes]:
    """Path below the endpoint's URL, headers, and an empty body. The handler has *request_timeout* to answer."""
    headers = dict(request.headers)
    headers[wire.OPERATION_TOKEN] = request.operation_token
    headers[wire.REQUEST_TIMEOUT] = wire.encode_duration(request_timeout)
    return f"{wire.operation_path(request.service, request.operation)}/cancel", headers, b""


def decode_cancel(headers: Mapping[str, str], *, in_path: str | None, in_query: Sequence[str]) -> str:
    """The operation token, from the header (Nexus SPEC), the query (Nexus SPEC) or the path (server 1.29).

    Raises:
        RemoteProtocolError: The request has no token, an overlong one, or more than one.
    """
    found = [*filter(None, (headers.get(wire.OPERATION_TOKEN), in_path)), *in_query]
    if len(found) != 1 or not 0 < len(found[0]) <= wire.MAX_OPERATION_TOKEN:
        message = f"a cancel names exactly one operation token of at most {wire.MAX_OPERATION_TOKEN} characters"
        raise RemoteProtocolError(message)
    return found[0]
