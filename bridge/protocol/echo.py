"""The echo: a request that only checks whether the peer answers, with which key and at what time. Pure functions."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from bridge.errors import RemoteProtocolError
from bridge.protocol.payload import CONTENT_TYPE, JSON
from bridge.security.keys import FINGERPRINT, KeyId
from bridge.security.redaction import redacted

PROTOCOL_VERSION = 1
_MAX_SKEW = timedelta(minutes=1)


class Echo(BaseModel):
    """What a service reports about itself to a peer whose signature is valid."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: Annotated[str, AfterValidator(lambda text: redacted(text, 63))] = ""
    """Name of the side that the service belongs to."""
    time: AwareDatetime | None = None
    """When the echo was answered, by the service's clock."""
    version: int = PROTOCOL_VERSION
    """Version of the protocol that the service speaks."""
    keys: Mapping[str, Mapping[KeyId, Annotated[str, Field(pattern=FINGERPRINT)]]] = {}
    """Fingerprints of the keys that the answerer shares with the asker: by key set, by key id."""
    callback_problem: Annotated[str, AfterValidator(lambda text: redacted(text, 1000))] | None = None
    """Why no completion would arrive at the callback URL in the request. None if one would arrive, or if the
    request has no such URL."""

    def clock_problem(self, now: datetime) -> str | None:
        """Say how far *now*, by our clock, is from the answerer's time; None if it is less than a minute."""
        if self.time is None or abs(skew := now - self.time) <= _MAX_SKEW:
            return None
        return f"the clock of {self.name} differs from ours by {-skew.total_seconds():+.0f} s: set both by NTP"


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
