"""Where outgoing requests may go: an allow list on the parsed URL, and a guard on every address at connect time.

Both are needed. The list is checked when a callback is registered and again when it is used; the guard sees what the
name resolved to, which no earlier check can know. Pure, but for making the socket that a connection asks for.
"""

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

from aiohappyeyeballs import AddrInfoType
from pydantic import BaseModel, ConfigDict, field_validator
from yarl import URL

from bridge.errors import DestinationRefusedError

MAX_CALLBACK_URL = 1000
"""Temporal's own cap of a callback URL."""

_REFUSED = "callback url is not allowed"
# Brackets stand around a version 6 address only: elsewhere they are ungrammatical, and could not be signed.
_RFC3986 = re.compile(r"https?://(?:\[[0-9a-fA-F:.]+\])?(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")
_AUTHORITY = re.compile(r"(?:\[[^\]]+\]|[^:]+)(?::[1-9][0-9]{0,4})?")
"""One spelling of a port: `int` takes `+443` and `4_43` as well."""
_AMBIGUOUS = re.compile(r"[\\\x00-\x1f\x7f\ufffd]")

_IPv4 = ipaddress.IPv4Network
_IPv6 = ipaddress.IPv6Network
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_DENIED_4 = tuple(
    _IPv4(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        # The last one is a cloud's host agent at a public address.
        *("203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32"),
    )
)
# Version 6 is an allow rule, so that embedded, translated and unassigned space is refused without being listed.
_GLOBAL_6 = _IPv6("2000::/3")
_DENIED_6 = tuple(_IPv6(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))


def check_base_url(text: str) -> str:
    """Refuse what is not `https://host[:port][/prefix]`, or plain http in its place.

    Raises:
        ValueError: It is not. The text does not quote it.
    """
    # Longer paths are appended: even an empty query or fragment would swallow them.
    try:
        if set(text) & set("?@"):
            raise ValueError  # noqa: TRY301 - one text for all reasons
        _parsed(text)
    except ValueError:
        message = (
            "needs the form https://host[:port][/prefix], at most 1 000 characters, "
            "without user, query, fragment, `.` or `..` in the path, port 0, or a dot at the end of the host"
        )
        raise ValueError(message) from None
    return text


def _parsed(text: str) -> URL:
    """*text* as a URL that a request may go to.

    Raises:
        ValueError: It is none.
    """
    # First the raw text: parsers drop tabs and newlines, and turn other scripts' digits into addresses.
    if len(text) > MAX_CALLBACK_URL or not _RFC3986.fullmatch(text):
        raise ValueError
    # `encoded`, else yarl would re-quote, and a signed URL would change between check and use.
    url = URL(text, encoded=True)
    host = url.host or ""
    # Unquoted, because many a server takes `%2e%2e%2f` for `../`, and so leaves the prefix; some cut at a semicolon.
    path = unquote(url.raw_path)
    segments = {segment.partition(";")[0] for segment in path.split("/")}
    if (
        # None or 0: no connection can be opened to either.
        not url.port
        or (url.user, url.password) != (None, None)
        or "@" in url.raw_authority
        or not host
        or host.endswith(".")
        or "%" in host
        or {".", ".."} & segments
        # Read as a slash, as the end, or once more: backslash, control characters, overlong UTF-8, `%252e`.
        or _AMBIGUOUS.search(path)
        or unquote(path) != path
        or not _AUTHORITY.fullmatch(text.split("/", 3)[2].partition("?")[0])
    ):
        raise ValueError
    return url


class Destination(BaseModel):
    """One entry of an allow list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str
    """Scheme, host and port, and a path prefix if there is one: `https://orders.example/callbacks`."""
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    """Non-public networks that this entry's host may resolve to."""
    allow_insecure: bool = False
    """Allow plain http. For development on one machine."""

    @field_validator("url")
    @classmethod
    def _is_an_origin(cls, text: str) -> str:
        return check_base_url(text)

    def covers(self, url: URL) -> bool:
        own = URL(self.url, encoded=True)
        if url.scheme == "http" and not self.allow_insecure:
            return False
        prefix = own.raw_path.rstrip("/") + "/"
        return (url.scheme, url.host, url.port) == (own.scheme, own.host, own.port) and (
            url.raw_path.startswith(prefix) or url.raw_path == own.raw_path
        )


@dataclass(frozen=True, kw_only=True)
class AllowList:
    """The destinations of one caller. Empty: nothing is allowed."""

    destinations: tuple[Destination, ...]

    def allows(self, text: str) -> bool:
        """Whether `check` finds an entry."""
        try:
            self.check(text)
        except DestinationRefusedError:
            return False
        return True

    def check(self, text: str) -> Destination:
        """Find the entry that allows the callback URL *text*.

        Raises:
            DestinationRefusedError: It is not well-formed or not allowed; one text for all reasons.
        """
        try:
            url = _parsed(text)
        except ValueError:
            raise DestinationRefusedError(_REFUSED) from None
        # An address, or a name that a resolver may read as one, is allowed only by an entry that spells it so; the
        # comparison of whole hosts in `covers` is that rule.
        for destination in self.destinations:
            if destination.covers(url):
                return destination
        raise DestinationRefusedError(_REFUSED)


def is_allowed_address(text: str, networks: Iterable[_Network] = ()) -> bool:
    """Whether a connection to the IP address *text* may be opened; *networks* are allowed beside public space."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address.version == network.version and address in network for network in networks):
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_4)
    return address in _GLOBAL_6 and not any(address in network for network in _DENIED_6)


@dataclass
class _Passage:
    networks: tuple[_Network, ...] = ()
    has_opened: bool = False


class ConnectGuard:
    """Makes the sockets of outgoing connections, and refuses those to an address that is not allowed.

    The networks that a destination may use are bound to the request that is being made, not to the guard: a context
    variable carries them through the connector, which knows of no request.
    """

    def __init__(self) -> None:
        self._passage: ContextVar[_Passage | None] = ContextVar("passage", default=None)

    @contextmanager
    def allowing(self, networks: tuple[_Network, ...]) -> Iterator[None]:
        """Allow *networks*, beside public space, to connections opened inside."""
        token = self._passage.set(_Passage(networks))
        try:
            yield
        finally:
            self._passage.reset(token)

    @property
    def has_opened(self) -> bool:
        """Whether any address was let through since `allowing`; if so, trying again may change something."""
        passage = self._passage.get()
        return passage is not None and passage.has_opened

    def open_socket(self, address: AddrInfoType) -> socket.socket:
        """The connector's socket factory."""
        family, kind, protocol, _, socket_address = address
        passage = self._passage.get() or _Passage()
        if not is_allowed_address(str(socket_address[0]), passage.networks):
            # An OSError of constant text: what the connector can report for one of several addresses.
            raise RefusedAddressError(errno.EACCES, RefusedAddressError.TEXT)
        # The connector may race addresses in tasks of their own: a context variable set there would not be seen here.
        passage.has_opened = True
        return socket.socket(family, kind, protocol)


class RefusedAddressError(OSError):
    """The connect guard's refusal, inside the connector."""

    TEXT = "destination address refused"
