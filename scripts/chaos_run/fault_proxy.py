"""A bad network on the loopback: an HTTP proxy that delays, resets, cuts, duplicates and loses messages by plan.

It answers some requests by itself. It parses only as much HTTP/1.1 as is needed to find the end of a message, and
forwards every byte unchanged, so that signatures stay valid. It sends each request over a connection of its own, as
some load balancers do.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum

_HOST = "127.0.0.1"
_MAX_HEAD = 64 * 1024
_MAX_BODY = 8 * 1024 * 1024
_PATIENCE = 30.0
"""Seconds for one exchange, and for how long a lost reply keeps its sender waiting."""


class FaultKind(str, Enum):
    """What happens to one request."""

    NONE = "none"
    LATENCY = "latency"
    """A little later."""
    DELAY = "delay"
    """Seconds later."""
    RESET = "reset"
    """The connection breaks before anything was passed on."""
    CUT = "cut"
    """The request is passed on, then the connection breaks at both ends."""
    DUPLICATE = "duplicate"
    """Passed on twice, at once or one after the other."""
    REPLY_LOST = "reply_lost"
    """Passed on and answered; the answer never arrives, and the connection stays open."""
    MAINTENANCE = "maintenance"
    """The proxy itself answers 200, with a page for people."""
    NOT_FOUND = "not_found"
    """The proxy itself answers 404."""
    BAD_GATEWAY = "bad_gateway"
    """The proxy itself answers 502."""


def _page(status: str, text: str) -> bytes:
    body = f"<html><body>{text}</body></html>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


OWN_ANSWERS = {
    FaultKind.MAINTENANCE: _page("200 OK", "We are back soon."),
    FaultKind.NOT_FOUND: _page("404 Not Found", "There is no such page."),
    FaultKind.BAD_GATEWAY: _page("502 Bad Gateway", "The server behind this proxy does not answer."),
}
"""Answers of the proxy itself, which no peer has signed."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to one request."""

    kind: FaultKind
    seconds: float = 0.0
    """How much later: the request, or its duplicate."""
    is_forwarded: bool = False
    """Whether the request arrives before the proxy answers by itself."""


class FaultProxy:
    """A proxy in front of one port. The n-th request gets the n-th fault of the plan."""

    def __init__(self, faults: Iterator[Fault]) -> None:
        self._faults = faults
        self._is_calm = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        """Port on which the proxy listens, on the loopback only."""
        self.upstream = 0
        """Port of the server behind the proxy. It may be set after the proxy has started."""
        self._ambush: tuple[asyncio.Event, float] | None = None
        self.counts: Counter[FaultKind] = Counter()
        """Requests by what happened to them."""

    @property
    def url(self) -> str:
        """URL of the proxy."""
        return f"http://{_HOST}:{self.port}"

    async def ambush(self, held_s: float) -> None:
        """Wait for the next request. The proxy holds it for *held_s* and then breaks its connection."""
        self._ambush = (asyncio.Event(), held_s)
        await self._ambush[0].wait()

    def calm(self) -> None:
        """Forward all later requests without a fault."""
        self._is_calm = True

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["FaultProxy"]:
        """Listen on a free port; at the end break every connection."""
        server = await asyncio.start_server(self._accept, _HOST, 0, limit=_MAX_HEAD)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        # A task that is canceled before its first step runs no `finally`.
        connection.add_done_callback(lambda _: writer.transport.abort())
        self._keep(connection)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One sender's connection, request after request."""
        try:
            while (request := await read_message(reader)) is not None:
                reply = await self._treat(request, reader)
                if reply is None:
                    break
                writer.write(reply)
                await writer.drain()
        except (OSError, ValueError, EOFError, TimeoutError):
            pass
        finally:
            # Abort the connection. A close would end it in order.
            writer.transport.abort()

    async def _treat(self, request: bytes, reader: asyncio.StreamReader) -> bytes | None:
        """Apply the planned fault to *request*. Return the reply, or None to break the connection."""
        if self._ambush is not None:
            (reached, held_s), self._ambush = self._ambush, None
            reached.set()
            await asyncio.sleep(held_s)
            return None
        fault = Fault(kind=FaultKind.NONE) if self._is_calm else next(self._faults)
        self.counts[fault.kind] += 1
        match fault.kind:
            case FaultKind.NONE:
                return await self._exchange(request)
            case FaultKind.LATENCY | FaultKind.DELAY:
                await asyncio.sleep(fault.seconds)
                return await self._exchange(request)
            case FaultKind.RESET:
                return None
            case FaultKind.CUT:
                _, writer = await asyncio.open_connection(_HOST, self.upstream)
                writer.write(request)
                await writer.drain()
                writer.close()
                return None
            case FaultKind.DUPLICATE:
                self._keep(asyncio.create_task(self._repeat(request, fault.seconds)))
                return await self._exchange(request)
            case FaultKind.REPLY_LOST:
                await self._exchange(request)
                with contextlib.suppress(TimeoutError):
                    # Until the sender gives up; it says nothing more on this connection.
                    await asyncio.wait_for(reader.read(1), _PATIENCE)
                return None
            case FaultKind.MAINTENANCE | FaultKind.NOT_FOUND | FaultKind.BAD_GATEWAY:
                if fault.is_forwarded:
                    await self._exchange(request)
                return OWN_ANSWERS[fault.kind]

    async def _repeat(self, request: bytes, seconds: float) -> None:
        await asyncio.sleep(seconds)
        with contextlib.suppress(OSError, ValueError, EOFError, TimeoutError):
            await self._exchange(request)

    async def _exchange(self, request: bytes) -> bytes:
        """Pass *request* on and return the whole reply."""
        try:
            reader, writer = await asyncio.open_connection(_HOST, self.upstream, limit=_MAX_HEAD)
        except OSError:
            return OWN_ANSWERS[FaultKind.BAD_GATEWAY]
        try:
            writer.write(request)
            await writer.drain()
            reply = await asyncio.wait_for(read_message(reader), _PATIENCE)
        finally:
            writer.close()
        if reply is None:
            message = "closed without a reply"
            raise EOFError(message)
        return reply


async def read_message(reader: asyncio.StreamReader) -> bytes | None:
    """One HTTP/1.1 message with a `Content-Length`, or without a body; None where the stream ends before it.

    Raises:
        EOFError: The stream ends inside the message.
        ValueError: It is too large, or framed in a way that is not known here.
    """
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise
    except asyncio.LimitOverrunError as error:
        raise ValueError(str(error)) from None
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        match name.strip().lower():
            case b"content-length":
                length = int(value)
            case b"transfer-encoding":
                message = "a message in chunks cannot be passed on"
                raise ValueError(message)
            case _:
                pass
    if not 0 <= length <= _MAX_BODY:
        message = f"a body of {length} bytes cannot be passed on"
        raise ValueError(message)
    return head + await reader.readexactly(length)
