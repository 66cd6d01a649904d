"""What the console answers to people with and without rights, and to texts that want to be more than texts."""

import logging
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import CookieJar
from temporalio.service import RPCError, RPCStatusCode

import caller.reports.console
import handler.reports.console
from bridge.console import Pages, serving_console
from bridge.errors import BridgeError
from bridge.http.peer_exchanges import PeerExchanges
from bridge.runtime.settings import ConsoleSettings
from caller.reports.calls import CallReport
from handler.reports.deliveries import DeliveryDetails, DeliveryReport, DeliveryState
from handler.reports.runs import RunReport
from scripts.environment.stack import ROOT
from tests.support.browsing import TOKEN, Browser, browsing, console_settings

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOSTILE = '"><script>alert(1)</script>\x1b[2J\n\u202e&{{ 7*7 }} http://x/callbacks/1?sig=secret'
SHOWN = '"><script>alert(1)</script>\ufffd[2J \ufffd&{{ 7*7 }} …'


class Side:
    """A side whose answers a test chooses."""

    def __init__(self) -> None:
        self.template = "handler"
        self.values: dict[str, Any] = {}
        self.error: Exception | None = None
        self.redelivered: list[str] = []

    async def read(self, _: Mapping[str, str]) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.values

    async def redeliver(self, delivery_id: str) -> str:
        if self.error is not None:
            raise self.error
        self.redelivered.append(delivery_id)
        return "run-2"


@pytest.fixture
def side() -> Side:
    made = Side()
    made.values = overview(DeliveryReport, [])
    return made


@pytest_asyncio.fixture(loop_scope="session")
async def browser(side: Side, request: pytest.FixtureRequest) -> AsyncIterator[Browser]:
    module = getattr(request, "param", handler.reports.console)
    pages = Pages(
        title="payment-prod",
        template=Path(module.__file__ or "").with_suffix(".html"),
        read=side.read,
        redeliver=side.redeliver if module is handler.reports.console else None,
    )
    settings = ConsoleSettings.model_validate(console_settings())
    peers = PeerExchanges(["order-prod"], clock=lambda: NOW)
    peers.record("order-prod", 401, HOSTILE)
    async with (
        serving_console(settings, pages, peers, clock=lambda: NOW),
        browsing(settings.port) as made,
    ):
        yield made


def overview(kind: type[Any], reports: list[Any]) -> dict[str, Any]:
    """The values of a first page, as the side of *kind* returns them."""
    if kind is CallReport:
        return {
            "waiting": reports, "count": 1, "is_all": True, "query": HOSTILE, "endpoint": HOSTILE, "endpoints": [],
        }  # fmt: skip
    return {
        "deliveries": reports, "is_all": True, "state": HOSTILE, "states": {}, "caller": HOSTILE, "callers": [],
    }  # fmt: skip


