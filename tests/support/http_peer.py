"""A server on the loopback for the HTTP client, with what it has received."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from bridge.http.client import HttpAnswer, HttpClient
from bridge.http.route import Route

LOOPBACK = (ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128"))


SECRET = "sig=secret.token"
SOON = timedelta(milliseconds=300)


class Peer:
    """A server that records its requests and their senders."""

    def __init__(self) -> None:
        self.port = 0
        self.lines: list[str] = []
        self.headers: list[list[tuple[str, str]]] = []
        self.bodies: list[bytes] = []
        self.connections: set[Any] = set()
        self.finished = asyncio.Event()

    def url(self, path: str = "/") -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.lines.append(f"{request.method} {request.raw_path}")
        self.headers.append(list(request.headers.items()))
        self.bodies.append(await request.read())
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername"))
        route = self.routes.get(request.path)
        return await route(request) if route else web.Response(body=b"answer", headers={"X-Answer": "yes"})

    @property
    def routes(self) -> dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]]:
        return {
            "/redirect": self._redirect,
            "/cookie": self._cookie,
            "/long": self._long,
            "/endless": self._endless,
            "/silent": self._silent,
            "/drip": self._drip,
            "/cut": self._cut,
            "/gzip": self._gzip,
            "/error": self._error,
        }

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        status = int(request.query.get("status", "307"))
        return web.Response(status=status, headers={"Location": self.url("/inside")}, body=b"go there")

    async def _cookie(self, _: web.Request) -> web.StreamResponse:
        return web.Response(headers={"Set-Cookie": "session=1; Path=/"})

    async def _long(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"x" * int(request.query["bytes"]))

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            self.finished.set()

    async def _silent(self, _: web.Request) -> web.StreamResponse:
        await self.finished.wait()
        return web.Response()

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while not self.finished.is_set():
            await response.write(b"x")
            await asyncio.sleep(0.02)  # the drip itself
        return response

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b"x")
        assert request.transport is not None
        request.transport.abort()
        return response

    async def _gzip(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=b"\x1f\x8b not gzip", headers={"Content-Encoding": "gzip"})

    async def _error(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "no"}, status=503, headers={"Retry-After": "7"})


@asynccontextmanager
async def raw_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """A server that speaks as it likes."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/?{SECRET}"


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\nbody")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


async def post(client: HttpClient, url: str, body: bytes = b"body", **options: Any) -> HttpAnswer:
    headers = options.pop("headers", CIMultiDict({"Nexus-Request-Id": "request-7"}))
    route = Route(networks=options.pop("networks", LOOPBACK), proxy=options.pop("proxy", None))
    defaults: dict[str, Any] = {"peer": "payments", "route": route, "max_answer_bytes": 16384}
    return await client.post(url, headers, body, **(defaults | options))
