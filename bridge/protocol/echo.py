"""The echo: does the peer answer, with which key, at what time? It starts and completes nothing. Pure functions."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bridge.errors import RemoteProtocolError
from bridge.protocol.payload import CONTENT_TYPE, JSON

PROTOCOL_VERSION = 1


class Echo(BaseModel):
    """What a service says of itself to a peer whose signature holds."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = ""
    """Of the service's side."""
    time: datetime | None = None
    """When the echo was answered, by the service's clock."""
    version: int = PROTOCOL_VERSION
    callback: Literal["allowed", "not allowed"] | None = None
    """Whether the callback URL that the request named may be used; None if it named none."""


def encode_echo(echo: Echo) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    return 200, {CONTENT_TYPE: JSON}, echo.model_dump_json(exclude_none=True).encode()


def decode_echo(body: bytes) -> Echo:
    """Read the body of a signed 200; a peer may leave it empty.

    Raises:
        RemoteProtocolError: It is not an echo.
    """
    try:
        return Echo.model_validate_json(body or b"{}")
    except ValidationError:
        message = "the answer to an echo is unreadable"
        raise RemoteProtocolError(message) from None
