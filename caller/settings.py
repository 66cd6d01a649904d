"""Settings of the caller's side, shared by its workers and its receiver."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork, model_validator

from bridge.keys import KeyRing
from bridge.settings import BridgeSettings, HttpUrl, Name, require_distinct_keys, require_https
from bridge.tokens import CallbackTokens


class HandlerPeer(BaseModel):
    """A handler that we call and that may answer. Its name is the key it stands under."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_keys: KeyRing
    """Signs our starts."""
    completion_keys: KeyRing
    """Verifies its completions."""


class Endpoint(BaseModel):
    """A place where operations are served: the same facts as of a Nexus endpoint with a URL target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    """Base URL of the handler's service for us: `https://payments.example/c/<our name>`."""
    handler: Name
    """Which of `handlers` is behind it."""
    networks: tuple[IPvAnyNetwork, ...] = ()
    """Non-public networks that its host may resolve to."""
    allow_insecure: bool = False
    """Allow plain http. For development on one machine."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        require_https(self.url, allow_insecure=self.allow_insecure)
        return self


class Receiver(BaseModel):
    """Where completions arrive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    """The receiver as handlers see it; callback URLs begin with it."""
    id: Name = "receiver"
    """Audience of the callback tokens."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    allow_insecure: bool = False
    """Allow plain http in `url`. For development on one machine, or inside one trusted network."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        require_https(self.url, allow_insecure=self.allow_insecure)
        return self


class CallerSettings(BridgeSettings):
    """All that the caller's worker and receiver need beside a connection to Temporal."""

    name: Name
    """Our name with the handlers."""
    receiver: Receiver
    callback_keys: KeyRing
    """Signs and verifies callback tokens; nobody outside the caller's side has them."""
    handlers: dict[Name, HandlerPeer] = Field(min_length=1)
    endpoints: dict[Name, Endpoint] = Field(min_length=1)
    data_converter: str | None = None
    """`module:attribute` of the data converter that the command line should connect with."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, endpoint in self.endpoints.items():
            if endpoint.handler not in self.handlers:
                known = ", ".join(self.handlers)
                message = f"endpoints.{name}.handler: no handler {endpoint.handler!r} (known: {known})"
                raise ValueError(message)
        rings = {"callback_keys": self.callback_keys}
        for name, peer in self.handlers.items():
            rings[f"handlers.{name}.start_keys"] = peer.start_keys
            rings[f"handlers.{name}.completion_keys"] = peer.completion_keys
        require_distinct_keys(rings)
        return self

    def callback_tokens(self, namespace: str) -> CallbackTokens:
        """What mints and verifies the callback tokens of our workflows in *namespace*."""
        return CallbackTokens(self.callback_keys, issuer=self.name, audience=self.receiver.id, namespace=namespace)
