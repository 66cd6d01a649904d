"""Outgoing addresses: what an allow list and the connect guard refuse, and that what they allow can be used."""

import ipaddress
import socket
from ipaddress import IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict
from pydantic import ValidationError
from yarl import URL

from bridge.errors import DestinationRefusedError
from bridge.security.egress import (
    MAX_CALLBACK_URL,
    ConnectGuard,
    Destination,
    RefusedAddressError,
    allowed_destination,
    check_base_url,
    is_allowed_address,
)
from bridge.security.signatures import MessageKind, MessageSigner
from tests.support.helpers import key_set

ORDERS = Destination(url="https://orders.example/callbacks")
OTHERS = Destination(url="https://others.example:8443")
PLAIN = Destination(url="http://dev.example:8080/callbacks", allow_insecure=True)
BY_ADDRESS = Destination(url="https://10.1.2.3/in", networks=(IPv4Network("10.1.0.0/16"),))
BY_ADDRESS_6 = Destination(url="https://[fd00::7]:444/in")
LIST = (ORDERS, OTHERS, PLAIN, BY_ADDRESS, BY_ADDRESS_6)
ANY_TEXT = st.text(st.characters())


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        pytest.param("https://orders.example/callbacks", ORDERS, id="the prefix itself"),
        pytest.param("https://orders.example/callbacks/id?sig=x.y-z_", ORDERS, id="below the prefix"),
        pytest.param("https://orders.example:443/callbacks/id", ORDERS, id="default port spelled out"),
        pytest.param("https://Orders.EXAMPLE/callbacks/id", ORDERS, id="host in another case"),
        pytest.param("https://orders.example/callbacks/a%2Fb%3A/c?x=%5B%5D&y=/?@:", ORDERS, id="percent escapes"),
        pytest.param("https://orders.example/callbacks/...", ORDERS, id="three dots"),
        pytest.param("https://orders.example/callbacks/x?next=/../..", ORDERS, id="dots in the query"),
        pytest.param("https://others.example:8443/anything/at/all", OTHERS, id="no prefix"),
        pytest.param("https://others.example:8443", OTHERS, id="no path"),
        pytest.param("https://others.example:8443?sig=x", OTHERS, id="query without a path"),
        pytest.param("http://dev.example:8080/callbacks/id", PLAIN, id="plain http with the flag"),
        pytest.param("https://10.1.2.3/in/id", BY_ADDRESS, id="address that is listed"),
        pytest.param("https://[fd00::7]:444/in/id", BY_ADDRESS_6, id="version 6 address that is listed"),
        pytest.param(
            "https://orders.example/callbacks/" + "x" * (MAX_CALLBACK_URL - 33), ORDERS, id="as long as it may"
        ),
    ],
)
def test_a_url_below_a_listed_destination_is_allowed(text: str, destination: Destination) -> None:
    """The entry that allows it is found, and with it the networks that its host may resolve to."""
    assert allowed_destination(text, LIST) is destination


