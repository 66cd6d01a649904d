"""The callers of a handler service, and how each proves who it is: a signature, a certificate, a secret or a network.

This is the one place where a further way to authenticate is added.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import DestinationRefusedError, UntrustedError, bad_request
from bridge.http.in_flight import InFlight
from bridge.http.incoming_message import IncomingMessage
from bridge.runtime.reloaded import LiveKeys
from bridge.security.egress import Network, allowed_destination
from bridge.security.keys import KeySet, KeySource
from bridge.security.signatures import MessageKind, MessageVerifier
from handler.settings import CallerPeer, HandlerSettings, Service
from handler.start.limits import TokenBucket


@dataclass(frozen=True, kw_only=True)
class Caller:
    """A caller that the service serves."""

    name: str
    """Key of the caller in the settings."""
    peer: CallerPeer
    """Settings of the caller."""
    verifier: MessageVerifier | None
    """None if this caller does not sign."""
    service: Service
    """Names the proxies that report client certificates."""
    starts: TokenBucket
    """The starts that it may make now."""
    in_flight: InFlight
    """Its requests that are served now."""
    bearer_keys: KeySource | None
    """None if this caller has no bearer secret."""

    def receive(self, kind: MessageKind, request: web.Request) -> IncomingMessage:
        """Authenticate *request* as a message of this caller.

        Raises:
            UntrustedError: The proof of the caller's settings is missing or invalid.
            nexusrpc.HandlerError: BAD_REQUEST, a header is not part of the protocol or can be read in two ways.
        """
        if self.peer.san is not None:
            _check_certificate(self.peer.san, self.service, request)
        if self.bearer_keys is not None:
            _check_bearer(self.bearer_keys(), request.headers.getall("Authorization", []))
        if self.peer.auth == "none":
            _check_network(self.peer, request)
        return IncomingMessage(request, kind, self.verifier)

    def callback_in(self, request: web.Request) -> str | None:
        """Return the callback URL of a start; None if it has none.

        Raises:
            nexusrpc.HandlerError: BAD_REQUEST, there are several, or the caller's settings do not allow it.
        """
        callbacks = request.query.getall("callback", [])
        if not callbacks:
            return None
        if len(callbacks) > 1:
            message = "more than one callback url"
            raise bad_request(message)
        try:
            allowed_destination(callbacks[0], self.peer.callbacks)
        except DestinationRefusedError as error:
            # The deployment is at fault. A caller that signs retries, so that a change of the settings saves its calls.
            is_retryable = True if self.verifier is not None else None
            raise HandlerError(str(error), type=HandlerErrorType.BAD_REQUEST, retryable_override=is_retryable) from None
        return callbacks[0]


def callers(settings: HandlerSettings, keys: LiveKeys) -> Mapping[str, Caller]:
    """Return the callers of *settings*, by name."""
    found = {}
    for name, peer in settings.callers.items():
        start_keys, bearer_keys = keys(f"callers.{name}.start_keys"), keys(f"callers.{name}.bearer_keys")
        found[name] = Caller(
            name=name,
            peer=peer,
            verifier=MessageVerifier(start_keys, public_base=settings.service.url) if peer.start_keys else None,
            service=settings.service,
            starts=TokenBucket(per_second=peer.limits.starts_per_second, burst=peer.limits.burst),
            in_flight=InFlight(),
            bearer_keys=bearer_keys if peer.bearer_keys else None,
        )
    return found


def _check_bearer(key_set: KeySet, found: Sequence[str]) -> None:
    scheme, _, text = found[0].partition(" ") if len(found) == 1 else ("", "", "")
    given = hashlib.sha256(text.strip().encode(errors="surrogateescape")).digest()
    # Compare digests against every key, so that timing reveals nothing.
    known = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in key_set.keys.values()]
    if scheme.lower() != "bearer" or not sum(hmac.compare_digest(given, each) for each in known):
        reason = "bearer secret missing or unknown"
        raise UntrustedError(reason)


def _check_certificate(san: str, service: Service, request: web.Request) -> None:
    # Only our proxy has seen the certificate. Any other sender can invent the header.
    if not _is_from(service.proxies, request):
        reason = "certificate not reported by one of service.proxies"
        raise UntrustedError(reason)
    if request.headers.getall(service.certificate_header or "", []) != [san]:
        reason = "certificate missing, or not the caller's"
        raise UntrustedError(reason)


def _check_network(peer: CallerPeer, request: web.Request) -> None:
    # Behind a proxy, `remote` is the proxy's address and does not identify the sender.
    is_forwarded = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    if is_forwarded or not _is_from(peer.networks, request):
        reason = "unsigned, and from outside the caller's networks"
        raise UntrustedError(reason)


def _is_from(networks: Sequence[Network], request: web.Request) -> bool:
    address = ipaddress.ip_address(request.remote) if request.remote else None
    # A listener on `::` names an IPv4 sender by an IPv6 address.
    return address is not None and any((getattr(address, "ipv4_mapped", None) or address) in each for each in networks)
