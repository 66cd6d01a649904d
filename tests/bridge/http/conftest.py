"""An HTTP client with a server to which it may connect, and settings that are not this machine's."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
import pytest_asyncio
from aiohttp import web

from bridge.http.client import HttpClient
from tests.support.http_peer import Peer


@pytest_asyncio.fixture(loop_scope="session")
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", peer.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    peer.port = runner.addresses[0][1]
    yield peer
    peer.finished.set()
    await runner.cleanup()


@pytest_asyncio.fixture(loop_scope="session")
async def client() -> AsyncIterator[HttpClient]:
    async with aclosing(HttpClient()) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRIDGE_CONFIG", "BRIDGE_NAME"):
        monkeypatch.delenv(name, raising=False)