@pytest.mark.parametrize(
    "text",
    [
        # Not well-formed.
        pytest.param("", id="empty"),
        pytest.param("https://", id="no host"),
        pytest.param("https:///callbacks", id="empty host"),
        pytest.param("https://?sig=x", id="query in place of the host"),
        pytest.param("https://:443/callbacks", id="port without a host"),
        pytest.param("https://[::1];@/callbacks", id="an address as user"),
        pytest.param("orders.example/callbacks", id="no scheme"),
        pytest.param("//orders.example/callbacks", id="scheme-relative"),
        pytest.param("HTTPS://orders.example/callbacks", id="scheme in another case"),
        pytest.param("ftp://orders.example/callbacks", id="other scheme"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("temporal://system", id="Temporal's own"),
        pytest.param("https:orders.example/callbacks", id="no slashes"),
        pytest.param("https:/\\orders.example/callbacks", id="slash and backslash"),
        pytest.param("https://orders.example/callbacks/" + "x" * (MAX_CALLBACK_URL - 32), id="too long"),
        pytest.param(" https://orders.example/callbacks", id="blank before"),
        pytest.param("https://orders.example/callbacks\n", id="newline after"),
        pytest.param("https://orders.example/call backs", id="blank inside"),
        pytest.param("https://orders.example\t.evil/callbacks", id="tab in the host"),
        pytest.param("https://orders\n.example/callbacks", id="newline in the host"),
        pytest.param("https://orders.example/callbacks\x00", id="NUL"),
        pytest.param("https://orders.example/callbacks/ä", id="path not ASCII"),
        pytest.param("https://ordérs.example/callbacks", id="host not ASCII"),
        pytest.param("https://orders.example/callbacks/\udcff", id="lone surrogate"),
        pytest.param("https://orders.example/callbacks/%", id="stray percent"),
        pytest.param("https://orders.example/callbacks/%zz", id="no escape"),
        pytest.param("https://orders.example/callbacks/[1]", id="brackets in the path"),
        pytest.param("https://orders.example/callbacks/[::1]", id="address in the path"),
        pytest.param("https://orders.example/callbacks?x=[1]", id="brackets in the query"),
        pytest.param("https://orders.example/callbacks?{x}", id="braces"),
        pytest.param("https://orders.example/callbacks|x", id="bar"),
        pytest.param('https://orders.example/callbacks"', id="quote"),
        pytest.param("https://orders.example:https/callbacks", id="port no number"),
        pytest.param("https://orders.example:99999/callbacks", id="port out of range"),
        pytest.param("https://orders.example:-443/callbacks", id="port negative"),
        pytest.param("https://orders.example:443:443/callbacks", id="two ports"),
        pytest.param("https://orders.example:+443/callbacks", id="port with a sign"),
        pytest.param("https://orders.example:4_43/callbacks", id="port with an underscore"),
        pytest.param("https://orders.example:0443/callbacks", id="port with a zero before"),
        pytest.param("https://orders.example:/callbacks", id="port empty"),
        pytest.param("https://orders.example/callbacks/..;/admin", id="dots before a semicolon"),
        pytest.param("https://orders.example/callbacks/..;x=1/admin", id="dots with a path parameter"),
        pytest.param("https://orders.example/callbacks/..%3Badmin/x", id="dots before an encoded semicolon"),
        pytest.param("https://orders.example/callbacks/..%5cadmin", id="dots before a backslash"),
        pytest.param("https://orders.example/callbacks%5c..%5cadmin", id="backslashes"),
        pytest.param("https://orders.example/callbacks/%252e%252e/admin", id="dots encoded twice"),
        pytest.param("https://orders.example/callbacks/..%252fadmin", id="slash encoded twice"),
        pytest.param("https://orders.example/callbacks/..%00/admin", id="NUL in the path"),
        pytest.param("https://orders.example/callbacks/x%0d%0ay", id="line break in the path"),
        pytest.param("https://orders.example/callbacks/%c0%ae%c0%ae/admin", id="overlong dots"),
        pytest.param("https://orders.example/callbacks/..%c0%afadmin", id="overlong slash"),
        pytest.param("https://[orders.example]/callbacks", id="name in brackets"),
        pytest.param("https://[::1/callbacks", id="bracket open"),
        # Well-formed, and not for us.
        pytest.param("https://orders.example/callbacks#", id="empty fragment"),
        pytest.param("https://orders.example/callbacks#x", id="fragment"),
        pytest.param("https://orders.example/callbacks/id#@evil.example", id="fragment with an at"),
        pytest.param("https://user@orders.example/callbacks", id="user"),
        pytest.param("https://user:pw@orders.example/callbacks", id="user and password"),
        pytest.param("https://:pw@orders.example/callbacks", id="password alone"),
        pytest.param("https://:@orders.example/callbacks", id="empty password"),
        pytest.param("https://@orders.example/callbacks", id="empty user"),
        pytest.param("https://orders.example@127.0.0.1/callbacks", id="host as user"),
        pytest.param("https://orders.example%2f@127.0.0.1/callbacks", id="host and slash as user"),
        pytest.param("https://orders.example%40evil.example/callbacks", id="at escaped"),
        pytest.param("https://orders.example\\@127.0.0.1/callbacks", id="two parsers"),
        pytest.param("https://orders.example./callbacks", id="trailing dot"),
        pytest.param("https://orders%2Eexample/callbacks", id="percent in the host"),
        pytest.param("https://[fe80::1%25eth0]/callbacks", id="zone"),
        # Not listed.
        pytest.param("https://evil.example/callbacks", id="other host"),
        pytest.param("https://orders.example.evil/callbacks", id="host as a prefix"),
        pytest.param("https://evilorders.example/callbacks", id="host as a suffix"),
        pytest.param("https://a.orders.example/callbacks", id="host below"),
        pytest.param("https://example/callbacks", id="host above"),
        pytest.param("https://xn--/callbacks", id="broken international name"),
        pytest.param("http://orders.example/callbacks", id="plain http"),
        pytest.param("http://orders.example:443/callbacks", id="plain http on the port of https"),
        pytest.param("https://dev.example:8080/callbacks", id="https where http is flagged"),
        pytest.param("https://orders.example:444/callbacks", id="other port"),
        pytest.param("https://orders.example:0/callbacks", id="port 0"),
        pytest.param("https://others.example/", id="default port where another is listed"),
        pytest.param("https://orders.example", id="no path"),
        pytest.param("https://orders.example/", id="above the prefix"),
        pytest.param("https://orders.example/callback", id="short of the prefix"),
        pytest.param("https://orders.example/callbacks2", id="prefix of a name"),
        pytest.param("https://orders.example/callbacks%2Fid", id="escaped slash after the prefix"),
        pytest.param("https://orders.example/Callbacks/id", id="path in another case"),
        pytest.param("https://orders.example//callbacks/id", id="slash before the prefix"),
        pytest.param("https://orders.example/x/callbacks/id", id="prefix further down"),
        # Leaving the prefix again.
        pytest.param("https://orders.example/callbacks/../admin", id="dot segments"),
        pytest.param("https://orders.example/callbacks/x/..", id="dot segment at the end"),
        pytest.param("https://orders.example/callbacks/./x", id="single dot"),
        pytest.param("https://orders.example/x/../callbacks", id="dot segments before the prefix"),
        pytest.param("https://orders.example/callbacks/%2e%2e/admin", id="dots escaped"),
        pytest.param("https://orders.example/callbacks/.%2E/admin", id="one dot escaped"),
        pytest.param("https://orders.example/callbacks/%2E/admin", id="single dot escaped"),
        pytest.param("https://orders.example/callbacks/x%2f..%2f..%2fadmin", id="slashes escaped"),
        pytest.param("https://others.example:8443/..", id="dot segments without a prefix"),
        # Addresses, in every spelling that something on the way may take for one.
        *(
            pytest.param(f"https://{host}/callbacks", id=f"host {host}")
            for host in (
                *("127.0.0.1", "[::1]", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "localhost"),
                *(
                    "①②⑦.⓪.⓪.①",
                    "\uff11\uff12\uff17.\uff10.\uff10.\uff11",
                    "127。0。0。1",
                    "0x7f.0.0.1",
                    "0x7f000001",
                    "2130706433",
                    "127.1",
                ),
                *("0177.0.0.1", "127.000.000.001", "127.0.0.1.", "0", "169.254.169.254", "100.100.100.200"),
                *("8.8.8.8", "[2606:4700::1111]", "[64:ff9b::a9fe:a9fe]", "[::a9fe:a9fe]", "metadata", "10.1.2.4"),
            )
        ),
        pytest.param("https://010.1.2.3/in", id="listed address with a leading zero"),
        pytest.param("https://10.1.515/in", id="listed address in three parts"),
        pytest.param("https://167838211/in", id="listed address as a number"),
        pytest.param("https://[fd00:0::7]:444/in", id="listed version 6 address spelled otherwise"),
    ],
)
def test_a_url_that_is_not_listed_or_not_plain_is_refused(text: str) -> None:
    """Everything that is not, to the letter, below a listed destination: one error, which does not quote it."""
    with pytest.raises(DestinationRefusedError) as caught:
        allowed_destination(text, LIST)
    assert str(caught.value).startswith("callback url is not allowed: ")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("origin", ["https://orders.example.", "https://127.0.0.1.", "https://orders%2Eexample"])
def test_a_host_of_two_spellings_is_refused_though_it_is_listed(origin: str) -> None:
    """A trailing dot or an escape names the same host to some, and another one to others."""
    with pytest.raises(DestinationRefusedError):
        allowed_destination(f"{origin}/callbacks", [Destination.model_construct(url=origin)])


@pytest.mark.parametrize("text", ["https://orders.example/callbacks", "", "http://127.0.0.1/"])
def test_an_empty_allow_list_allows_nothing(text: str) -> None:
    """Default deny: a caller without callbacks in the settings gets none."""
    with pytest.raises(DestinationRefusedError):
        allowed_destination(text, [])


@given(ANY_TEXT | ANY_TEXT.map(lambda text: "https://orders.example/callbacks/" + text))
def test_arbitrary_text_is_refused_in_one_way_only(text: str) -> None:
    """For any text as a callback URL, the only exception is DestinationRefusedError."""
    try:
        allowed_destination(text, LIST)
    except DestinationRefusedError:
        pass
    else:
        assert text.startswith("https://orders.example/callbacks/")


SIGNER = MessageSigner(key_set())
PIECE = st.sampled_from(
    [
        *(
            "https://",
            "http://",
            "orders.example",
            "others.example",
            ":8443",
            ":",
            "@",
            "/",
            "//",
            "callbacks",
            "/callbacks/",
        ),
        *(
            "?",
            "#",
            "[",
            "]",
            "[::1]",
            "%",
            "%2e",
            "%2F",
            "%00",
            "..",
            ".",
            "x",
            "\\",
            "xn--",
            "10.1.2.3",
            "/in",
            "&=;",
            "'",
        ),
    ]
)


@given(
    st.sampled_from(["https://orders.example/callbacks", "https://others.example:8443", "https://10.1.2.3/in", ""]),
    st.lists(PIECE, max_size=8),
)
def test_what_is_allowed_can_be_signed_and_goes_where_the_list_says(start: str, pieces: list[str]) -> None:
    """An allowed callback that could not be signed, or led elsewhere, would fail long after the call was accepted."""
    text = start + "".join(pieces)
    try:
        destination = allowed_destination(text, LIST)
    except DestinationRefusedError:
        return
    url, listed = URL(text, encoded=True), URL(destination.url)
    assert (url.scheme, url.host, url.port) == (listed.scheme, listed.host, listed.port)
    assert url.user is url.password is None
    normal = URL(text)  # decodes what needs no escape, and removes dot segments
    assert normal.path == listed.path or normal.path.startswith(listed.path.rstrip("/") + "/")
    SIGNER.sign(MessageKind.COMPLETION, text, CIMultiDict(), b"")


@pytest.mark.parametrize(
    "text",
    [
        "https://h",
        "https://h/",
        "https://h/a/b%20c",
        "http://h:8080/a",
        "https://10.0.0.1",
        "https://[fd00::1]:444/a",
    ],
)
def test_a_base_url_is_kept_as_it_is_spelled(text: str) -> None:
    """It becomes part of what is signed."""
    assert check_base_url(text) == text
    assert Destination(url=text, allow_insecure=True).url == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("orders.example", id="no scheme"),
        pytest.param("ftp://orders.example", id="other scheme"),
        pytest.param("https://", id="no host"),
        pytest.param("https:///callbacks", id="empty host"),
        pytest.param("https://h?", id="empty query"),
        pytest.param("https://h?x=1", id="query"),
        pytest.param("https://h/#", id="empty fragment"),
        pytest.param("https://h/#x", id="fragment"),
        pytest.param("https://u@h", id="user"),
        pytest.param("https://:pw@h", id="password"),
        pytest.param("https://@h", id="empty user"),
        pytest.param("https://h:99999", id="port out of range"),
        pytest.param("https://h:x", id="port no number"),
        pytest.param("https://[zz]", id="no address in brackets"),
        pytest.param("https://h\t.evil", id="tab"),
        pytest.param("https://h /", id="blank"),
        pytest.param("https://hä", id="not ASCII"),
        pytest.param("https://xn--", id="broken international name"),
        pytest.param("https://h/[x]", id="brackets"),
        pytest.param("\udcff", id="lone surrogate"),
        pytest.param("https://h.", id="trailing dot"),
        pytest.param("https://h.:8443/prefix", id="trailing dot before a port"),
        pytest.param("https://h:0", id="port 0"),
        pytest.param("https://[::1]:0/prefix", id="port 0 of an address"),
        pytest.param("https://h%41", id="percent in the host"),
        pytest.param("https://h/a/../b", id="dots in the path"),
        pytest.param("https://h/%2e%2E/b", id="escaped dots in the path"),
        pytest.param("https://h/" + "x" * MAX_CALLBACK_URL, id="too long for any callback"),
    ],
)
def test_a_destination_that_is_no_base_url_is_refused_when_the_settings_are_read(text: str) -> None:
    """An entry that could never match, or not be checked, would otherwise be noticed by the first lost callback."""
    with pytest.raises(ValueError, match="needs the form"):
        check_base_url(text)
    with pytest.raises(ValidationError):
        Destination(url=text)


