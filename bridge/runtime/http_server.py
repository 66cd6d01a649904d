"""The parts that both services share as aiohttp servers: answers, limits, health, logs, and a graceful stop.

A route reads the request, calls one function and answers. Every answer passes one middleware. The middleware turns an
error into a Nexus Failure with its status. It signs an answer only if the answer depends on nothing but the verified
parts of the request.
"""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TypeVar

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import (
    DestinationRefusedError,
    RemoteProtocolError,
    UntrustedError,
    bad_request,
    not_found,
    reason_label,
    without_text,
)
from bridge.protocol.handler_error import encode_handler_error
from bridge.protocol.headers import LINK
from bridge.protocol.payload import MAX_BODY_BYTES
from bridge.runtime.event_log import event_logger
from bridge.runtime.incoming_message import LIVE, PROOF
from bridge.security.redaction import plain

SHUTDOWN_TIMEOUT = timedelta(seconds=10)
MAX_CONNECTIONS = 512
MAX_HEADER_BYTES = 16 * 1024
"""Largest request line and headers together."""
HEADER_TIMEOUT = timedelta(seconds=10)
"""For the headers of a request: from the opening of the connection, or from the first byte of a later request."""
_READY_CACHE_S = 1
_SERVER = "bridge"

_MAX_HEADER_BYTES = 2900
"""Largest headers of an answer before it is signed. With the signature and aiohttp's own headers they have at most
3.5 KiB. If the headers do not fit a proxy's buffer (nginx: 4 KiB), the proxy replaces the answer with a 502."""

_ACCEPT_AGAIN_S = 0.05

_log = event_logger(__name__)

Facts = dict[str, str | int]
FACTS: web.RequestKey[Facts] = web.RequestKey("facts", dict)
"""Fields that a route adds to the access log: ids and labels, never a token or a URL."""

_ServiceT = TypeVar("_ServiceT")

Route = Callable[[web.Request], Awaitable[web.StreamResponse]]
ReadyCheck = Callable[[], Awaitable[bool]]


_STOPPING: web.AppKey[asyncio.Event] = web.AppKey("stopping", asyncio.Event)
"""Set when the process stops. From then on `/readyz` answers 503."""


def create_app(check: ReadyCheck) -> web.Application:
    """An application with health routes and the error middleware.

    The application may be mounted into another one. The service is ready while *check* returns true and the process is
    not stopping. A wrong method is answered 404, because server 1.29 retries a 405.
    """
    stopping = asyncio.Event()
    checking = asyncio.Lock()
    is_ready, checked = False, float("-inf")

    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def ready(_: web.Request) -> web.Response:
        nonlocal is_ready, checked
        # Every check is a call to Temporal, and strangers may ask.
        async with checking:
            if time.monotonic() - checked >= _READY_CACHE_S:
                is_ready, checked = await check(), time.monotonic()
        if is_ready and not stopping.is_set():
            return web.Response(text="ready\n")
        return web.Response(status=503, text="not ready\n")

    app = web.Application(middlewares=[_middleware], client_max_size=MAX_BODY_BYTES)
    app[_STOPPING] = stopping
    app.on_response_prepare.append(_hide_versions)
    app.on_shutdown.append(_stop)
    app.router.add_get(LIVE, alive, name="livez")
    app.router.add_get("/readyz", ready)
    return app


async def _stop(app: web.Application) -> None:
    app[_STOPPING].set()


def answer(status: int, headers: dict[str, str], body: bytes) -> web.Response:
    """A response with exactly these headers. aiohttp's helpers add a charset, which would change a payload's type."""
    return web.Response(status=status, headers=headers, body=body or None)


def add_route(
    app: web.Application,
    path: str,
    key: web.AppKey[_ServiceT],
    method: Callable[[_ServiceT, web.Request], Awaitable[web.Response]],
) -> None:
    """Add *method* as the route of POST *path*. *app* stores the service object under *key* when it has a client."""

    async def call(request: web.Request) -> web.Response:
        return await method(request.app[key], request)

    async def expected(_: web.Request) -> None:
        """Do not ask for the body yet: `IncomingMessage.body` does, when the headers are verified."""

    app.router.add_post(path, call, expect_handler=expected)


@web.middleware
async def _middleware(request: web.Request, handler: Route) -> web.StreamResponse:
    request[FACTS] = {}
    try:
        _refuse_long_headers(request)
        response = await handler(request)
        _finish(request, response)
    except Exception as error:  # noqa: BLE001 - a bug must become an answer, not a traceback
        response = _error_answer(request, error)
        _finish(request, response)
    return response


def _refuse_long_headers(request: web.Request) -> None:
    if sum(len(name) + len(value) + 4 for name, value in request.raw_headers) > MAX_HEADER_BYTES:
        message = f"the headers are over {MAX_HEADER_BYTES} bytes"
        raise bad_request(message)


def _error_answer(request: web.Request, error: Exception) -> web.Response:
    match error:
        case HandlerError():
            shown, reason = error, error.message
        case UntrustedError():
            # The operator sees in the log which check failed. The answer does not show it to the peer.
            shown, reason = HandlerError(str(error), type=HandlerErrorType.UNAUTHENTICATED), error.reason
            request[FACTS]["bridge.untrusted"] = reason_label(reason)
        case RemoteProtocolError() | DestinationRefusedError():
            shown, reason = bad_request(str(error)), str(error)
        case web.HTTPMethodNotAllowed() | web.HTTPNotFound():
            shown, reason = not_found("no such route"), error.reason
        case web.HTTPException():
            shown, reason = bad_request(error.reason), error.reason
        case _:
            shown, reason = HandlerError("internal error", type=HandlerErrorType.INTERNAL), type(error).__name__
            _log.error("bridge.internal_error", extra={"bridge.error": reason}, exc_info=without_text(error))
    request[FACTS]["bridge.refused"] = plain(reason)
    return answer(*encode_handler_error(shown))


