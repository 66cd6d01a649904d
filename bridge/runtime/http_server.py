"""What both services share as aiohttp servers: answers, limits, health, logs, and a graceful stop.

A route reads, calls, answers. Every answer leaves through one middleware: an error as a Nexus Failure with its status,
and any answer signed where the verified request alone has decided it.
"""

import asyncio
import json
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any

from aiohttp import ClientPayloadError, web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_parser import HttpRequestParser, HttpRequestParserPy
from aiohttp.typedefs import Middleware
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import DestinationRefusedError, RemoteProtocolError, UntrustedError, bad_request, not_found
from bridge.protocol.failure import MAX_FAILURE_BYTES
from bridge.protocol.headers import LINK, encode_handler_error
from bridge.protocol.payload import CONTENT_TYPE, JSON
from bridge.security.signatures import RequestProof, Verified

MAX_BODY_BYTES = MAX_FAILURE_BYTES
BODY_TIMEOUT = timedelta(seconds=5)
SHUTDOWN_TIMEOUT = timedelta(seconds=10)
_SERVER = "bridge"

_MAX_HEADER_BYTES = 2900
"""Of an answer, before it is signed: with the signature and what aiohttp adds it stays under 3.5 KiB. Where the headers
of an answer do not fit a proxy's buffer (nginx: 4 KiB), every answer becomes a 502."""

_log = logging.getLogger(__name__)

Facts = dict[str, str | int]
FACTS: web.RequestKey[Facts] = web.RequestKey("facts", dict)
"""What a route learned about its request, for the access log: ids and labels, never a token or a URL."""
PROOF: web.RequestKey[RequestProof | None] = web.RequestKey("proof", RequestProof)
"""Set by a route while its answer is decided by nothing but what the request's signature covers. An answer that can be
provoked with a spoilt copy of a good request must not be signed, because its signature would hold for the true request
as well."""

Route = Callable[[web.Request], Awaitable[web.StreamResponse]]
ReadyCheck = Callable[[], Awaitable[bool]]


class Readiness:
    """Whether this process wants traffic: not before its checks pass, not once it is stopping."""

    def __init__(self, check: ReadyCheck) -> None:
        self._check = check
        self._is_stopping = False

    def stop(self) -> None:
        self._is_stopping = True

    async def is_ready(self) -> bool:
        return not self._is_stopping and await self._check()