@given(
    ANY_TEXT | ANY_TEXT.map(lambda text: "https://" + text) | st.from_regex(r"https://[a.:/%@0-9\[\]]*", fullmatch=True)
)
def test_an_arbitrary_base_url_is_refused_as_a_value_error_that_does_not_quote_it(text: str) -> None:
    """Any text in the settings is a base URL, or raises an error with one constant text."""
    said = _refusal(text)
    if said is None:
        allowed_destination(text, [Destination(url=text, allow_insecure=True)])
    else:
        assert said == _refusal("")


def _refusal(text: str) -> str | None:
    try:
        check_base_url(text)
    except ValueError as error:
        return str(error)
    return None


REFUSED_ADDRESSES = [
    # Version 4, the first and the last of each block.
    *("0.0.0.0", "0.255.255.255", "10.0.0.0", "10.255.255.255", "100.64.0.0", "100.100.100.200", "100.127.255.255"),
    *("127.0.0.1", "127.255.255.255", "169.254.0.0", "169.254.169.254", "169.254.255.255", "172.16.0.0"),
    *("172.31.255.255", "192.0.0.0", "192.0.0.192", "192.0.0.255", "192.0.2.1", "192.88.99.1", "192.168.0.0"),
    *("192.168.255.255", "198.18.0.0", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.255", "240.0.0.1", "255.255.255.255", "168.63.129.16"),
    # The same inside version 6.
    *("::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::ffff:168.63.129.16"),
    *("::127.0.0.1", "::a9fe:a9fe", "::ffff:0:127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::808:808", "64:ff9b:1::1"),
    *("2002:a9fe:a9fe::", "2002:808:808::", "2001::1", "2001:0:a9fe:a9fe::"),
    # Version 6.
    *("::", "::1", "100::1", "2001:db8::1", "2001:1ff:ffff::1", "3fff::1", "3fff:fff:ffff::1", "fc00::1"),
    *("fd00:ec2::254", "fdff::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1"),
    *("4000::1", "8000::1", "1fff:ffff::1", "5f00::1"),
]


@pytest.mark.parametrize("text", REFUSED_ADDRESSES)
def test_no_connection_is_opened_to_an_address_that_is_not_public(text: str) -> None:
    """Loopback, private, shared, link-local, reserved, embedded and unassigned space, and a cloud's own agents."""
    assert not is_allowed_address(text)
    assert not is_allowed_address(text, [ipaddress.ip_network("198.51.101.0/24"), ipaddress.ip_network("2600::/16")])


@pytest.mark.parametrize(
    "text",
    [
        *("1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0"),
        *("172.15.255.255", "172.32.0.0", "192.0.1.0", "192.167.255.255", "192.169.0.0", "198.17.255.255"),
        *("198.20.0.0", "223.255.255.255", "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0"),
        *("2001:200::1", "2003::1", "2600::1", "2606:4700::1111", "3ffe::1", "::ffff:1.1.1.1"),
    ],
)
def test_a_connection_to_a_public_address_is_opened(text: str) -> None:
    """What is next to a refused block is public."""
    assert is_allowed_address(text)


@pytest.mark.parametrize(
    ("text", "network", "allowed"),
    [
        pytest.param("10.1.2.3", "10.1.0.0/16", True, id="inside"),
        pytest.param("10.2.2.3", "10.1.0.0/16", False, id="outside"),
        pytest.param("::ffff:10.1.2.3", "10.1.0.0/16", True, id="mapped inside"),
        pytest.param("::ffff:10.2.2.3", "10.1.0.0/16", False, id="mapped outside"),
        pytest.param("127.0.0.1", "127.0.0.0/8", True, id="loopback"),
        pytest.param("::1", "127.0.0.0/8", False, id="the other loopback"),
        pytest.param("::1", "::1/128", True, id="loopback of version 6"),
        pytest.param("fd00::7", "fd00::/8", True, id="unique local"),
        pytest.param("10.1.2.3", "::/0", False, id="all of version 6"),
        pytest.param("::1", "0.0.0.0/0", False, id="all of version 4"),
        pytest.param("1.1.1.1", "10.1.0.0/16", True, id="public with an opt-in"),
    ],
)
def test_a_network_is_opened_by_an_entry_that_names_it(text: str, network: str, *, allowed: bool) -> None:
    """A private target is one entry's opt-in, never a switch for all."""
    assert is_allowed_address(text, [ipaddress.ip_network(network)]) is allowed


@given(st.ip_addresses(v=4))
def test_an_address_embedded_in_version_6_is_allowed_no_more_than_itself(address: ipaddress.IPv4Address) -> None:
    """Mapped it is the same address, and every other embedding is refused."""
    number = int(address)
    assert is_allowed_address(f"::ffff:{address}") == is_allowed_address(str(address))
    for prefix in ("::", "64:ff9b::", "::ffff:0:0:0", "fe80::"):
        assert not is_allowed_address(str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | number)))
    assert not is_allowed_address(str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))))


