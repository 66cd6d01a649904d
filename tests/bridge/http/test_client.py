"""The HTTP client against a real server on loopback: what it sends, tolerates and refuses."""

import asyncio
import ipaddress
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import timedelta
from typing import Any

import pytest
from multidict import CIMultiDict

import bridge
from bridge.errors import DestinationRefusedError, RemoteProtocolError, TransportError
from bridge.http.client import HttpAnswer, HttpClient
from tests.support.http_peer import SECRET, SOON, Peer, post, raw_server


def unused_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return int(unused.getsockname()[1])


async def test_a_message_arrives_as_it_was_given(client: HttpClient, peer: Peer) -> None:
    """Headers and body are sent as signed, without a further header that would describe the payload."""
    answer = await post(client, peer.url("/op"), b"\x00\xff")
    assert (answer.status, answer.body, answer.headers["x-answer"]) == (200, b"answer", "yes")
    assert peer.bodies == [b"\x00\xff"]
    headers = dict(peer.headers[0])
    assert headers.pop("Host") == f"127.0.0.1:{peer.port}"
    assert headers == {
        "Nexus-Request-Id": "request-7",
        "User-Agent": f"callback-bridge/{bridge.__version__}",
        "Accept-Encoding": "identity",
        "Accept": "*/*",
        "Content-Length": "2",
    }


@pytest.mark.parametrize("body", [b"", b"x", b"x" * 100_000], ids=["empty", "short", "long"])
async def test_no_content_type_is_invented(client: HttpClient, peer: Peer, body: bytes) -> None:
    """In Nexus a media type describes the payload, and the signature would not cover it."""
    await post(client, peer.url(), body)
    assert peer.bodies == [body]
    assert not [name for name, _ in peer.headers[0] if name.lower().startswith("content-") and name != "Content-Length"]


