"""The application that both services share: answers, errors, health and access log.

A route reads the request, calls one function and answers. Every answer passes one middleware. The middleware turns an
error into a Nexus Failure with its status. It signs an answer only if the answer depends on nothing but the verified
parts of the request.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler
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
from bridge.http.incoming_message import FACTS, LIVE, PROOF, Facts
from bridge.protocol.handler_error import encode_handler_error
from bridge.protocol.headers import LINK
from bridge.protocol.payload import MAX_BODY_BYTES
from bridge.runtime.event_log import event_logger
from bridge.security.redaction import plain

MAX_HEADER_BYTES = 16 * 1024
"""Largest request line and headers together."""
SERVER = "bridge"
"""Value of the header `Server` of every answer."""
_READY_CACHE_S = 1

_MAX_ANSWER_HEADERS = 2900
"""Most bytes in the headers of an answer before it is signed. With the signature and aiohttp's own headers they have at
most 3.5 KiB. If the headers do not fit a proxy's buffer (nginx: 4 KiB), the proxy replaces the answer with a 502."""

_log = event_logger(__name__)

_ServiceT = TypeVar("_ServiceT")

ReadyCheck = Callable[[], Awaitable[bool]]


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

    async def stop(_: web.Application) -> None:
        stopping.set()

    app = web.Application(middlewares=[_middleware], client_max_size=MAX_BODY_BYTES)
    app.on_response_prepare.append(_hide_versions)
    app.on_shutdown.append(stop)
    app.router.add_get(LIVE, alive, name="livez")
    app.router.add_get("/readyz", ready)
    return app


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
async def _middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
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
    while LINK in headers and sum(len(name) + len(value) + 4 for name, value in headers.items()) > _MAX_ANSWER_HEADERS:
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
    response.headers["Server"] = SERVER


_NAMED_FACTS = ("bridge.message", "bridge.operation", "bridge.caller", "bridge.peer", "bridge.target", "bridge.answer")
"""Facts that the sentence of an access line names, in this order."""


class AccessLogger(AbstractAccessLogger):
    """Logs one line per request: the route's template, never the path, because the path may hold a token."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        """Log one answered request, except for the health routes. *time* is in seconds."""
        facts: Facts = {}
        template = "unmatched"
        # A request that could not be parsed has no facts and no route.
        if isinstance(request, web.Request) and FACTS in request:
            facts = request[FACTS]
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
