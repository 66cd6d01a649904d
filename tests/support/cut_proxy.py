"""TCP proxies in front of the Temporal server: one cuts its connections at intervals, one falls silent."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def cutting_proxy(upstream: str, *, every_s: float) -> AsyncIterator[str]:
    """The address of a proxy to *upstream* that cuts all connections every *every_s* seconds."""
    host, _, port = upstream.rpartition(":")
    writers: set[asyncio.StreamWriter] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
            both = {writer, up_writer}
            writers.update(both)
            try:
                pumps = [asyncio.ensure_future(pump(reader, up_writer)), asyncio.ensure_future(pump(up_reader, writer))]
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                for each in pumps:
                    each.cancel()
            finally:
                writers.difference_update(both)
                for each_writer in both:
                    each_writer.transport.abort()

    async def cut() -> None:
        while True:
            await asyncio.sleep(every_s)
            for each in list(writers):
                each.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    cutting = asyncio.create_task(cut())
    try:
        address, own_port = server.sockets[0].getsockname()[:2]
        yield f"{address}:{own_port}"
    finally:
        cutting.cancel()
        server.close()
        for each in list(writers):
            each.transport.abort()


_HEADERS = 1
"""Type of the HTTP/2 frame with which a request begins."""


@contextlib.asynccontextmanager
async def silent_proxy(upstream: str, *, after: int) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """The address of a proxy to *upstream* that passes on *after* requests, and an event that the next one sets."""
    host, _, port = upstream.rpartition(":")
    pumps: list[asyncio.Task[None]] = []
    writers: list[asyncio.StreamWriter] = []
    is_silent, is_over, count = asyncio.Event(), asyncio.Event(), 0

    def keep(writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        if is_over.is_set():
            # Accepted or opened while the proxy ended.
            writer.transport.abort()

    async def up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        writer.write(await reader.readexactly(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")))
        while True:
            head = await reader.readexactly(9)
            count += head[3] == _HEADERS
            if count > after:
                is_silent.set()
                return
            writer.write(head + await reader.readexactly(int.from_bytes(head[:3])))
            await writer.drain()

    async def down(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        keep(writer)
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        keep(up_writer)
        pumps.extend((asyncio.create_task(up(reader, up_writer)), asyncio.create_task(down(up_reader, writer))))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield "{}:{}".format(*server.sockets[0].getsockname()[:2]), is_silent
    finally:
        server.close()
        is_over.set()
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for each_writer in writers:
            each_writer.transport.abort()
