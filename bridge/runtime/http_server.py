"""The parts that both services share as aiohttp servers: answers, limits, health, logs, and a graceful stop.

A route reads the request, calls one function and answers. Every answer passes one middleware. The middleware turns an
error into a Nexus Failure with its status, and signs an answer that depends on the verified request alone.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from aiohttp import ClientPayloadError, web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.typedefs import Middleware
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import (
    DestinationRefusedError,
    RemoteProtocolError,
    UntrustedError,
    bad_request,
    not_found,
    without_text,
)
from bridge.protocol.failure import MAX_FAILURE_BYTES
from bridge.protocol.handler_error import encode_handler_error
from bridge.protocol.headers import LINK
from bridge.security.redaction import redacted
from bridge.security.signatures import ABSOLUTE_FORM, RequestProof, Verified

BODY_TIMEOUT = timedelta(seconds=5)
SHUTDOWN_TIMEOUT = timedelta(seconds=10)
_LIVE = "/livez"
_SERVER = "bridge"

_MAX_HEADER_BYTES = 2900
"""Largest headers of an answer before it is signed. The signature and aiohttp's own headers bring them to 3.5 KiB at
most. If the headers do not fit a proxy's buffer (nginx: 4 KiB), the proxy replaces the answer with a 502."""

_log = logging.getLogger(__name__)

Facts = dict[str, str | int]
FACTS: web.RequestKey[Facts] = web.RequestKey("facts", dict)
"""Fields that a route adds to the access log: ids and labels, never a token or a URL."""
PROOF: web.RequestKey[RequestProof | None] = web.RequestKey("proof", RequestProof)
"""A route sets this while its answer depends on nothing but the signed parts of the request. An answer that a changed
copy of a valid request can cause must not be signed, because the signature would also be valid for the original
request."""

Route = Callable[[web.Request], Awaitable[web.StreamResponse]]
ReadyCheck = Callable[[], Awaitable[bool]]


_STOPPING: web.AppKey[asyncio.Event] = web.AppKey("stopping", asyncio.Event)
"""Set when the process stops: it is not ready any more."""


def create_app(check: ReadyCheck, *, has_method_errors: bool) -> web.Application:
    """An application with health routes and the error middleware.

    It may be mounted into another application. The service is ready while *check* returns true and the process is not
    stopping. *has_method_errors* decides whether a wrong method is answered with 405. The handler service answers 404,
    because server 1.29 retries a 405.
    """
    stopping = asyncio.Event()

    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def ready(_: web.Request) -> web.Response:
        if not stopping.is_set() and await check():
            return web.Response(text="ready\n")
        return web.Response(status=503, text="not ready\n")

    app = web.Application(middlewares=[_errors(has_method_errors=has_method_errors)], client_max_size=MAX_FAILURE_BYTES)
    app[_STOPPING] = stopping
    app.on_response_prepare.append(_hide_versions)
    app.on_shutdown.append(_stop)
    app.router.add_get(_LIVE, alive, name="livez")
    app.router.add_get("/readyz", ready)
    return app


async def _stop(app: web.Application) -> None:
    app[_STOPPING].set()


def path_below_mount(request: web.Request) -> str:
    """The request's raw path without the prefix under which our application is mounted.

    The path that a peer signs ends with the result.
    """
    mount = str(request.app.router["livez"].url_for()).removesuffix(_LIVE)
    return ABSOLUTE_FORM.sub("", request.raw_path).removeprefix(mount)


def answer(status: int, headers: dict[str, str], body: bytes) -> web.Response:
    """A response with exactly these headers. aiohttp's helpers add a charset, which would change a payload's type."""
    return web.Response(status=status, headers=headers, body=body or None)


async def read_body(request: web.Request, verified: Verified | None) -> bytes:
    """Read the whole body, within size and time, and compare it with the signed digest in *verified*.

    An error of this function is answered unsigned, because the body may differ from the signed one.

    Raises:
        nexusrpc.HandlerError: The body is too large or incomplete (400), or too slow (408, REQUEST_TIMEOUT).
        UntrustedError: The body is not the signed one.
    """
    request[PROOF] = None
    body = await _read(request)
    if verified is not None:
        verified.check_body(body)
        request[PROOF] = verified.proof
    return body