def _finish(request: web.Request, response: web.StreamResponse) -> None:
    """Leave out the links that do not fit, and sign the answer if the route has set the proof."""
    headers = response.headers
    while LINK in headers and sum(len(name) + len(value) + 4 for name, value in headers.items()) > _MAX_HEADER_BYTES:
        # Commas only separate links, because a comma inside a link is percent-encoded. No decision depends on a link.
        if kept := headers[LINK].rpartition(", ")[0]:
            headers[LINK] = kept
        else:
            del headers[LINK]
    if (proof := request.get(PROOF)) is not None and isinstance(response, web.Response):
        body = response.body or b""
        assert isinstance(body, bytes)
        proof.sign_answer(response.status, headers, body)


async def _hide_versions(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = _SERVER


_NAMED_FACTS = ("bridge.message", "bridge.operation", "bridge.caller", "bridge.peer", "bridge.target", "bridge.answer")
"""Facts that the sentence of an access line names, in this order."""


class AccessLogger(AbstractAccessLogger):
    """Logs one line per request: the route's template, never the path, because the path may hold a token."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Log one answered request, except for the health routes. *time* is in seconds."""
        facts: Facts = {}
        template = "unmatched"
        if isinstance(request, web.Request):
            facts = request.get(FACTS, {})
            resource = request.match_info.route.resource
            template = resource.canonical if resource is not None else template
        if template.endswith((LIVE, "/readyz")):
            return
        if not self.logger.isEnabledFor(logging.INFO):
            return
        ms, reason = round(time * 1000, 1), facts.get("bridge.refused")
        subject = " ".join([str(facts[name]) for name in _NAMED_FACTS if name in facts]) or template
        self.logger.info(
            "bridge.http_request: %s: %d%s in %s ms",
            *(subject, response.status, f" ({reason})" if reason else "", ms),
            extra={"bridge.route": template, "bridge.status": response.status, "bridge.ms": ms, **facts},
        )


class _NoParserQuotes(logging.Filter):
    """Replaces the log records of aiohttp's parser, because they quote the malformed line, which may hold a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "aiohttp.server":
            record.exc_info = None
            record.msg, record.args = "bridge.request_unreadable", ()
        return True


_NO_PARSER_QUOTES = _NoParserQuotes()


class _Protocol(web.RequestHandler):
    """One connection. A request that cannot be parsed is answered like every other bad request, without quoting it.

    The headers of a request are limited in time and size. aiohttp limits only each header and their number.
    """

    __slots__ = ("_due", "_unfinished")

    _due: asyncio.TimerHandle | None
    """Closes the connection; None while no headers are expected."""
    _unfinished: int
    """Bytes of headers that are not complete yet."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Expect headers."""
        super().connection_made(transport)
        self._unfinished = 0
        self._due = self._loop.call_later(HEADER_TIMEOUT.total_seconds(), self.force_close)

    def data_received(self, data: bytes) -> None:
        """Parse *data*, and count it if it is a part of headers."""
        count, is_header = self._request_count, self.is_idle
        super().data_received(data)
        if self._request_count > count:
            self._expect_nothing()
        elif is_header and data:
            self._unfinished += len(data)
            if self._due is None:
                self._due = self._loop.call_later(HEADER_TIMEOUT.total_seconds(), self.force_close)
            if self._unfinished > MAX_HEADER_BYTES:
                # A NUL is allowed nowhere in headers. The parser refuses the request, and `handle_error` answers it.
                super().data_received(b"\0")

    def _expect_nothing(self) -> None:
        self._unfinished = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None

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
        response.headers["Server"] = _SERVER
        response.force_close()
        return response


class _Server(web.Server):
    """Accepts connections up to a limit.

    If the limit is reached, or the process has no descriptor left, idle connections are closed in favor of new ones.
    asyncio's own server would log each failed attempt to accept, many thousand times a second.
    """

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)

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
        return _Server(
            server.request_handler,
            request_factory=server.request_factory,
            handler_cancellation=server.handler_cancellation,
            **server._kwargs,  # noqa: SLF001 - aiohttp has no other way to choose the protocol's class
        )


def bind(host: str, port: int, *, reuse_port: bool = False) -> list[socket.socket]:
    """Listen on every address of *host*.

    Raises:
        OSError: The address cannot be used. The `strerror` of the error names address and reason.
    """
    sockets: list[socket.socket] = []
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            sockets.append(socket.create_server(address[:2], family=family, reuse_port=reuse_port))
    except OSError as error:
        for each in sockets:
            each.close()
        message = f"cannot listen on {host} port {port}: {error.strerror}"
        raise OSError(error.errno, message) from None
    return sockets


@asynccontextmanager
async def listening(
    app: web.Application, sockets: Sequence[socket.socket], *, max_connections: int = MAX_CONNECTIONS
) -> AsyncIterator[str]:
    """Serve *app* on *sockets* over at most *max_connections* connections, and yield the URL.

    At the end the service reports that it is not ready, accepts no new connections, finishes the running requests, and
    closes.
    """
    if HttpRequestParser is HttpRequestParserPy:
        _log.warning("bridge.slow_http_parser", extra={"bridge.hint": "aiohttp runs without its C parser"})
    logging.getLogger("aiohttp.server").addFilter(_NO_PARSER_QUOTES)
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
    accepting: list[asyncio.Task[None]] = []
    try:
        await runner.setup()
        server = runner.server
        assert isinstance(server, _Server)
        accepting = [asyncio.create_task(server.accept(each, limit=max_connections)) for each in sockets]
        host, port = sockets[0].getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        app[_STOPPING].set()
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
