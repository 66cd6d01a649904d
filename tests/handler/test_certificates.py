"""A client certificate as the proof, or as a second one: it counts only if our own proxy reports it."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from multidict import CIMultiDict
from yarl import URL

from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server
from tests.support.helpers import CALLER
from tests.support.peer import send, start
from tests.support.world import World, running_world

SAN = "spiffe://orders.example/worker"
PROXY, STRANGER = "127.0.0.1", "127.0.0.2"
UNSIGNED = {"start_keys": None, "completion_keys": None, "auth": "certificate"}


def behind_a_proxy(world: World, peer: dict[str, Any]) -> None:
    world.peer_options = {**peer, "san": SAN}
    service = {"url": world.service.url, "allow_insecure": True}
    world.handler_options = {"service": {**service, "certificate_header": "X-Client-San", "proxies": [f"{PROXY}/32"]}}


@pytest_asyncio.fixture(
    loop_scope="session", scope="module", params=[UNSIGNED, {}], ids=["certificate", "and signature"]
)
async def quiet(server: Server, request: Any) -> AsyncIterator[World]:
    async with running_world(
        server,
        without=("caller", "handler", "receiver"),
        prepare=lambda world: behind_a_proxy(world, request.param),
    ) as world:
        yield world


async def status(world: World, sender: str, *sans: str) -> int:
    """Send a start from the address *sender* with one header line for each of *sans*; sign it if the caller signs."""
    message = start(world, {"key": world.key()})
    if world.handler_settings.callers[CALLER].start_keys is not None:
        MessageSigner(world.keys.start).sign(message.kind, message.url, message.headers, message.body)
    headers = CIMultiDict([*message.headers.items(), *(("X-Client-San", san) for san in sans)])
    connector = aiohttp.TCPConnector(local_addr=(sender, 0))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post(URL(message.url, encoded=True), headers=headers, data=message.body) as response,
    ):
        return response.status


async def test_the_certificate_of_the_caller_is_a_proof(quiet: World) -> None:
    """As the proxy reports it."""
    assert await status(quiet, PROXY, SAN) == 201


@pytest.mark.parametrize(
    ("sender", "sans"),
    [
        pytest.param(STRANGER, [SAN], id="forged by a stranger"),
        pytest.param(STRANGER, [], id="a stranger without it"),
        pytest.param(PROXY, [], id="no certificate"),
        pytest.param(PROXY, [SAN + ".evil"], id="another certificate"),
        pytest.param(PROXY, [SAN.upper()], id="another spelling"),
        pytest.param(PROXY, [SAN, SAN], id="two of them: the client sent one"),
        pytest.param(PROXY, [f"{SAN},{SAN}"], id="two in one line"),
        pytest.param(PROXY, [""], id="empty"),
    ],
)
async def test_anything_else_is_a_401(quiet: World, sender: str, sans: list[str]) -> None:
    """A header in a request from elsewhere is a forgery, also if the request is signed."""
    assert await status(quiet, sender, *sans) == 401


async def test_a_certificate_does_not_replace_the_signature(server: Server) -> None:
    """If the settings demand both, both are checked."""
    async with running_world(
        server, without=("caller", "handler", "receiver"), prepare=lambda world: behind_a_proxy(world, {})
    ) as world:
        signers = (None, MessageSigner(world.keys.completion), MessageSigner(world.keys.start))
        statuses = []
        for signer in signers:
            message = start(world, {"key": world.key()})
            message.after_signing.append(lambda each: each.headers.add("X-Client-San", SAN))
            statuses.append((await send(message, signer)).status)
        assert statuses == [401, 401, 201]
