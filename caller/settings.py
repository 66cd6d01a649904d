"""Settings of the caller's side, shared by its workers and its receiver."""

from collections.abc import Iterator
from typing import Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bridge.http.peer_check import EchoProbe
from bridge.http.route import Route, Tls
from bridge.runtime.settings import BridgeSettings, Keys, Name, SettingsError, require_distinct_keys
from bridge.runtime.tracing import TraceMode
from bridge.security.egress import HttpUrl, Network, UrlEntry
from bridge.security.keys import KeySet


class HandlerPeer(BaseModel):
    """A handler that we call. Its name is its key in `handlers`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start_keys: Keys
    """Keys that sign our requests to the handler and verify its answers."""
    answers: Literal["signed", "unsigned"] = "signed"
    """"unsigned" is for a handler that cannot sign its answers. A proxy's answer can then be taken for the handler's.
    Therefore an answer is final only if a proxy does not give such an answer by accident."""
    completion_keys: Keys | None = None
    """Keys that verify the handler's completions. Required with `receiver`."""
    shares_storage: bool = False
    """Whether it uses the same external storage, under the same names. If true, inputs and outcomes may be sent as
    references that a data converter made. If false, inputs are sent as values, and an outcome that is a reference is
    not accepted."""
    trace: TraceMode = "continue"
    """How its trace context is used. "continue": our spans belong to its traces. "link": they link to its traces.
    "off": no trace context crosses."""
    ui_url: HttpUrl | None = None
    """Base URL of the handler's Temporal UI. A call then links to the workflow that carries out the operation."""


class Endpoint(UrlEntry):
    """A URL where a handler serves operations. It corresponds to a Nexus endpoint with a URL target."""

    url: HttpUrl
    """Base URL of the handler's service for us: `https://payments.example/c/<our name>`."""
    handler: Name
    """Name of the handler behind it, a key of `handlers`."""
    transport: Literal["callback", "wait", "poll"] = "callback"
    """Transport of the calls whose client names no transport."""
    wait_s: int = Field(default=5, ge=1, le=60)
    """With "wait": seconds for which we ask the handler to hold a start open. A call asks for at most half of its first
    lease."""
    poll_interval_s: float = Field(default=5.0, ge=0.1, le=3600)
    """With "poll": seconds between two requests."""
    networks: tuple[Network, ...] = ()
    """Non-public networks to which connections may go: to the host of `url`, or with `proxy` to the proxy. Every other
    non-public address is refused."""
    tls: Tls | None = None
    """Files for TLS: the authorities, if they are not the system's, and our client certificate."""
    proxy: HttpUrl | None = None
    """URL of the HTTP proxy to which requests go, without a user. The proxy looks up the handler's host and connects to
    it."""
    allow_insecure: bool = False
    """Allow plain http. For development on one machine."""

    @property
    def route(self) -> Route:
        """The way to the endpoint."""
        return Route(networks=self.networks, tls=self.tls, proxy=self.proxy)


class Receiver(UrlEntry):
    """Where completions arrive."""

    url: HttpUrl
    """Public URL of the receiver. Every callback URL begins with this URL."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    allow_insecure: bool = False
    """Allow plain http in `url`. For development on one machine, or inside one trusted network."""

    def echo_url(self, namespace: str | None) -> str:
        """URL at which the receiver answers an echo. If *namespace* is given, the receiver compares it with its own."""
        return f"{self.url}/callbacks" + ("" if namespace is None else f"?namespace={quote(namespace)}")


class CallerSettings(BridgeSettings):
    """All settings of the caller's worker and receiver, except the connection to Temporal."""

    other_side = frozenset(
        {"task_queue", "service", "hash_key", "callers", "nexus", "sweep", "sweep_interval_s", "abandoned_check_s"}
    )
    name: Name
    """Our name, as the handlers' settings have it."""
    receiver: Receiver | None = None
    """Where completions arrive. Leave it out if no handler can reach us. Every endpoint then needs the transport
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
            message = "receiver and callback_keys: set both or neither"
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

    def probes(self, namespace: str | None = None, handler: str | None = None) -> Iterator[EchoProbe]:
        """The echo of each endpoint, or of those of *handler*. The handler tries our receiver before it answers.

        *namespace* is that of the calls, if it is known.
        """
        back = "" if self.receiver is None else f"?callback={quote(self.receiver.echo_url(namespace), safe='')}"
        for name, endpoint in self.endpoints.items():
            if handler in {None, endpoint.handler}:
                peer = self.handlers[endpoint.handler]
                yield EchoProbe(
                    name=name,
                    url=endpoint.url + back,
                    key_set=peer.start_keys,
                    route=endpoint.route,
                    answers=peer.answers,
                    peer=f"handlers.{endpoint.handler}",
                )

    def required_receiver(self) -> Receiver:
        """Return `receiver`.

        Raises:
            SettingsError: The settings have no receiver.
        """
        if self.receiver is None:
            message = "no receiver in the settings: without one there is nothing to serve"
            raise SettingsError(message)
        return self.receiver

    def ui_url(self, endpoint: str) -> str | None:
        """Base URL of the Temporal UI of the handler behind *endpoint*; None if the settings do not name it."""
        found = self.endpoints.get(endpoint)
        return None if found is None else self.handlers[found.handler].ui_url