REQUESTS = [
    ("GET", "/", {}),
    ("GET", "/?id=bridge-delivery-a", {}),
    ("HEAD", "/", {}),
    ("GET", "/no/such/page", {}),
    ("GET", "/login", {}),
    ("POST", "/redeliver", {"data": {"id": "bridge-delivery-a", "csrf": ""}}),
    ("POST", "/logout", {}),
    ("DELETE", "/", {}),
    ("POST", "/", {"data": b"x" * 20_000}),
    ("POST", "/login", {"data": {"token": ""}}),
    ("POST", "/login", {"data": b"token=\xff%ff", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
    ("POST", "/login", {"data": b"a", "headers": {"Content-Type": "application/x-www-form-urlencoded; charset=none"}}),
    ("POST", "/login", {"data": b"a", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}),
    ("POST", "/login", {"data": b"token=" + b"x" * 20_000}),
    ("GET", "/", {"headers": {"Cookie": 'bridge-console-payment-prod="\\377; ;;=\\"'}}),
    ("GET", "/", {"headers": {"Host": "[::"}}),
    ("GET", "/", {"headers": {"Authorization": f"Bearer {TOKEN}"}}),
]


@pytest.mark.parametrize(("method", "path", "options"), REQUESTS, ids=[f"{row[0]} {row[1]}" for row in REQUESTS])
async def test_without_a_session_every_request_gets_401_and_the_login_form(
    browser: Browser, side: Side, method: str, path: str, options: dict[str, Any]
) -> None:
    """The page shows no name, no count and no version, whether the path exists or not."""
    side.error = AssertionError("a reader was called")
    assert await browser.request(method, path, **options) == 401
    assert "payment-prod" not in browser.page
    if method != "HEAD":
        words = re.sub("The token was not accepted. After a wrong token, wait a second. ", "", browser.text)
        assert words == "Console Token Log in"
    assert browser.response.headers["Server"] == "bridge"
    assert not side.redelivered


async def test_the_answers_forbid_scripts_frames_and_copies(browser: Browser) -> None:
    """The one style is allowed by its hash."""
    for status in (401, 303, 200, 404):
        match status:
            case 303:
                assert await browser.log_in() == 303
            case _:
                assert await browser.request("GET", "/none" if status == 404 else "/") == status
        headers = browser.response.headers
        policy = headers["Content-Security-Policy"]
        assert re.fullmatch(
            r"default-src 'none'; style-src 'sha256-[\w+/=]{44}'; form-action 'self'; frame-ancestors 'none'; "
            r"base-uri 'none'",
            policy,
        )
        assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")
        assert not re.search(r"<script|style=|\bon\w+=|javascript:", browser.page)


@pytest.mark.parametrize(("host", "is_secure"), [("127.0.0.1", False), ("localhost", False), ("ops.example", True)])
async def test_the_cookie_is_kept_from_scripts_other_sites_and_plain_http(
    browser: Browser, host: str, is_secure: bool
) -> None:
    """Only on the loopback it may travel without TLS."""
    headers = {"Host": f"{host}:{browser.base.rpartition(':')[2]}"}
    assert await browser.request("POST", "/login", data={"token": TOKEN}, headers=headers) == 303
    _, *flags = browser.response.headers["Set-Cookie"].split("; ")
    expected = {"HttpOnly", "SameSite=Strict", "Path=/", "Max-Age=28800"} | ({"Secure"} if is_secure else set())
    assert set(flags) == expected


async def test_a_wrong_token_opens_nothing_and_is_logged(browser: Browser, caplog: pytest.LogCaptureFixture) -> None:
    """The log has no token. After the pause the right token opens the console."""
    assert await browser.log_in("wrong\x1b[2J") == 401
    assert await browser.request("GET", "/") == 401
    said = "a login to the console from 127.0.0.1 was refused: wrong token, or right after one"
    logged = [each.getMessage() for each in caplog.records if "console" in each.getMessage()]
    assert logged == [f"bridge.console_login_refused: {said}"]
    assert await browser.log_in() == 303
    assert await browser.open()


async def test_a_logout_ends_the_session(browser: Browser) -> None:
    """Also for a copy of the cookie."""
    await browser.log_in()
    await browser.open()
    cookies = {"bridge-console-payment-prod": browser.response.cookies.get("x", "") or _cookie(browser)}
    assert await browser.submit("logout", {"csrf": "another"}) == 403
    await browser.open()
    assert await browser.submit("logout") == 303
    assert await browser.request("GET", "/", cookies=cookies) == 401


def _cookie(browser: Browser) -> str:
    jar = browser._session.cookie_jar
    assert isinstance(jar, CookieJar)
    return next(each.value for each in jar)


async def test_only_a_form_of_the_own_session_redelivers(
    browser: Browser, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    """Every accepted press of the button is one line of the log, which names the operator."""
    caplog.set_level(logging.INFO)
    failed = DeliveryDetails(
        id="bridge-delivery-a", run_id="r", state=DeliveryState.FAILED, started=NOW, closed=NOW, attempts=None,
        last_error=HOSTILE, next_try=None,
    )  # fmt: skip
    side.values = {"run": None, "delivery": failed}
    await browser.log_in()
    await browser.open(id="bridge-delivery-a")
    for csrf in ("", "another", "\udcff".encode(errors="surrogatepass").decode(errors="replace")):
        await browser.open(id="bridge-delivery-a")
        assert await browser.submit("redeliver", {"csrf": csrf}) == 403
    assert await browser.request("GET", "/redeliver?id=bridge-delivery-a") == 405
    assert not side.redelivered
    await browser.open(id="bridge-delivery-a")
    assert await browser.submit("redeliver") == 303
    assert side.redelivered == ["bridge-delivery-a"]
    await browser.open(id="bridge-delivery-a")
    side.error = BridgeError("it is already delivered")
    assert await browser.submit("redeliver", {"id": HOSTILE}) == 409
    assert "it is already delivered" in browser.text
    lines = [each.getMessage() for each in caplog.records if "console_redelivered" in each.getMessage()]
    said = "bridge.console_redelivered: operator anna asked the console to run delivery"
    assert lines == [
        f"{said} bridge-delivery-a again: run run-2",
        f"{said} {SHOWN} again: it is already delivered",
    ]


@pytest.mark.parametrize("browser", [caller.reports.console], indirect=True)
async def test_the_callers_console_has_no_verb(browser: Browser, side: Side) -> None:
    """It is read-only, also for an operator."""
    side.values = overview(CallReport, [])
    await browser.log_in()
    await browser.open()
    [csrf] = set(re.findall(r'name="csrf" value="([^"]*)"', browser.page))
    assert await browser.request("POST", "/redeliver", data={"id": "x", "csrf": csrf}) == 404


CALL = CallReport(
    workflow_id=HOSTILE, run_id=HOSTILE, request_id=HOSTILE, state=HOSTILE, endpoint=HOSTILE, operation=HOSTILE,
    scheduled=NOW, target=HOSTILE, last_error=HOSTILE,
)  # fmt: skip
RUN = RunReport(workflow_id=HOSTILE, run_id=HOSTILE, state="status 99", started=NOW, closed=None, called_by=HOSTILE)
DELIVERY = DeliveryDetails(
    id=HOSTILE, run_id=HOSTILE, state=DeliveryState.of(99), started=NOW, closed=None, target_workflow_id=HOSTILE,
    target_run_id=HOSTILE, operation=HOSTILE, caller=HOSTILE, attempts=3, last_error=HOSTILE, next_try=NOW,
)  # fmt: skip


@pytest.mark.parametrize(
    ("browser", "values"),
    [
        pytest.param(caller.reports.console, overview(CallReport, [CALL]), id="waiting calls"),
        pytest.param(caller.reports.console, {"calls": [CALL]}, id="calls of a workflow"),
        pytest.param(handler.reports.console, overview(DeliveryReport, [DELIVERY]), id="deliveries"),
        pytest.param(handler.reports.console, {"run": None, "delivery": DELIVERY}, id="delivery"),
        pytest.param(handler.reports.console, {"run": RUN, "delivery": DELIVERY}, id="run and delivery"),
        pytest.param(handler.reports.console, {"run": RUN, "delivery": None}, id="run"),
    ],
    indirect=["browser"],
)
async def test_no_text_of_a_peer_becomes_markup(browser: Browser, side: Side, values: dict[str, Any]) -> None:
    """Nor a terminal escape, nor a change of the reading direction. A status of a newer server is shown as a number."""
    side.values = values
    await browser.log_in()
    text = await browser.open()
    assert SHOWN in text
    assert "<script" not in browser.page
    assert "49" not in text
    # A link holds the id that it leads to, percent-encoded. A field holds what the operator has typed.
    shown = re.sub(r'(value|href)="[^"]*"', "", browser.page)
    assert "sig=" not in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", shown)
    if RUN in values.values():
        assert "status 99" in text


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (RPCError("no such run", RPCStatusCode.NOT_FOUND, b""), 404, "Temporal answered NOT_FOUND: no such run"),
        (RPCError(HOSTILE, RPCStatusCode.UNAVAILABLE, b""), 502, f"Temporal answered UNAVAILABLE: {SHOWN}"),
        (TimeoutError(HOSTILE), 504, "Temporal did not answer in time"),
        (BridgeError("no delivery x"), 404, "no delivery x"),
        (KeyError(HOSTILE), 500, "the page failed; the log names the error"),
    ],
)
async def test_a_page_that_fails_says_why_in_words_made_for_people(
    browser: Browser, side: Side, error: Exception, status: int, says: str
) -> None:
    """The operator stays logged in."""
    side.error = error
    await browser.log_in()
    assert await browser.request("GET", "/") == status
    assert says in browser.text
    assert "alert(1)" not in browser.text or "UNAVAILABLE" in says
    side.error = None
    await browser.open()


async def test_a_page_can_be_used_by_keyboard_and_on_a_phone(browser: Browser, side: Side) -> None:
    """Every field has a label, every table has headings, and the page adapts its width and its colors."""
    side.values = overview(DeliveryReport, [DELIVERY])
    await browser.log_in()
    await browser.open()
    for field in re.findall(r"<(?:input|select)[^>]*>", browser.page):
        assert 'type="hidden"' in field or re.search(rf"<label[^>]*>[^<]+{re.escape(field)}", browser.page), field
    assert browser.page.count('scope="col"') == 7 + 4
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in browser.page
    for rule in ("color-scheme: light dark", "prefers-color-scheme: dark", "max-width: 44rem", ":focus-visible"):
        assert rule in browser.page


def test_without_a_console_jinja2_is_not_imported_and_with_one_a_sentence_says_what_to_install() -> None:
    """A service without the extra starts as before."""
    program = """
import asyncio, sys
import caller, handler
assert "jinja2" not in sys.modules and "cyclopts" not in sys.modules
sys.modules["jinja2"] = None
from bridge.console import Pages, serving_console
from bridge.runtime.settings import ConsoleSettings, SettingsError
async def main():
    async with serving_console(None, None, None, clock=None):
        pass
    try:
        async with serving_console(ConsoleSettings(tokens={"anna": "0" * 64}), None, None, clock=None):
            pass
    except SettingsError as error:
        print(error)
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (
        "console: jinja2 is not installed; pip install callback-bridge[console], or remove [console]"
    ), done.stderr
