"""The listener of a stand-alone service: its connections with their limits, and a graceful stop.

A service that is mounted into another application uses that application's listener instead.
"""

import asyncio
import errno
import logging
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from aiohttp import web
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import bad_request
from bridge.http.application import MAX_HEADER_BYTES, SERVER, AccessLogger, answer
from bridge.protocol.handler_error import encode_handler_error
from bridge.runtime.event_log import event_logger

SHUTDOWN_TIMEOUT = timedelta(seconds=10)
MAX_CONNECTIONS = 512
HEADER_TIMEOUT = timedelta(seconds=10)
"""For the headers of a request: from the opening of the connection, or from the first byte of a later request."""
ANSWER_TIMEOUT = timedelta(seconds=10)
"""For a peer to read an answer, once the buffers of the system are full."""
_ACCEPT_AGAIN_S = 0.05
_DESCRIPTORS = 4096

_log = event_logger(__name__)
_SILENT = logging.getLogger(f"{__name__}.silent")
_SILENT.disabled = True
"""In place of aiohttp's own logger, which quotes the line of a request that cannot be parsed. It may hold a token."""


class _Protocol(web.RequestHandler):
    """One connection. A request that cannot be parsed is answered like every other bad request, without quoting it.

    The headers of a request are limited in time and size. aiohttp limits only each header and their number.
    """

    __slots__ = ("_due", "_unfinished", "_unread")

    _due: asyncio.TimerHandle | None
    """Closes the connection; None while no headers are expected."""
    _unfinished: int
    """Bytes of headers that are not complete yet."""
    _unread: asyncio.TimerHandle
    """Closes the connection, if the peer does not read."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect headers."""
        super().connection_made(transport)
        self._unfinished = 0
        self._due = self._loop.call_later(HEADER_TIMEOUT.total_seconds(), self.force_close)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, and count it if it is a part of headers."""
        count, is_header = self._request_count, self.is_idle
        try:
            super().data_received(data)
        except Exception:  # noqa: BLE001 - any error of the parser: yarl raises IndexError for `GET http://[::1];@/`
            self.log_exception("a request broke the parser")
            self.force_close()
            return
        if self._request_count > count:
            self._expect_nothing()
        elif is_header and data:
            self._unfinished += len(data)
            if self._due is None:
                self._due = self._loop.call_later(HEADER_TIMEOUT.total_seconds(), self.force_close)
            if self._unfinished > MAX_HEADER_BYTES:
                # A NUL is allowed nowhere in headers. The parser refuses the request, and `handle_error` answers it.
                super().data_received(b"\0")

    def pause_writing(self) -> None:
        """Expect the peer to read. aiohttp would wait for ever, and the connection would never be idle."""
        super().pause_writing()
        self._unread = self._loop.call_later(ANSWER_TIMEOUT.total_seconds(), self.force_close)

    def resume_writing(self) -> None:
        """Write again."""
        super().resume_writing()
        self._unread.cancel()

    def force_close(self) -> None:
        """Close the connection. If the peer does not read what is written already, this frees the descriptor later."""
        transport = self.transport
        super().force_close()
        if transport is not None and transport.get_write_buffer_size():
            self._loop.call_later(ANSWER_TIMEOUT.total_seconds(), transport.abort)

    def _expect_nothing(self) -> None:
        self._unfinished = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def log_exception(self, *_: object, **__: object) -> None:
        """Log that a request could not be parsed, and nothing of it."""
        _log.info("bridge.request_unreadable")

    @property
    def is_idle(self) -> bool:
        """Whether the connection waits for a request, or for the rest of its headers."""
        return self._waiter is not None and not self._waiter.done() and self.transport is not None

    @property
    def rank(self) -> tuple[bool, float]:
        """Order in which idle connections are closed: those without a request first, and the oldest of them first."""
        return self._request_count > 0, self._next_keepalive_close_time

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, message)
        error = bad_request("the request is not valid HTTP: it is malformed, or a line or header is too long")
        if status >= 500:
            error = HandlerError("internal error", type=HandlerErrorType.INTERNAL)
        response = answer(*encode_handler_error(error))
        response.headers["Server"] = SERVER
        response.force_close()
        return response


class _Server(web.Server):
    """Accepts connections up to a limit.

    If the limit is reached, or the process has no descriptor left, idle connections are closed in favor of new ones.
    asyncio's own server would log each failed attempt to accept, many thousand times a second.
    """

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **(self._kwargs | {"logger": _SILENT}))

    async def accept(self, listening: socket.socket, *, limit: int) -> None:
        """Accept the connections of *listening* until canceled. *limit* holds for all sockets of the server."""
        listening.settimeout(0)
        logged = float("-inf")
        while True:
            problem = ""
            try:
                accepted, _ = await self._loop.sock_accept(listening)
                if sum(each.transport is not None for each in self._connections) >= limit and not self._close_idle():
                    accepted.close()
                    problem = "all connections are in use"
                else:
                    await self._loop.connect_accepted_socket(self, accepted)
            except OSError as error:
                # Usually EMFILE: no descriptor is left. The connection stays in the queue of the socket.
                problem = error.strerror or type(error).__name__
                await asyncio.sleep(0 if self._close_idle() else _ACCEPT_AGAIN_S)
            if problem and time.monotonic() - logged >= 1:
                logged = time.monotonic()
                _log.warning("bridge.connections_exhausted", extra={"bridge.reason": problem, "bridge.limit": limit})

    def _close_idle(self) -> bool:
        """Close the connection that is needed least. Returns whether there was one."""
        idle = [each for each in self._connections if isinstance(each, _Protocol) and each.is_idle]
        if idle:
            min(idle, key=lambda each: each.rank).force_close()
        return bool(idle)


class ServiceRunner(web.AppRunner):
    """Serves an application over connections that answer a malformed request in the form of the protocol."""

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()

        async def handle(request: web.BaseRequest) -> web.StreamResponse:
            try:
                return await server.request_handler(request)
            except web.HTTPExpectationFailed:
                # aiohttp raises it before any middleware runs, and its text quotes the request.
                return answer(*encode_handler_error(bad_request("the header Expect may only be 100-continue")))

        return _Server(
            handle,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,  # noqa: SLF001 - aiohttp has no other way to choose the protocol's class
        )


def bind(host: str, port: int, *, cure: str = "", reuse_port: bool = False) -> list[socket.socket]:
    """Listen on every address of *host*.

    Raises:
        OSError: The address cannot be used. The `strerror` of the error names address and reason, and ends with *cure*.
    """
    sockets: list[socket.socket] = []
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sockets.append(socket.create_server(address[:2], family=family, reuse_port=reuse_port))
    except (OSError, UnicodeError) as error:
        for each in sockets:
            each.close()
        # `getaddrinfo` raises UnicodeError for `127.0.0..1`. `create_server` repeats the address in its text.
        reason = str(error.strerror).partition(" (")[0] if isinstance(error, OSError) else "not the name of a host"
        message = f"cannot listen on {host} port {port}: {reason}{cure}"
        raise OSError(getattr(error, "errno", errno.EINVAL), message) from None
    return sockets


def connection_limit() -> int:
    """Return how many connections the process may accept, by its limit of open descriptors.

    Half of the descriptors stay free for outgoing connections, Temporal and files.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 2)


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors, and return `connection_limit`."""
    infinity = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if infinity != soft < _DESCRIPTORS:
        soft = _DESCRIPTORS if hard == infinity else min(hard, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connection_limit()


@asynccontextmanager
async def listening(
    app: web.Application, sockets: Sequence[socket.socket], *, max_connections: int | None = None
) -> AsyncIterator[str]:
    """Serve *app* on *sockets* over at most *max_connections* connections, and yield the URL.

    The default is the number that `raise_descriptor_limit` returns, also for a receiver inside a worker.

    At the end the service reports that it is not ready, accepts no new connections, finishes the running requests, and
    closes.
    """
    if HttpRequestParser is HttpRequestParserPy:
        _log.warning("bridge.slow_http_parser")
    runner = ServiceRunner(
        app,
        access_log_class=AccessLogger,
        access_log=logging.getLogger("bridge.access"),
        auto_decompress=False,
        # In debug mode error pages contain tracebacks.
        debug=False,
        keepalive_timeout=30,
        lingering_time=2,
        # A path holds an operation token of 4 KiB, and header lines hold callback headers of 8 KiB.
        max_line_size=8190,
        max_field_size=MAX_HEADER_BYTES - 4,
        shutdown_timeout=SHUTDOWN_TIMEOUT.total_seconds(),
        # If the sender disconnects, a completion must not be interrupted.
        handler_cancellation=False,
    )
    limit = raise_descriptor_limit() if max_connections is None else max_connections
    accepting: list[asyncio.Task[None]] = []
    try:
        await runner.setup()
        server = runner.server
        assert isinstance(server, _Server)
        accepting = [asyncio.create_task(server.accept(each, limit=limit)) for each in sockets]
        host, port = sockets[0].getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        for task in accepting:
            task.cancel()
        await asyncio.gather(*accepting, return_exceptions=True)
        for each in sockets:
            each.close()
        await runner.cleanup()


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    return stop
