"""Settings of the handler's side, shared by its service and its workers."""

import ipaddress
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from bridge.http.peer_check import EchoProbe
from bridge.http.route import Route, Tls
from bridge.runtime.settings import BridgeSettings, Keys, Name, Operation, require_distinct_keys
from bridge.runtime.tracing import TraceMode
from bridge.security.egress import Destination, HttpUrl, Network, UrlEntry
from bridge.security.keys import Key, KeySet, decode_key

_NEEDED = {"signature": ("start_keys", "completion_keys"), "bearer": ("bearer_keys",), "certificate": ("san",)}
"""The fields that a way to authenticate needs."""


class Limits(BaseModel):
    """How much one caller may use. Each copy of the service counts for itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    starts_per_second: float = Field(default=50, gt=0, allow_inf_nan=False)
    """Starts a second in the long run, renewals and polls included. A start beyond it is answered 429."""
    burst: int = Field(default=100, ge=1)
    """Starts at once."""
    held_starts: int = Field(default=20, ge=0)
    """Starts held open at once. Further starts are answered at once."""
    deadline_days: float = Field(default=60, gt=0, le=36_500)
    """Days from the start of a call within which its outcome is delivered, even if the call names a later deadline."""


class CallerPeer(BaseModel):
    """A caller that we serve. Its name is its key in `callers` and the path segment of its routes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auth: Literal["signature", "bearer", "certificate", "none"] = "signature"
    """How it authenticates. All but "signature" are for callers that cannot sign, for example Temporal's server. With
    "bearer" a proxy adds a secret to its requests. With "certificate" its client certificate is the proof. With "none"
    only the sender's network is checked. A public listener therefore refuses "none"."""
    san: str | None = Field(default=None, min_length=1)
    """Subject alternative name of its client certificate, as our proxy reports it in `service.certificate_header`. With
    "certificate" no other proof is needed. With any other `auth` the certificate is required in addition."""
    start_keys: Keys | None = None
    """With "signature": verifies its requests."""
    bearer_keys: Keys | None = None
    """With "bearer": the text of each key is a valid secret for `Authorization: Bearer …`."""
    networks: tuple[Network, ...] = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "::1/128")))
    """With "none": networks from which its requests may come."""
    completion_keys: Keys | None = None
    """Signs our completions for it. Optional unless `auth` is "signature"."""
    answers: Literal["signed", "unsigned"] = "signed"
    """"unsigned": its receiver cannot sign its answers. A caller without completion_keys is always one of these."""
    operations: tuple[Operation, ...]
    """Operations that it may start: `Service/operation`, or `Service/*`."""
    callbacks: tuple[Destination, ...] = ()
    """Destinations to which its completions may be sent."""
    limits: Limits = Limits()
    """How much it may use."""
    tls: Tls | None = None
    """Authorities and certificate for TLS to its callbacks, if they are not the system's."""
    proxy: HttpUrl | None = None
    """URL of the HTTP proxy to which its callbacks go, without a user. It resolves and connects in our place."""
    renews: bool | None = None
    """Whether it repeats each start until it has the outcome, as our own caller side does. If not, the sweep looks at
    every closed run of the operations that it may start. By default true with "signature", else false."""
    shares_storage: bool = False
    """Whether it uses the same external storage, under the same names. If so, references to the storage are sent
    unchanged. If not, the handler replaces references by their values."""
    shows_terminations: bool = False
    """Whether it gets the identity and the reason of a termination. Our operators write both for themselves."""
    trace: TraceMode = "continue"
    """How its trace context is used. "continue": our spans belong to its traces. "link": they link to its traces.
    "off": no trace context crosses."""
    ui_url: HttpUrl | None = None
    """Base URL of its Temporal UI. Targets then link to the workflow that called them."""

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        needed = _NEEDED.get(self.auth, ())
        if any(getattr(self, field) is None for field in needed):
            message = f'auth = "{self.auth}" needs {" and ".join(needed)}'
            raise ValueError(message)
        for field in ("start_keys", "bearer_keys"):
            if field not in needed and getattr(self, field) is not None:
                message = f'auth = "{self.auth}" with {field}: remove one of the two'
                raise ValueError(message)
        return self

    @property
    def is_renewing(self) -> bool:
        """Whether it renews and therefore does not depend on the sweep."""
        return self.auth == "signature" if self.renews is None else self.renews

    def may_start(self, service: str, operation: str) -> bool:
        """Whether `operations` allows this operation."""
        return f"{service}/{operation}" in self.operations or f"{service}/*" in self.operations


