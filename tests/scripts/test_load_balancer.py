"""The balancer before several nodes, over real sockets."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from scripts.environment.load_balancer import LoadBalancer
from scripts.environment.server import free_ports


@dataclass
class Node:
    """Says its name to every connection, and then what it receives."""

    name: str
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self, port: int) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        try:
            yield
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        writer.write(f"{self.name}\n".encode())
        with contextlib.suppress(OSError):
            while data := await reader.read(1000):
                writer.write(data)


class Client:
    """Connections through the balancer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._writers: list[asyncio.StreamWriter] = []

    async def connect(self) -> tuple[str, asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection, with the name of its node: empty if no node took it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers.append(writer)
        return (await asyncio.wait_for(reader.readline(), 20)).decode().strip(), reader, writer

    async def aclose(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


async def test_a_connection_goes_to_the_node_with_the_fewest_and_never_to_a_dead_one() -> None:
    """What is passed is unchanged. If a node dies, its connections end, and those of the other stay."""
    own, one, two = free_ports(3)
    first, second, client = Node("first"), Node("second"), Client(own)
    balancer = LoadBalancer([("127.0.0.1", one), ("127.0.0.1", two)])
    async with balancer.running("127.0.0.1", own), contextlib.aclosing(client):
        async with second.running(two):
            async with first.running(one):
                connections = [await client.connect() for _ in range(4)]
                assert [name for name, _, _ in connections] == ["first", "second", "first", "second"]
                for _, reader, writer in connections:
                    sent = bytes(range(256)) * 4000
                    writer.write(sent)
                    assert await asyncio.wait_for(reader.readexactly(len(sent)), 20) == sent
            for name, reader, writer in connections:
                if name == "first":
                    assert await asyncio.wait_for(reader.read(), 20) == b""
                else:
                    writer.write(b"still here")
                    assert await asyncio.wait_for(reader.readexactly(10), 20) == b"still here"
            assert (await client.connect())[0] == "second"
        assert (await client.connect())[0] == ""
    with pytest.raises(ConnectionRefusedError):
        await client.connect()


async def test_connections_that_arrive_at_once_are_divided_evenly() -> None:
    """None of them waits for the one before."""
    own, one, two = free_ports(3)
    first, second, client = Node("first"), Node("second"), Client(own)
    balancer = LoadBalancer([("127.0.0.1", one), ("127.0.0.1", two)])
    async with first.running(one), second.running(two), balancer.running("127.0.0.1", own), contextlib.aclosing(client):
        names = [name for name, _, _ in await asyncio.gather(*(client.connect() for _ in range(20)))]
        assert Counter(names) == {"first": 10, "second": 10}