def create_app(readiness: Readiness, *, description: Mapping[str, Any], has_method_errors: bool) -> web.Application:
    """An application with health routes, its OpenAPI *description*, and the error middleware.

    *has_method_errors* tells whether a wrong method is answered with 405; a start must get 404, because server 1.29
    retries a 405.
    """

    async def alive(_: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def ready(_: web.Request) -> web.Response:
        if await readiness.is_ready():
            return web.Response(text="ready\n")
        return web.Response(status=503, text="not ready\n")

    async def describe(_: web.Request) -> web.Response:
        return answer(200, {CONTENT_TYPE: JSON}, document)

    document = json.dumps(description).encode()
    app = web.Application(middlewares=[_errors(has_method_errors=has_method_errors)], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_hide_versions)
    app.router.add_get("/livez", alive)
    app.router.add_get("/readyz", ready)
    app.router.add_get("/openapi.json", describe)
    return app


def answer(status: int, headers: dict[str, str], body: bytes) -> web.Response:
    """A response with exactly these headers: aiohttp's helpers would add a charset, which spoils a payload."""
    return web.Response(status=status, headers=headers, body=body or None)


async def read_body(request: web.Request, verified: Verified | None) -> bytes:
    """Read the whole body, within size and time, and compare it with the digest that *verified* has signed.

    An answer is not signed while the body is read, because another body may have been sent in place of the signed one.

    Raises:
        nexusrpc.HandlerError: Too large or broken off (400), too slow (408 as UNAVAILABLE's sibling REQUEST_TIMEOUT).
        UntrustedError: It is not the body that was signed.
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
            return await request.read()
    except TimeoutError:
        message = "the body did not arrive in time"
        raise HandlerError(message, type=HandlerErrorType.REQUEST_TIMEOUT) from None
    except (ConnectionError, ClientPayloadError):
        # Nobody is left to read the answer; but it is no fault of ours, and not to be logged as one.
        message = "the body broke off"
        raise bad_request(message) from None
    except web.HTTPRequestEntityTooLarge:
        message = f"the body is over {MAX_BODY_BYTES} bytes"
        raise bad_request(message) from None


def refuse_unusable_headers(request: web.Request, verified: Verified | None) -> None:
    """Refuse what no message of the protocol has, and what could be read in two ways.

    Of a signed request only the covered headers are looked at. Its verifier has refused repeated and non-ASCII ones.

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
        except Exception as error:  # noqa: BLE001 - the outermost door: a bug must become an answer, not a traceback
            response = _error_answer(request, error, has_method_errors=has_method_errors)
            _finish(request, response)
        return response

    return middleware


def _error_answer(request: web.Request, error: Exception, *, has_method_errors: bool) -> web.Response:
    match error:
        case HandlerError():
            return answer(*encode_handler_error(error))
        case UntrustedError():
            # The peer learns nothing; the operator learns which check it was.
            request[FACTS]["bridge.untrusted"] = error.reason
            unauthenticated = HandlerError("not authenticated", type=HandlerErrorType.UNAUTHENTICATED)
            return answer(*encode_handler_error(unauthenticated))
        case RemoteProtocolError() | DestinationRefusedError():
            return answer(*encode_handler_error(bad_request(str(error))))
        case web.HTTPMethodNotAllowed() if has_method_errors:
            _, headers, body = encode_handler_error(bad_request("POST is the only method here"))
            return answer(405, headers | {"Allow": ", ".join(sorted(error.allowed_methods))}, body)
        case web.HTTPMethodNotAllowed() | web.HTTPNotFound():
            return answer(*encode_handler_error(not_found("no such route")))
        case web.HTTPException():
            return answer(*encode_handler_error(bad_request(error.reason)))
        case _:
            _log.error("bridge.internal_error", extra={"bridge.error": type(error).__name__}, exc_info=_bare(error))
            return answer(*encode_handler_error(HandlerError("internal error", type=HandlerErrorType.INTERNAL)))


def _finish(request: web.Request, response: web.StreamResponse) -> None:
    """Leave out the links that do not fit, and sign where the verified request has decided the answer."""
    headers = response.headers
    while LINK in headers and sum(len(name) + len(value) + 4 for name, value in headers.items()) > _MAX_HEADER_BYTES:
        # A comma inside a link is percent-encoded. A link is never essential.
        if kept := headers[LINK].rpartition(", ")[0]:
            headers[LINK] = kept
        else:
            del headers[LINK]
    if (proof := request.get(PROOF)) is not None and isinstance(response, web.Response):
        body = response.body or b""
        assert isinstance(body, bytes)
        proof.sign_answer(response.status, headers, body)


def _bare(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """Where it happened, without the text: it may quote a message."""
    kind = type(error)
    return kind, Exception("(text withheld)"), error.__traceback__


async def _hide_versions(_: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = _SERVER


class AccessLogger(AbstractAccessLogger):
    """One line per request: the route's template, never the path, which may hold a token."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        facts: Facts = {}
        template = "unmatched"
        if isinstance(request, web.Request):
            facts = request.get(FACTS, {})
            resource = request.match_info.route.resource
            template = resource.canonical if resource is not None else template
        if template in {"/livez", "/readyz"}:
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
    """aiohttp's parser logs the offending line itself, which may hold a token."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "aiohttp.server":
            record.exc_info = None
            record.msg, record.args = "bridge.request_unreadable", ()
        return True


class _Protocol(web.RequestHandler):
    """One connection. What cannot be parsed is answered as every other bad request, and not quoted."""

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
    """Serves an application over connections whose errors, too, have the form of the protocol."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001 - aiohttp has no other way to choose the protocol's class
        )


async def serve(
    app: web.Application,
    readiness: Readiness,
    *,
    host: str,
    port: int,
    reuse_port: bool,
    on_listening: Callable[[str], None],
    stop: asyncio.Event,
) -> None:
    """Serve *app* until *stop* is set, then drain: not ready, no new connections, finish what runs, close.

    *on_listening* is told the URL, with the real port where *port* is 0.
    """
    if HttpRequestParser is HttpRequestParserPy:
        _log.warning("bridge.slow_http_parser", extra={"bridge.hint": "aiohttp runs without its C parser"})
    if asyncio.get_running_loop().get_debug():
        message = "refusing to serve with asyncio debug on: error pages would carry tracebacks"
        raise RuntimeError(message)
    logging.getLogger("aiohttp.server").addFilter(_NoParserQuotes())
    runner = ServiceRunner(
        app,
        access_log_class=AccessLogger,
        access_log=logging.getLogger("bridge.access"),
        auto_decompress=False,
        keepalive_timeout=30,
        lingering_time=2,
        # A 4 KiB operation token fits the path, 8 KiB of callback headers their lines.
        max_line_size=8190,
        max_field_size=16380,
        shutdown_timeout=SHUTDOWN_TIMEOUT.total_seconds(),
        # A sender that hangs up must not cut a completion in half.
        handler_cancellation=False,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, reuse_port=reuse_port or None)
        await site.start()
        bound = runner.addresses[0]
        shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        on_listening(f"http://{shown}:{bound[1]}")
        await stop.wait()
        readiness.stop()
        await site.stop()
    finally:
        readiness.stop()
        await runner.cleanup()


def stop_on_signals() -> asyncio.Event:
    """An event that SIGINT and SIGTERM set."""
    stop = asyncio.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    return stop
