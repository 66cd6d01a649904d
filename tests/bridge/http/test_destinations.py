"""A destination of the HTTP client: its places, its connections, and that one that hangs delays no other."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from yarl import URL

from bridge.errors import DestinationBusyError, DestinationRefusedError, TransportError
from bridge.http import client as http_client
from bridge.http.client import REQUEST_TIMEOUT, HttpClient
from tests.support.helpers import assert_eventually
from tests.support.http_peer import SOON, Peer, answer_once, post, raw_server


async def test_two_messages_use_one_connection(client: HttpClient, peer: Peer) -> None:
    """Connections are kept alive."""
    await post(client, peer.url())
    await post(client, peer.url("/error"))
    await post(client, peer.url("/redirect"))
    assert len(peer.lines) == 3
    assert len(peer.connections) == 1


async def test_no_more_connections_are_opened_than_allowed(peer: Peer) -> None:
    """A burst waits its turn and spares the peer."""
    async with aclosing(HttpClient(requests_per_destination=2)) as client:
        await asyncio.gather(*(post(client, peer.url()) for _ in range(10)))
    assert len(peer.lines) == 10
    assert len(peer.connections) <= 2


async def test_a_kept_connection_serves_only_the_entry_that_allowed_it(client: HttpClient, peer: Peer) -> None:
    """A caller with a private network opens a connection. It is not used for a caller without that network."""
    assert (await post(client, peer.url())).status == 200
    with pytest.raises(DestinationRefusedError):
        await post(client, peer.url(), networks=())
    assert (await post(client, peer.url())).status == 200
    assert len(peer.connections) == 1


@asynccontextmanager
async def hanging(client: HttpClient, peer: Peer, count: int) -> AsyncIterator[None]:
    """*count* requests that *peer* does not answer."""
    before = peer.lines.count("POST /silent")
    held = [asyncio.create_task(post(client, peer.url("/silent"), timeout=timedelta(seconds=60))) for _ in range(count)]

    async def arrived() -> None:
        assert peer.lines.count("POST /silent") == before + count

    try:
        await assert_eventually(arrived)
        yield
    finally:
        for each in held:
            each.cancel()
        await asyncio.gather(*held, return_exceptions=True)


async def test_a_destination_that_hangs_delays_only_its_own_requests(peer: Peer) -> None:
    """Neither the limit of a destination nor one of the whole client is used up for others.

    Once a request has waited in vain, the others are asked to come back when the requests in flight may have timed out.
    """
    async with (
        aclosing(HttpClient(requests_per_destination=120)) as client,
        hanging(client, peer, 120),
        raw_server(answer_once) as other,
    ):
        with pytest.raises(DestinationBusyError) as busy:
            await post(client, peer.url(), patience=timedelta(0))
        assert busy.value.retry_after is None
        with pytest.raises(DestinationBusyError) as stuck:
            await post(client, peer.url(), patience=SOON)
        assert stuck.value.retry_after is not None
        assert REQUEST_TIMEOUT / 2 <= stuck.value.retry_after <= REQUEST_TIMEOUT * 1.5
        assert (await post(client, other, patience=timedelta(0))).status == 200


async def test_a_busy_destination_is_waited_for_once_and_served_again_when_it_answers(peer: Peer) -> None:
    """After a wait in vain, later requests fail at once and hold no slot of a worker.

    Neither one answer of a slow destination nor requests that end without an answer change that.
    """
    day = timedelta(days=1)
    async with aclosing(HttpClient(requests_per_destination=4)) as client:

        async def queued() -> None:
            [destination] = client._destinations.values()
            assert destination._places._waiters

        async with hanging(client, peer, 3):
            async with hanging(client, peer, 1):
                with pytest.raises(DestinationBusyError):
                    await post(client, peer.url(), patience=SOON)
                with pytest.raises(DestinationBusyError):
                    await asyncio.wait_for(post(client, peer.url(), patience=day, timeout=day), 30)
            async with hanging(client, peer, 1):
                with pytest.raises(DestinationBusyError):
                    await asyncio.wait_for(post(client, peer.url(), patience=day, timeout=day), 30)
        async with hanging(client, peer, 4):
            with pytest.raises(DestinationBusyError):
                await asyncio.wait_for(post(client, peer.url(), patience=day, timeout=day), 30)
        assert (await post(client, peer.url())).status == 200
        async with hanging(client, peer, 4):
            waiting = asyncio.create_task(post(client, peer.url(), patience=day, timeout=day))
            await assert_eventually(queued)
        assert (await waiting).status == 200


async def test_a_name_server_that_hangs_delays_only_its_own_names(
    client: HttpClient, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look-up of each name runs at a time, its requests end in time, and other names are looked up meanwhile."""
    answers, asked, real = threading.Event(), list[str](), socket.getaddrinfo

    def getaddrinfo(host: str, *given: Any, **named: Any) -> Any:
        asked.append(host)
        if host.endswith(".example"):
            answers.wait(60)
        return real("127.0.0.1", *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(http_client, "CONNECT_TIMEOUT", SOON)
    names = [f"http://slow{number}.example/" for number in range(40)]
    try:
        for _ in range(2):
            sent = (post(client, each, timeout=timedelta(days=1)) for each in names)
            found = await asyncio.wait_for(asyncio.gather(*sent, return_exceptions=True), 40)
            assert {type(each) for each in found} == {TransportError}
        assert sorted(asked) == sorted(URL(each).host or "" for each in names)
        assert (await post(client, f"http://fast.test:{peer.port}/")).status == 200
    finally:
        answers.set()


async def test_a_kept_connection_that_the_peer_closed_is_replaced_at_once(client: HttpClient) -> None:
    """If a peer restarts between two messages, no retry is visible to people."""
    served: list[int] = []

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\nbody")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        served.append(1)
        await reader.read(1)  # the next message's first byte: then hang up

    async with raw_server(once) as url:
        assert (await post(client, url)).status == 200
        assert (await post(client, url)).status == 200
    assert len(served) == 2


async def test_a_closed_client_holds_no_connection(peer: Peer) -> None:
    """Closing twice is harmless, and using the client again opens it again."""
    client = HttpClient()
    await client.aclose()
    await post(client, peer.url())
    await client.aclose()
    await client.aclose()
    await post(client, peer.url())
    await client.aclose()
    assert len(peer.connections) == 2