@given(st.ip_addresses())
def test_an_allowed_address_is_one_that_the_standard_library_calls_global(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    """The list refuses at least what the library's does; where the library forgets some, the table above has them."""
    if is_allowed_address(str(address)):
        assert address.is_global
        assert not address.is_multicast


LOOPBACK = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 9))
LOOPBACK_6 = (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 9, 0, 0))
NETWORKS = (IPv4Network("127.0.0.0/8"),)


def test_the_guard_opens_its_own_networks_only() -> None:
    """The networks of one entry of the settings are not open to another."""
    ConnectGuard(NETWORKS).open_socket(LOOPBACK).close()
    ConnectGuard((IPv6Network("::1/128"),)).open_socket(LOOPBACK_6).close()
    for networks, address in (((), LOOPBACK), (NETWORKS, LOOPBACK_6), ((IPv6Network("::1/128"),), LOOPBACK)):
        with pytest.raises(RefusedAddressError):
            ConnectGuard(networks).open_socket(address)


def test_a_refusal_is_an_os_error_of_constant_text() -> None:
    """The connector collects OSErrors over several addresses, and keeps their type only if all texts are equal."""
    texts = set()
    for address in (LOOPBACK, LOOPBACK_6):
        with pytest.raises(RefusedAddressError) as caught:
            ConnectGuard(()).open_socket(address)
        assert isinstance(caught.value, OSError)
        assert caught.value.errno
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_the_guard_counts_the_addresses_that_it_has_allowed() -> None:
    """If the number does not grow during a request, a retry of the request is useless."""
    guard = ConnectGuard(NETWORKS)
    with pytest.raises(RefusedAddressError):
        guard.open_socket(LOOPBACK_6)
    assert guard.opened == 0
    guard.open_socket(LOOPBACK).close()
    assert guard.opened == 1
