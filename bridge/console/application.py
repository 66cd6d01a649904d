"""The console's application: login, pages, and the one verb.

Without a session every request is answered 401 with the login form, also an unknown path and a broken request. No page
contains a script, and every text of a peer passes `plain` and the template's escaping.
"""

import asyncio
import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from temporalio.service import RPCError

from bridge.admin.output import cell, facts_and_times
from bridge.console import Pages
from bridge.console.sessions import SESSION_LIFE, Session, Sessions
from bridge.errors import BridgeError, without_text
from bridge.http.application import SERVER
from bridge.http.listener import bind, listening
from bridge.http.peer_exchanges import PeerExchanges
from bridge.runtime.event_log import event_logger
from bridge.runtime.settings import ConsoleSettings, SettingsError
from bridge.security.redaction import plain
from bridge.temporal.rpc_status import is_missing, refusal

try:
    import jinja2
except ImportError:
    _MESSAGE = "console: jinja2 is not installed; pip install callback-bridge[console], or remove [console]"
    raise SettingsError(_MESSAGE) from None

_FOLDER = Path(__file__).parent
_TIMEOUT_S = 15
_MAX_FORM_BYTES = 8 * 1024
_MAX_CONNECTIONS = 32
_SESSION = web.RequestKey("session", Session)

_log = event_logger(__name__)


class Console:
    """The console of one service."""

    def __init__(
        self, settings: ConsoleSettings, pages: Pages, peers: PeerExchanges, *, clock: Callable[[], datetime]
    ) -> None:
        style = (_FOLDER / "console.css").read_text("utf-8")
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self._headers = {
            "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{digest}'; form-action 'self'; "
            "frame-ancestors 'none'; base-uri 'none'",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "Server": SERVER,
            "X-Content-Type-Options": "nosniff",
        }
        loader = jinja2.FileSystemLoader([_FOLDER, pages.template.parent])
        self._templates = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        self._templates.globals |= {"title": pages.title, "style": style, "peers": peers.all}
        self._templates.filters |= {
            "cell": lambda value: cell(value, clock(), unknown="-"),
            "facts_and_times": facts_and_times,
        }
        self._settings = settings
        self._pages = pages
        self._sessions = Sessions(settings.tokens, clock=clock)
        # Browsers do not separate cookies by port, and two consoles may be on one machine.
        self._cookie = f"bridge-console-{pages.title}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve the console on the listener of the settings."""
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_FORM_BYTES)
        app.router.add_get("/", self._show)
        app.router.add_post("/login", self._log_in)
        app.router.add_post("/logout", self._log_out)
        app.router.add_post("/redeliver", self._redeliver)
        sockets = bind(self._settings.host, self._settings.port, cure="; choose another console.host or console.port")
        async with listening(app, sockets, max_connections=_MAX_CONNECTIONS) as url:
            _log.info("bridge.console_listens", extra={"bridge.console": url})
            yield

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let only an open session pass, and only its own forms change something."""
        session = None
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                if (request.method, request.path) == ("POST", "/login"):
                    return await handler(request)
                session = self._sessions.find(request.cookies.get(self._cookie, ""))
                if session is None:
                    return self._render("login.html", 401, is_wrong=False)
                request[_SESSION] = session
                if request.method not in {"GET", "HEAD"}:
                    given = str((await request.post()).get("csrf", ""))
                    if not hmac.compare_digest(given.encode(errors="replace"), session.csrf.encode()):
                        return self._message(403, session, "this form is not from a page of your session")
                return await handler(request)
        except Exception as error:  # noqa: BLE001 - every error becomes a page
            if session is None:
                return self._render("login.html", 401, is_wrong=False)
            status, message = _problem(error, is_reading=request.method == "GET")
            return self._message(status, session, message)

    async def _log_in(self, request: web.Request) -> web.Response:
        session = self._sessions.open(str((await request.post()).get("token", "")))
        extra = {"bridge.remote": request.remote or ""}
        if session is None:
            _log.warning("bridge.console_login_refused", extra=extra)
            return self._render("login.html", 401, is_wrong=True)
        _log.info("bridge.console_login", extra={**extra, "bridge.operator": session.operator})
        response, life = self._lead_to_first_page(), int(SESSION_LIFE.total_seconds())
        is_far = request.url.host not in {"127.0.0.1", "::1", "localhost"}
        response.set_cookie(self._cookie, session.key, max_age=life, httponly=True, samesite="Strict", secure=is_far)
        return response

    async def _log_out(self, request: web.Request) -> web.Response:
        self._sessions.close(request[_SESSION])
        return self._lead_to_first_page()

    async def _show(self, request: web.Request) -> web.Response:
        values = await self._pages.read(request.query)
        return self._render(self._pages.template.name, 200, session=request[_SESSION], **values)

    async def _redeliver(self, request: web.Request) -> web.Response:
        if self._pages.redeliver is None:
            raise web.HTTPNotFound
        delivery_id, result = str((await request.post()).get("id", "")), "not answered"
        try:
            result = f"run {await self._pages.redeliver(delivery_id)}"
        except (BridgeError, RPCError) as error:
            _, result = _problem(error, is_reading=False)
            raise
        finally:
            facts = {"operator": request[_SESSION].operator, "delivery_id": plain(delivery_id), "result": result}
            _log.info("bridge.console_redelivered", extra={f"bridge.{name}": each for name, each in facts.items()})
        return self._lead_to_first_page()

    def _message(self, status: int, session: Session, message: str) -> web.Response:
        return self._render("base.html", status, session=session, message=message)

    def _render(self, template: str, status: int, **values: Any) -> web.Response:
        text = self._templates.get_template(template).render(values)
        return web.Response(status=status, text=text, content_type="text/html", headers=self._headers)

    def _lead_to_first_page(self) -> web.Response:
        # A relative URL also works behind a proxy's prefix.
        return web.Response(status=303, headers={**self._headers, "Location": "./"})


def _problem(error: Exception, *, is_reading: bool) -> tuple[int, str]:
    """The status of a page, and what it says of *error*: only texts that are made for people."""
    match error:
        case web.HTTPException():
            return error.status, error.reason
        case TimeoutError():
            return 504, "Temporal did not answer in time: narrow the list, or try again"
        case RPCError():
            return 404 if is_missing(error) else 502, refusal(error)
        case BridgeError():
            return 404 if is_reading else 409, str(error)
        case _:
            name = type(error).__name__
            _log.error("bridge.console_failed", extra={"bridge.error": name}, exc_info=without_text(error))
            return 500, "the page failed; the log names the error"
