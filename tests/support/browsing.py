"""A reader of the console without JavaScript: plain requests, a jar of cookies, and the text and forms of a page."""

import html
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import ClientResponse, ClientSession, CookieJar

from bridge.console.sessions import hash_token
from scripts.environment.server import free_ports

TOKEN = "a-token-that-only-tests-have"


def console_settings() -> dict[str, Any]:
    """The settings of a console on a free port, with one operator."""
    return {"port": free_ports(1)[0], "tokens": {"anna": hash_token(TOKEN)}}


class Browser:
    """One reader."""

    def __init__(self, session: ClientSession, base: str) -> None:
        self._session = session
        self.base = base
        self.response: ClientResponse
        """The last answer."""
        self.page = ""
        """Its body."""

    async def request(self, method: str, path: str, **options: Any) -> int:
        """Send one request, follow no redirect, and return the status."""
        async with self._session.request(
            method, f"{self.base}{path}", **{"allow_redirects": False, **options}
        ) as response:
            self.page, self.response = await response.text(), response
        return response.status

    async def open(self, path: str = "/", **query: str) -> str:
        """Open a page and return the words that a person reads."""
        assert await self.request("GET", path, params=query) == 200, self.text
        return self.text

    async def log_in(self, token: str = TOKEN) -> int:
        return await self.request("POST", "/login", data={"token": token})

    async def submit(self, action: str, changes: Mapping[str, str] | None = None) -> int:
        """Press the button of the form with this action, after *changes* of its fields."""
        [form] = re.findall(rf'<form method="post" action="{action}">(.*?)</form>', self.page, re.DOTALL)
        fields = re.findall(r'name="(\w+)" value="([^"]*)"', form)
        data = {name: html.unescape(value) for name, value in fields}
        return await self.request("POST", f"/{action}", data={**data, **(changes or {})})

    async def follow(self, label: str) -> str:
        """Follow the link with this text."""
        targets = dict.fromkeys(re.findall(rf'<a href="\./\?([^"]*)">{re.escape(label)}</a>', self.page))
        [target] = targets
        assert await self.request("GET", f"/?{html.unescape(target)}") == 200
        return self.text

    @property
    def text(self) -> str:
        """The page's words without its markup."""
        body = self.page.partition("<body>")[2]
        return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@asynccontextmanager
async def browsing(port: int) -> AsyncIterator[Browser]:
    async with ClientSession(cookie_jar=CookieJar(unsafe=True)) as session:
        yield Browser(session, f"http://127.0.0.1:{port}")
