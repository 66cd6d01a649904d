"""A balancer of TCP connections, as it stands before the frontends of a Temporal cluster with several nodes."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence

_CHUNK = 64 * 1024


class LoadBalancer:
    """Passes each connection to the node that has the fewest; a node that refuses it is left out.

    If a node dies, its connections end. Their clients connect again, and reach another node.
    """

    def __init__(self, nodes: Sequence[tuple[str, int]]) -> None:
        """*nodes* are hosts and ports."""
        self._open = Counter(dict.fromkeys(nodes, 0))
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self, host: str, port: int) -> AsyncIterator[None]:
        """Pass the connections that arrive on *host* and *port* until the context ends, and end them then."""
        server = await asyncio.start_server(self._accept, host, port)
        try:
            yield
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._pass(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        # A task that is canceled before its first step closes nothing itself.
        connection.add_done_callback(lambda _: writer.close())

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            for node in sorted(self._open, key=self._open.__getitem__):
                # Counted before the node answers, so that connections that arrive meanwhile go to the other nodes.
                self._open[node] += 1
                try:
                    if await _connect(node, reader, writer):
                        return
                finally:
                    self._open[node] -= 1


async def _connect(node: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Copy between a client and *node* until one of the two connections ends. False: the node refused it."""
    try:
        from_node, to_node = await asyncio.open_connection(*node)
    except OSError:
        return False
    with contextlib.closing(to_node):
        directions = {
            asyncio.create_task(_copy(reader, to_node)),
            asyncio.create_task(_copy(from_node, writer)),
        }
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in directions:
                each.cancel()
    return True


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one of the two connections ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
