"""A TCP proxy in front of the Temporal server that cuts its connections at intervals."""

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
