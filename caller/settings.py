"""Settings of the caller's side, shared by its workers and its receiver."""

from typing import Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork, model_validator

from bridge.runtime.route import Route, Tls
from bridge.runtime.settings import BridgeSettings, Keys, Name, require_distinct_keys, require_https
from bridge.runtime.tracing import TraceMode
from bridge.security.egress import HttpUrl
from bridge.security.keys import KeySet


class HandlerPeer(BaseModel):
    """A handler that we call. Its name is its key in `handlers`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_keys: Keys
    """Signs our requests to it."""
    answers: Literal["signed", "unsigned"] = "signed"
    """"unsigned": a handler that cannot sign its answers. A proxy's answer can then pass as the handler's. Only answers
    that no proxy gives by accident are final."""
    completion_keys: Keys | None = None
    """Verifies its completions. Required if we have a receiver."""
    shares_storage: bool = False
    """Whether it uses the same external storage, under the same names. If so, inputs and outcomes may cross as
    references that a data converter made. If not, an outcome that is a reference is not accepted."""
    trace: TraceMode = "continue"
    """How its trace context is used. "continue": our spans belong to its traces. "link": they link to its traces.
    "off": no trace context crosses."""
    ui_url: HttpUrl | None = None
    """Base URL of its Temporal UI. Calls then link to the workflow that carries them out."""


class Endpoint(BaseModel):
    """A URL where a handler serves operations. It corresponds to a Nexus endpoint with a URL target."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    """Base URL of the handler's service for us: `https://payments.example/c/<our name>`."""
    handler: Name
    """Name of the handler behind it, a key of `handlers`."""
    transport: Literal["callback", "wait", "poll"] = "callback"
    """How calls wait that do not choose a transport themselves."""
    wait_s: int = Field(default=5, ge=1, le=60)
    """With "wait": seconds that the handler is asked to hold a start open; at most half of the call's first lease."""
    poll_interval_s: float = Field(default=5.0, ge=0.1, le=3600)
    """With "poll": seconds between two requests."""
    networks: tuple[IPvAnyNetwork, ...] = ()
    """Non-public networks that its host may resolve to, or that of `proxy`. Other non-public addresses are refused."""
    tls: Tls | None = None
    """Authorities and certificate for TLS, if they are not the system's."""
    proxy: HttpUrl | None = None
    """URL of the HTTP proxy to which requests go, without a user. It resolves and connects in our place."""
    allow_insecure: bool = False
    """Allow plain http. For development on one machine."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        require_https(self.url, allow_insecure=self.allow_insecure)
        return self

    @property
    def route(self) -> Route:
        """The way to it."""
        return Route(networks=self.networks, tls=self.tls, proxy=self.proxy)


class Receiver(BaseModel):
    """Where completions arrive."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    """The receiver as handlers see it; callback URLs begin with it."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allow_insecure: bool = False
    """Allow plain http in `url`. For development on one machine, or inside one trusted network."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        require_https(self.url, allow_insecure=self.allow_insecure)
        return self

    def echo_url(self, namespace: str | None) -> str:
        """URL where the receiver answers an echo, and compares its namespace if one is given."""
        return f"{self.url}/callbacks" + ("" if namespace is None else f"?namespace={quote(namespace)}")


class CallerSettings(BridgeSettings):
    """All settings of the caller's worker and receiver, except the connection to Temporal."""

    other_side = frozenset(
        {"task_queue", "service", "hash_key", "callers", "nexus", "sweep", "sweep_interval_s", "abandoned_check_s"}
    )
    name: Name
    """Our name, as the handlers' settings have it."""
    receiver: Receiver | None = None
    """Where completions arrive. It is left out if no handler can reach us; every endpoint then needs the transport
    "poll"."""
    callback_keys: Keys | None = None
    """Signs and verifies callback tokens. Only the caller's side has these keys. Required with `receiver`."""
    handlers: dict[Name, HandlerPeer] = Field(min_length=1)
    """The handlers that we call, by name."""
    endpoints: dict[Name, Endpoint] = Field(min_length=1)
    """The endpoints that workflows may name, by name."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, endpoint in self.endpoints.items():
            if endpoint.handler not in self.handlers:
                known = ", ".join(self.handlers)
                message = f"endpoints.{name}.handler: no handler {endpoint.handler!r} (known: {known})"
                raise ValueError(message)
            if self.receiver is None and endpoint.transport != "poll":
                message = f'endpoints.{name}.transport: "{endpoint.transport}" needs a receiver'
                raise ValueError(message)
        if (self.receiver is None) != (self.callback_keys is None):
            message = "receiver and callback_keys go together"
            raise ValueError(message)
        for name, peer in self.handlers.items():
            if self.receiver is not None and peer.completion_keys is None:
                message = f"handlers.{name}.completion_keys: missing"
                raise ValueError(message)
        require_distinct_keys(self.key_sets)
        return self

    @property
    def key_sets(self) -> dict[str, KeySet]:
        """All key sets, by the names of their fields."""
        key_sets = {"callback_keys": self.callback_keys}
        for name, peer in self.handlers.items():
            key_sets[f"handlers.{name}.start_keys"] = peer.start_keys
            key_sets[f"handlers.{name}.completion_keys"] = peer.completion_keys
        return {name: key_set for name, key_set in key_sets.items() if key_set is not None}

    def ui_url(self, endpoint: str) -> str | None:
        """Base URL of the Temporal UI of the handler behind *endpoint*; None if the settings do not name it."""
        found = self.endpoints.get(endpoint)
        return None if found is None else self.handlers[found.handler].ui_url
