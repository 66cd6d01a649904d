"""The echo: a request that only checks whether the peer answers, with which key and at what time. Pure functions."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bridge.errors import RemoteProtocolError
from bridge.protocol.payload import CONTENT_TYPE, JSON

PROTOCOL_VERSION = 1


class Echo(BaseModel):
    """What a service reports about itself to a peer whose signature is valid."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = ""
    """Name of the side that the service belongs to."""
    time: datetime | None = None
    """When the echo was answered, by the service's clock."""
    version: int = PROTOCOL_VERSION
    """Version of the protocol that the service speaks."""
    callback: Literal["allowed", "not allowed"] | None = None
    """Whether the callback URL in the request may be used; None if the request held no callback URL."""


def encode_echo(echo: Echo) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to an echo."""
    return 200, {CONTENT_TYPE: JSON}, echo.model_dump_json(exclude_none=True).encode()


def decode_echo(body: bytes) -> Echo:
    """Read the body of a signed 200. An empty body is allowed.

    Raises:
        RemoteProtocolError: The body is not an echo.
    """
    try:
        return Echo.model_validate_json(body or b"{}")
    except ValidationError:
        message = "the answer to an echo is unreadable"
        raise RemoteProtocolError(message) from None