async def test_a_repeated_header_stays_two_lines(client: HttpClient, peer: Peer) -> None:
    """A multidict is passed on as it is, not flattened."""
    await post(client, peer.url(), headers=CIMultiDict([("Nexus-Link", "a"), ("Nexus-Link", "b")]))
    assert [value for name, value in peer.headers[0] if name == "Nexus-Link"] == ["a", "b"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/a%2Fb%2fc/%61%20", id="escapes in the path"),
        pytest.param("/op?callback=https%3A%2F%2Fh%2Fx%3Fsig%3Da.b-c_&x=%2b+", id="escapes in the query"),
        pytest.param("/a//b/./c/../d", id="dots and empty segments"),
        pytest.param("/%C3%A4?%c3%a4", id="other scripts"),
        pytest.param("/a;b=c,d:e@f!$&'()*~?a=1&a=2&&", id="delimiters"),
    ],
)
async def test_a_url_is_sent_as_it_is_spelled(client: HttpClient, peer: Peer, path: str) -> None:
    """Path and query are signed to the letter."""
    await post(client, peer.url(path))
    assert peer.lines == [f"POST {path}"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"])
async def test_no_connection_is_opened_to_a_network_that_was_not_allowed(
    client: HttpClient, peer: Peer, host: str
) -> None:
    """Neither by address nor by a name that resolves to one."""
    with pytest.raises(DestinationRefusedError) as caught:
        await post(client, f"http://{host}:{peer.port}/?{SECRET}", networks=())
    assert str(caught.value).startswith("destination address refused: ")
    assert peer.lines == []


async def test_a_network_is_allowed_for_the_one_request_only(client: HttpClient, peer: Peer) -> None:
    """Two requests at a time, one with the network and one without, each under its own rule."""
    answers = await asyncio.gather(
        post(client, peer.url()),
        post(client, f"http://localhost:{peer.port}/", networks=()),
        post(client, f"http://127.0.0.2:{peer.port}/", networks=(ipaddress.IPv4Network("127.0.0.1/32"),)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [HttpAnswer, DestinationRefusedError, DestinationRefusedError]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let every name resolve to the given addresses, in that order."""

    def resolve(*addresses: str) -> None:
        def getaddrinfo(_: str, port: int, *__: Any, **___: Any) -> list[Any]:
            return [
                (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
                if ":" in address
                else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in addresses
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return resolve


MIXED = [
    pytest.param(("10.0.0.1", "127.0.0.1"), id="bad first"),
    pytest.param(("127.0.0.1", "10.0.0.1"), id="good first"),
    pytest.param(("::1", "127.0.0.1", "10.0.0.1"), id="both versions"),
    pytest.param(("169.254.169.254", "10.0.0.1", "127.0.0.1"), id="two bad"),
]
ONLY_THIS = (ipaddress.IPv4Network("127.0.0.1/32"),)


@pytest.mark.parametrize("addresses", MIXED)
async def test_of_several_addresses_the_allowed_one_is_used(
    client: HttpClient, peer: Peer, resolve: Callable[..., None], addresses: tuple[str, ...]
) -> None:
    """A refused address is skipped like one that does not answer."""
    resolve(*addresses)
    answer = await post(client, f"http://orders.example:{peer.port}/", networks=ONLY_THIS)
    assert answer.status == 200


@pytest.mark.parametrize("addresses", MIXED)
async def test_an_allowed_address_that_is_down_is_not_a_refusal(
    client: HttpClient, resolve: Callable[..., None], addresses: tuple[str, ...]
) -> None:
    """A refusal is final and loses the result; while the allowed address restarts, trying again is right."""
    resolve(*addresses)
    with pytest.raises(TransportError):
        await post(client, f"http://orders.example:{unused_port()}/?{SECRET}", networks=ONLY_THIS)


@pytest.mark.parametrize(
    "addresses", [("10.0.0.1", "169.254.169.254"), ("::1", "10.0.0.1", "fd00::1"), ("64:ff9b::a00:1",)], ids=str
)
async def test_a_name_of_refused_addresses_only_is_refused(
    client: HttpClient, resolve: Callable[..., None], addresses: tuple[str, ...]
) -> None:
    """However many there are, and of whichever version."""
    resolve(*addresses)
    with pytest.raises(DestinationRefusedError):
        await post(client, "http://orders.example:8080/", networks=ONLY_THIS)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_an_answer(client: HttpClient, peer: Peer, status: int) -> None:
    """Following it would send signature and token to a host that is not on the allow list."""
    answer = await post(client, peer.url(f"/redirect?status={status}"))
    assert (answer.status, answer.body) == (status, b"go there")
    assert len(peer.lines) == 1


async def test_an_error_status_is_an_answer(client: HttpClient, peer: Peer) -> None:
    """`bridge.protocol.answers` decides what an answer means, by status, headers and body."""
    answer = await post(client, peer.url("/error"))
    assert (answer.status, answer.headers["Retry-After"]) == (503, "7")
    assert json.loads(answer.body) == {"message": "no"}


async def test_an_answer_is_not_decompressed(client: HttpClient, peer: Peer) -> None:
    """The bytes are returned as received, because a small compressed answer could be a large one."""
    assert (await post(client, peer.url("/gzip"))).body == b"\x1f\x8b not gzip"


async def test_an_answer_may_be_as_long_as_allowed_and_no_longer(client: HttpClient, peer: Peer) -> None:
    """A longer answer breaks the protocol. The error does not quote it."""
    assert len((await post(client, peer.url("/long?bytes=1000"), max_answer_bytes=1000)).body) == 1000
    with pytest.raises(RemoteProtocolError, match=r"^answer too long$"):
        await post(client, peer.url("/long?bytes=1001"), max_answer_bytes=1000)
    with pytest.raises(RemoteProtocolError):
        await post(client, peer.url("/long?bytes=16385"))


async def test_an_endless_answer_is_hung_up_on(client: HttpClient, peer: Peer) -> None:
    """Its connection is closed, not read to the end that never comes."""
    with pytest.raises(RemoteProtocolError):
        await post(client, peer.url("/endless"))
    await asyncio.wait_for(peer.finished.wait(), 10)


@pytest.mark.parametrize("path", ["/silent", "/drip"])
async def test_a_slow_answer_is_a_transport_error_in_time(client: HttpClient, peer: Peer, path: str) -> None:
    """The timeout limits the whole answer, also if single bytes arrive all the time."""
    with pytest.raises(TransportError, match=r"^no answer in time$"):
        await post(client, peer.url(f"{path}?{SECRET}"), timeout=SOON)


async def test_an_answer_may_take_as_long_as_its_call_allows(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A held start may take longer than other requests: only its own timeout ends it."""
    monkeypatch.setattr("bridge.http.client.REQUEST_TIMEOUT", SOON)
    async with aclosing(HttpClient()) as client:
        answer = asyncio.create_task(post(client, peer.url("/silent"), timeout=timedelta(seconds=30)))
        ended, _ = await asyncio.wait({answer}, timeout=3 * SOON.total_seconds())
        assert not ended, "cut"
        peer.finished.set()
        assert (await answer).status == 200


async def test_a_connection_that_is_never_accepted_is_a_transport_error_in_time(client: HttpClient) -> None:
    """A full backlog of the server delays no other request."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # bound, never listening, then full
        listening.listen(0)
        port = listening.getsockname()[1]
        filling = [socket.socket() for _ in range(4)]
        try:
            for each in filling:
                each.setblocking(False)
                each.connect_ex(("127.0.0.1", port))
            with pytest.raises(TransportError):
                await post(client, f"http://127.0.0.1:{port}/?{SECRET}", timeout=SOON)
        finally:
            for each in filling:
                each.close()


async def test_a_refused_connection_is_a_transport_error_without_the_url(client: HttpClient) -> None:
    """The text may stand in a history; the URL is signed and must not."""
    port = unused_port()
    with pytest.raises(TransportError) as caught:
        await post(client, f"http://127.0.0.1:{port}/callbacks?{SECRET}")
    assert "ConnectionRefused" in str(caught.value) or "cannot connect" in str(caught.value)
    assert not [part for part in (str(port), SECRET, "127.0.0.1", "callbacks") if part in str(caught.value)]
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


async def test_an_unknown_name_is_a_transport_error(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name servers come back."""

    def getaddrinfo(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(TransportError) as caught:
        await post(client, f"https://orders.example/?{SECRET}")
    assert "orders" not in str(caught.value)


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"220 mail.example ESMTP sig=secret.token\r\n")
    await writer.drain()


async def bad_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nsig=secret.token\r\nContent-Length: -1\r\n\r\n")
    await writer.drain()


async def huge_header(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nX: " + b"sig=secret.token" * 10_000 + b"\r\n\r\n")


async def bad_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nsig=secret.token\r\n")
    await writer.drain()


@pytest.mark.parametrize("serve", [hang_up, no_http, bad_header, huge_header, bad_chunks])
async def test_a_peer_that_speaks_no_http_is_a_transport_error_that_quotes_nothing(
    client: HttpClient, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> None:
    """aiohttp's own texts quote the line that they could not read."""
    async with raw_server(serve) as url:
        with pytest.raises(TransportError) as caught:
            await post(client, url)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    "first", ["HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n"]
)
async def test_an_interim_answer_of_a_proxy_is_passed_over(client: HttpClient, first: str) -> None:
    """The answer is the final one with any reason phrase, and without a body it is empty."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"body")
        writer.write(f"{first}HTTP/1.1 204 Went Well, Indeed\r\nX-Answer: yes\r\n\r\n".encode())
        await writer.drain()

    async with raw_server(serve) as url:
        answer = await post(client, url)
    assert (answer.status, answer.headers["X-Answer"], answer.body) == (204, "yes", b"")


async def test_a_body_that_is_cut_is_a_transport_error(client: HttpClient, peer: Peer) -> None:
    """Half an answer is not an answer."""
    with pytest.raises(TransportError):
        await post(client, peer.url("/cut"))


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        pytest.param("", {}, id="empty url"),
        pytest.param("/op", {}, id="relative url"),
        pytest.param("ftp://h/", {}, id="other scheme"),
        pytest.param("http://", {}, id="no host"),
        pytest.param("http://h:99999/", {}, id="port out of range"),
        pytest.param("http://[zz]/", {}, id="no address"),
        pytest.param("http://127.0.0.1:9/\udcff", {}, id="lone surrogate in the url"),
        pytest.param("http://127.0.0.1:9/ x\r\n", {}, id="newline in the url"),
        pytest.param(None, {"X": "a\r\nSignature: b"}, id="newline in a header"),
        pytest.param(None, {"X\n": "a"}, id="newline in a header's name"),
        pytest.param(None, {"X": "a\x00"}, id="NUL in a header"),
    ],
)
async def test_what_cannot_be_sent_is_a_transport_error(
    client: HttpClient, peer: Peer, url: str | None, headers: dict[str, str]
) -> None:
    """No exception of aiohttp or yarl leaves the client."""
    with pytest.raises(TransportError) as caught:
        await post(client, peer.url() if url is None else url, headers=CIMultiDict(headers))
    assert not url or url not in str(caught.value)
    assert peer.lines == []


async def test_an_answer_with_a_long_header_is_read(client: HttpClient) -> None:
    """A proxy may add a long `Content-Security-Policy` to each answer."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\nbody")
        policy = b"Content-Security-Policy: " + b"x" * 12_000
        writer.write(b"HTTP/1.1 200 OK\r\n" + policy + b"\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with raw_server(answer) as url:
        assert (await post(client, url)).status == 200


async def test_cookies_are_not_kept(client: HttpClient, peer: Peer) -> None:
    """One host's cookie must not ride on another caller's callback."""
    answer = await post(client, peer.url("/cookie"))
    assert "Set-Cookie" in answer.headers
    await post(client, peer.url())
    assert "Cookie" not in dict(peer.headers[1])


async def test_proxy_variables_and_netrc_are_ignored(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Through a proxy the guard would see the proxy's address only; from .netrc would come credentials."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port()}")
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    async with aclosing(HttpClient()) as client:
        assert (await post(client, peer.url())).status == 200
    assert peer.lines == ["POST /"]
    assert "Authorization" not in dict(peer.headers[0])