_UNKNOWN_CALLER = CallerPeer(auth="none", operations=())


class Service(UrlEntry):
    """Where starts arrive."""

    url: HttpUrl
    """The service's public URL: scheme, authority, and a prefix that a proxy strips. Callers' signatures cover it."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: int = Field(default=8081, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    held_starts: int = Field(default=100, ge=0)
    """Maximum number of starts of all callers held open. Further starts are answered at once."""
    certificate_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]+$")
    """Header in which our TLS proxy reports the client certificate's subject alternative name."""
    proxies: tuple[Network, ...] = ()
    """Addresses of these proxies. From any other address the header is a forgery."""
    allow_insecure: bool = False
    """Allow plain http in `url`. For development on one machine, or inside one trusted network."""

    @property
    def is_private(self) -> bool:
        """Whether the listener is bound to a loopback or private address."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host == "localhost"
        return (address.is_private or address.is_loopback) and not address.is_unspecified


class HandlerSettings(BridgeSettings):
    """All settings of the handler's service and workers, except the connection to Temporal."""

    other_side = frozenset({"receiver", "callback_keys", "handlers", "endpoints"})
    name: Name
    """Our name, as the callers' settings have it."""
    task_queue: str = Field(min_length=1)
    """Task queue of targets that name none."""
    service: Service
    """Where starts arrive."""
    hash_key: Key
    """Keys the input hash and the request ids. Never rotate it: the handler would refuse the renewals and polls of
    running calls, because their input would seem to be another one."""
    callers: dict[Name, CallerPeer] = Field(min_length=1)
    """The callers that we serve, by name."""
    nexus: bool = False
    """Whether our workers also serve their targets as native Nexus operations. The registration of the Nexus endpoint
    then decides which namespaces may call them."""
    sweep: bool = True
    """Whether the service starts a sweep for each target. False starts no sweep and stops no running one."""
    sweep_interval_s: float = Field(default=30, ge=0.1, le=3600)
    """Seconds between two sweeps. An outcome that the target's worker cannot deliver is late by up to this time."""
    abandoned_check_s: float = Field(default=60.0, gt=0, le=3600)
    """Seconds until the first check whether a caller still waits, for operations with `caller_close_policy =
    "request_cancel"`. Doubled after every check, up to an hour."""

    @field_validator("hash_key")
    @classmethod
    def _is_strong(cls, key: SecretStr) -> SecretStr:
        decode_key(key)
        return key

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, caller in self.callers.items():
            if caller.san is not None and not (self.service.certificate_header and self.service.proxies):
                message = f"callers.{name}.san needs service.certificate_header and service.proxies"
                raise ValueError(message)
        hash_key = KeySet(signing="hash", keys={"hash": self.hash_key})
        require_distinct_keys({"hash_key": hash_key, **self.key_sets})
        self.check_host(self.service.host)
        return self

    @property
    def key_sets(self) -> dict[str, KeySet]:
        """All key sets, by the names of their fields."""
        return {
            f"callers.{name}.{field}": key_set
            for name, caller in self.callers.items()
            for field in ("start_keys", "bearer_keys", "completion_keys")
            if (key_set := getattr(caller, field)) is not None
        }

    def probes(self) -> Iterator[EchoProbe]:
        """The echo of the receiver at each destination of each caller."""
        for name, caller in self.callers.items():
            for destination in caller.callbacks:
                yield EchoProbe(
                    name=name,
                    url=f"{destination.url}?handler={self.name}",
                    key_set=caller.completion_keys,
                    route=Route(networks=destination.networks, tls=caller.tls, proxy=caller.proxy),
                    answers=caller.answers,
                    peer=f"callers.{name}",
                )

    def caller(self, name: str) -> CallerPeer:
        """Settings of the caller *name*. A caller that is not in them, as a native Nexus caller, has the defaults."""
        return self.callers.get(name, _UNKNOWN_CALLER)

    def check_host(self, host: str) -> None:
        """Refuse a public *host* if a caller is authenticated only by its network.

        Raises:
            ValueError: *host* is public and a caller has auth "none". The text names the caller.
        """
        for name, caller in self.callers.items():
            if caller.auth == "none" and not self.service.model_copy(update={"host": host}).is_private:
                message = f'callers.{name}.auth: "none" needs a private listener, service.host is {host}'
                raise ValueError(message)
