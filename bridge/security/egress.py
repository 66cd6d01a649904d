"""Where outgoing requests may go: an allow list for the parsed URL, and a guard for every address at connect time.

Both are needed. The list is checked when a callback is registered and again when it is used. The guard checks the
address to which the name resolves, and this address exists only at connect time. Apart from creating the socket of a
connection this module does no I/O.
"""

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Annotated, Self
from urllib.parse import unquote

from aiohappyeyeballs import AddrInfoType
from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator, model_validator
from yarl import URL

from bridge.errors import DestinationRefusedError

MAX_CALLBACK_URL = 1000
"""Most characters of a callback URL. Temporal's server has the same limit."""

_REFUSED = "callback url is not allowed: the handler's settings need its address in this caller's callbacks"
# Brackets are allowed only around a version 6 address. Elsewhere RFC 3986 forbids them, and they cannot be signed.
_RFC3986 = re.compile(r"https?://(?:\[[0-9a-fA-F:.]+\])?(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*")
_AUTHORITY = re.compile(r"(?:\[[^\]]+\]|[^:]+)(?::[1-9][0-9]{0,4})?")
"""Allows one spelling of a port. `int` also accepts `+443` and `4_43`."""
_AMBIGUOUS = re.compile(r"[\\\x00-\x1f\x7f\ufffd]")
"""Characters of a decoded path that some servers read as a slash or as the end of the path."""

_IPv4 = ipaddress.IPv4Network
_IPv6 = ipaddress.IPv6Network


def _network(value: object) -> _IPv4 | _IPv6:
    try:
        return ipaddress.ip_network(str(value))
    except ValueError:
        message = "needs the form 10.1.0.0/16 or fd00::/8; all bits after the prefix are 0"
        raise ValueError(message) from None


Network = Annotated[_IPv4 | _IPv6, PlainValidator(_network)]
"""A network in the settings."""

_DENIED_4 = tuple(
    _IPv4(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        # The last network is the host agent of one cloud. The agent has an address in the public space.
        *("203.0.113.0/24", "224.0.0.0/3", "168.63.129.16/32"),
    )
)
# For version 6 the public space is listed, so that embedded, translated and unassigned addresses are refused.
_GLOBAL_6 = _IPv6("2000::/3")
_DENIED_6 = tuple(_IPv6(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"))


def check_base_url(text: str) -> str:
    """Return *text* if it has the form `https://host[:port][/prefix]`, or the same with http.

    Raises:
        ValueError: *text* has another form. The error does not quote it.
    """
    # Requests append a path to a base URL. If the base URL had a `?`, the appended text would belong to the query.
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
        ValueError: *text* is not such a URL.
    """
    # Check the raw text first: parsers drop tabs and newlines, and read digits of other scripts as addresses.
    if len(text) > MAX_CALLBACK_URL or not _RFC3986.fullmatch(text):
        raise ValueError
    # yarl raises IndexError for `https://[::1];@/`.
    if not _AUTHORITY.fullmatch(text.split("/", 3)[2].partition("?")[0]):
        raise ValueError
    # Without `encoded` yarl quotes the URL again, and a signed URL would change between check and use.
    url = URL(text, encoded=True)
    host = url.host or ""
    # Decode the path, because many servers read `%2e%2e%2f` as `../` and leave the prefix. Some servers
    # ignore the part of a segment after a semicolon.
    path = unquote(url.raw_path)
    segments = {segment.partition(";")[0] for segment in path.split("/")}
    if (
        # If the port is None or 0, no connection can be opened.
        not url.port
        or (url.user, url.password) != (None, None)
        or "@" in url.raw_authority
        or not host
        or host.endswith(".")
        or "%" in host
        or {".", ".."} & segments
        # Some servers read a backslash, a control character or overlong UTF-8 as a slash or as the end of the path.
        # Some decode the path twice (`%252e`).
        or _AMBIGUOUS.search(path)
        or unquote(path) != path
    ):
        raise ValueError
    return url


HttpUrl = Annotated[str, AfterValidator(lambda text: check_base_url(text).rstrip("/"))]
"""A base URL in the settings."""


class UrlEntry(BaseModel):
    """An entry of the settings with a URL."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: HttpUrl
    """Its URL. Plain http needs `allow_insecure`."""
    allow_insecure: bool = False
    """Whether plain http is allowed."""

    @model_validator(mode="after")
    def _is_safe(self) -> Self:
        if not self.allow_insecure and not self.url.startswith("https://"):
            message = "needs https; for development on one machine set allow_insecure = true in the same entry"
            raise ValueError(message)
        return self


class Destination(UrlEntry):
    """One entry of an allow list."""

    url: HttpUrl
    """Scheme, host, port and optionally a path prefix: `https://orders.example/callbacks`."""
    networks: tuple[Network, ...] = ()
    """Non-public networks that this entry's host may resolve to."""
    allow_insecure: bool = False
    """Whether plain http is allowed, for development on one machine."""

    def covers(self, url: URL) -> bool:
        """Whether *url* has this entry's scheme, host and port, and a path below its prefix."""
        entry = URL(self.url, encoded=True)
        prefix = entry.raw_path.rstrip("/") + "/"
        return (url.scheme, url.host, url.port) == (entry.scheme, entry.host, entry.port) and (
            url.raw_path.startswith(prefix) or url.raw_path == entry.raw_path
        )


def allowed_destination(text: str, destinations: Iterable[Destination]) -> Destination:
    """Find the entry of *destinations* that allows the callback URL *text*.

    Raises:
        DestinationRefusedError: *text* is malformed or not allowed. The error has one text for all reasons.
    """
    try:
        url = _parsed(text)
    except ValueError:
        raise DestinationRefusedError(_REFUSED) from None
    # A host that is an address, or a name that a resolver reads as an address, needs an entry with the same
    # spelling: `covers` compares whole hosts.
    for destination in destinations:
        if destination.covers(url):
            return destination
    raise DestinationRefusedError(_REFUSED)


def is_allowed_address(text: str, networks: Iterable[Network] = ()) -> bool:
    """Whether a connection to the IP address *text* may be opened: it is public or in one of *networks*."""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address.version == network.version and address in network for network in networks):
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_4)
    return address in _GLOBAL_6 and not any(address in network for network in _DENIED_6)


class ConnectGuard:
    """Creates the sockets of the connections to one destination, and refuses an address that is not allowed."""

    def __init__(self, networks: tuple[Network, ...]) -> None:
        """*networks* are the non-public networks to which the connections may go."""
        self._networks = networks
        self.opened = 0
        """Number of sockets created so far. If it grew during a failed request, one address was allowed."""

    def open_socket(self, address: AddrInfoType) -> socket.socket:
        """Create a socket for *address*: the socket factory of aiohttp's connector.

        Raises:
            RefusedAddressError: The address is not allowed.
        """
        family, kind, protocol, _, socket_address = address
        if not is_allowed_address(str(socket_address[0]), self._networks):
            # The connector handles only OSError. If all addresses fail, it reports the text of the last error.
            raise RefusedAddressError(errno.EACCES, RefusedAddressError.TEXT)
        self.opened += 1
        return socket.socket(family, kind, protocol)


class RefusedAddressError(OSError):
    """The connect guard refuses an address. Only the connector sees this error."""

    TEXT = "destination address refused"