async def _read(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(BODY_TIMEOUT.total_seconds()):
            # The application that ours is mounted in has its own limit, and may have read the body already.
            own = request.clone(client_max_size=MAX_FAILURE_BYTES) if request.can_read_body else request
            return await own.read()
    except TimeoutError:
        message = "the body did not arrive in time"
        raise HandlerError(message, type=HandlerErrorType.REQUEST_TIMEOUT) from None
    except (ConnectionError, ClientPayloadError):
        # The sender is gone and does not read the answer. It is its fault, therefore the log must not show our error.
        message = "the body broke off"
        raise bad_request(message) from None
    except web.HTTPRequestEntityTooLarge:
        message = f"the body is over {MAX_FAILURE_BYTES} bytes"
        raise bad_request(message) from None


def refuse_unusable_headers(request: web.Request, verified: Verified | None) -> None:
    """Refuse headers that no message of the protocol has, and headers that can be read in two ways.

    In a signed request only the covered headers are checked. The verifier has refused repeated and non-ASCII ones.

    Raises:
        nexusrpc.HandlerError: BAD_REQUEST.
    """
    if "Content-Encoding" in (request.headers if verified is None else verified.headers):
        message = "Content-Encoding is not supported: send the body uncompressed"
        raise bad_request(message)
    if verified is not None:
        return
    lower = [name.lower() for name, _ in request.headers.items()]
    for name, value in request.headers.items():
        if not value.isascii():
            message = f"header {name.lower()} is not ASCII" if name.isascii() else "a header is not ASCII"
            raise bad_request(message)
    for name in set(lower):
        is_ours = name.startswith(("nexus-", "content-", "bridge-")) and name != "nexus-link"
        if is_ours and lower.count(name) > 1:
            message = f"header {name} is repeated"
            raise bad_request(message)


def _errors(*, has_method_errors: bool) -> Middleware:
    @web.middleware
    async def middleware(request: web.Request, handler: Route) -> web.StreamResponse:
        request[FACTS] = {}
        try:
            response = await handler(request)
            _finish(request, response)
        except Exception as error:  # noqa: BLE001 - a bug must become an answer, not a traceback
            response = _error_answer(request, error, has_method_errors=has_method_errors)
            _finish(request, response)
        return response

    return middleware


def _error_answer(request: web.Request, error: Exception, *, has_method_errors: bool) -> web.Response:
    more: dict[str, str] = {}
    match error:
        case HandlerError():
            shown, reason = error, error.message
        case UntrustedError():
            # The operator sees in the log which check failed. The answer does not show it to the peer.
            shown, reason = HandlerError(str(error), type=HandlerErrorType.UNAUTHENTICATED), error.reason
        case RemoteProtocolError() | DestinationRefusedError():
            shown, reason = bad_request(str(error)), str(error)
        case web.HTTPMethodNotAllowed() if has_method_errors:
            shown, reason = bad_request("POST is the only method here"), request.method
            more = {"Allow": ", ".join(sorted(error.allowed_methods))}
        case web.HTTPMethodNotAllowed() | web.HTTPNotFound():
            shown, reason = not_found("no such route"), error.reason
        case web.HTTPException():
            shown, reason = bad_request(error.reason), error.reason
        case _:
            shown, reason = HandlerError("internal error", type=HandlerErrorType.INTERNAL), type(error).__name__
            _log.error("bridge.internal_error", extra={"bridge.error": reason}, exc_info=without_text(error))
    request[FACTS]["bridge.refused"] = redacted(reason, 300)
    status, headers, body = encode_handler_error(shown)
    return answer(405 if more else status, headers | more, body)


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
        if template.endswith((_LIVE, "/readyz")):
            return
        self.logger.info(
            "bridge.http_request",
            extra={
                "bridge.route": template,
                "bridge.status": response.status,
                "bridge.ms": round(time * 1000, 1),
                **facts,
            },
        )


class _NoParserQuotes(logging.Filter):
    """Removes what aiohttp's parser quotes: it logs the malformed line, which may hold a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "aiohttp.server":
            record.exc_info = None
            record.msg, record.args = "bridge.request_unreadable", ()
        return True


_NO_PARSER_QUOTES = _NoParserQuotes()


class _Protocol(web.RequestHandler):
    """One connection. A request that cannot be parsed is answered like every other bad request, without quoting it."""

    __slots__ = ()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, message)
        error = bad_request(
            "the request is not HTTP as the protocol has it: malformed, or a line or header is too long"
        )
        if status >= 500:
            error = HandlerError("internal error", type=HandlerErrorType.INTERNAL)
        response = answer(*encode_handler_error(error))
        response.headers["Server"] = _SERVER
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class ServiceRunner(web.AppRunner):
    """Serves an application over connections that answer a malformed request in the form of the protocol."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001 - aiohttp has no other way to choose the protocol's class
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
async def listening(app: web.Application, sockets: Sequence[socket.socket]) -> AsyncIterator[str]:
    """Serve *app* on *sockets*, and yield the URL.

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
        max_field_size=16380,
        shutdown_timeout=SHUTDOWN_TIMEOUT.total_seconds(),
        # If the sender disconnects, a completion must not be interrupted.
        handler_cancellation=False,
    )
    try:
        await runner.setup()
        for each in sockets:
            await web.SockSite(runner, each).start()
        host, port = sockets[0].getsockname()[:2]
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        app[_STOPPING].set()
        await runner.cleanup()
        for each in sockets:
            each.close()


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    return stop
