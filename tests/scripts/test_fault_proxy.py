"""The bad network, over real sockets: each fault does what its name says, and nothing is altered."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from scripts.chaos_run.fault_proxy import Fault, FaultKind, FaultProxy
from tests.support.helpers import assert_eventually


@dataclass
class Peer:
    """The server behind the proxy."""

    seen: list[tuple[str, str | None, bytes]] = field(default_factory=list)
    port: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append((request.raw_path, request.headers.get("X-Signed"), await request.read()))
        return web.Response(status=201, text=f"answer {len(self.seen)}")


@asynccontextmanager
async def behind(*faults: Fault) -> AsyncIterator[tuple[FaultProxy, Peer]]:
    """A proxy with these faults, then none, before a peer."""
    peer = Peer()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", peer.answer)
    runner = web.AppRunner(app, handler_cancellation=False)
    await runner.setup()
    proxy = FaultProxy(itertools.chain(faults, itertools.repeat(Fault(kind=FaultKind.NONE))))
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        proxy.upstream = peer.port = runner.addresses[0][1]
        async with proxy.running():
            yield proxy, peer
    finally:
        await runner.cleanup()


async def post(proxy: FaultProxy, body: bytes = b"content", *, total: float = 20) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=total)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.post(f"{proxy.url}/a%2Fb?q=1", data=body, headers={"X-Signed": "yes"}) as response,
    ):
        return response.status, await response.text()


async def test_what_is_passed_on_is_unchanged() -> None:
    """Path as spelled, headers and body; and one connection carries many requests."""
    async with behind() as (proxy, peer), aiohttp.ClientSession() as session:
        for size in (0, 1, 1_000_000):
            sent = {"X-Signed": str(size)}
            async with session.post(f"{proxy.url}/a%2Fb?q=%20", data=b"x" * size, headers=sent) as response:
                assert response.status == 201
            assert peer.seen[-1] == ("/a%2Fb?q=%20", str(size), b"x" * size)
    assert proxy.counts == {FaultKind.NONE: 3}


async def test_a_reset_request_never_arrives() -> None:
    """The connection breaks; the next request passes."""
    async with behind(Fault(kind=FaultKind.RESET)) as (proxy, peer):
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(proxy)
        assert peer.seen == []
        assert await post(proxy) == (201, "answer 1")


async def test_a_cut_request_arrives_and_its_sender_learns_nothing() -> None:
    """What a peer did and could not say."""
    async with behind(Fault(kind=FaultKind.CUT)) as (proxy, peer):
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(proxy)

        async def arrived() -> None:
            assert peer.seen == [("/a%2Fb?q=1", "yes", b"content")]

        await assert_eventually(arrived)


async def test_a_duplicate_arrives_twice_byte_for_byte() -> None:
    """Its sender sees one answer."""
    async with behind(Fault(kind=FaultKind.DUPLICATE, seconds=0.01)) as (proxy, peer):
        assert (await post(proxy))[0] == 201

        async def arrived() -> None:
            assert peer.seen == [("/a%2Fb?q=1", "yes", b"content")] * 2

        await assert_eventually(arrived)


async def test_a_lost_reply_leaves_its_sender_waiting() -> None:
    """The request arrives; the sender's own timeout ends it."""
    async with behind(Fault(kind=FaultKind.REPLY_LOST)) as (proxy, peer):
        with pytest.raises(TimeoutError):
            await post(proxy, total=0.3)
        assert len(peer.seen) == 1


@pytest.mark.parametrize("is_forwarded", [True, False], ids=["the request arrives", "nothing arrives"])
@pytest.mark.parametrize(
    ("kind", "status"), [(FaultKind.MAINTENANCE, 200), (FaultKind.NOT_FOUND, 404), (FaultKind.BAD_GATEWAY, 502)]
)
async def test_the_proxy_answers_by_itself(kind: FaultKind, status: int, is_forwarded: bool) -> None:
    """With a page for people. The next request on the same connection gets the answer of the peer."""
    async with (
        behind(Fault(kind=kind, is_forwarded=is_forwarded)) as (proxy, peer),
        aiohttp.ClientSession() as session,
    ):
        async with session.post(proxy.url, data=b"content") as response:
            assert (response.status, response.content_type) == (status, "text/html")
        assert len(peer.seen) == int(is_forwarded)
        async with session.post(proxy.url, data=b"content") as response:
            assert response.status == 201


@pytest.mark.parametrize("kind", [FaultKind.LATENCY, FaultKind.DELAY])
async def test_a_late_request_arrives(kind: FaultKind) -> None:
    """And is answered."""
    async with behind(Fault(kind=kind, seconds=0.05)) as (proxy, _):
        assert await post(proxy) == (201, "answer 1")
        assert proxy.counts[kind] == 1


async def test_a_calm_proxy_does_no_harm() -> None:
    """The planned faults are skipped."""
    async with behind(Fault(kind=FaultKind.RESET)) as (proxy, _):
        proxy.calm()
        assert await post(proxy) == (201, "answer 1")


async def test_an_unavailable_peer_is_a_bad_gateway() -> None:
    """A load balancer answers the same."""
    async with behind() as (proxy, _):
        proxy.upstream = 1
        assert (await post(proxy))[0] == 502


async def test_what_cannot_be_framed_breaks_the_connection() -> None:
    """Chunks are not known here: nothing is passed on by guess."""
    async with behind() as (proxy, peer):
        for head in (
            b"Transfer-Encoding: chunked\r\n",
            b"Content-Length: -1\r\n",
            b"X: " + b"x" * 70_000 + b"\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"POST / HTTP/1.1\r\n" + head + b"\r\n")
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
        assert peer.seen == []
