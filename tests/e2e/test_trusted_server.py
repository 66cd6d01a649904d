"""Whose calls our handler service takes, if Temporal's own server sends them: they are not signed."""

import asyncio
import contextlib
import os
import re
import tomllib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from multidict import CIMultiDict
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowFailureError
from temporalio.worker import Worker
from yarl import URL

from bridge.security.keys import KeySet
from scripts.environment import temporal_cli
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.helpers import CALLER, key_set
from tests.support.native import NativeCaller
from tests.support.server_caller import (
    SERVER,
    call,
    cause_of,
    is_unknown,
    running_side,
    takes_calls_of_the_server,
    until_known_to_run,
)
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

PAGE = ROOT / "docs" / "interoperation.md"


@pytest.fixture(scope="session")
def server(own_server: Server) -> Server:
    """Its HTTP port is known, which the calls' completions use."""
    return own_server


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_side(server, auth="none") as made:
        yield made


@contextlib.asynccontextmanager
async def operators_proxy(authorization: str | None) -> AsyncIterator[tuple[str, Callable[[str], None]]]:
    """A proxy in front of a handler service: it adds the header. Yields its URL and a function that sets its target."""
    goal = ""

    async def forward(request: web.Request) -> web.Response:
        hop = {"host", "transfer-encoding", "content-length", "connection"}
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in hop)
        if authorization is not None:
            headers["Authorization"] = authorization
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.post(
                URL(goal + request.raw_path, encoded=True),
                headers=headers,
                data=await request.read(),
                skip_auto_headers=("Content-Type", "User-Agent"),
            ) as answer,
        ):
            kept = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in hop)
            return web.Response(status=answer.status, headers=kept, body=await answer.read() or None)

    def aim(url: str) -> None:
        nonlocal goal
        goal = url

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", aim
    finally:
        await runner.cleanup()


def bearer(keys: KeySet, key_id: str = "k1") -> str:
    return f"Bearer {keys.keys[key_id].get_secret_value()}"


async def assert_refused(world: World) -> None:
    """The server gets 401 and stops at once; the caller's workflow gets the error, and nothing was started."""
    ask = Ask(world.key())
    cause = await cause_of(await call(world, ask))
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.UNAUTHENTICATED
    assert world.service.statuses == [401]
    assert await is_unknown(world.target(ask))


async def test_a_bearer_secret_that_a_proxy_adds_lets_the_servers_calls_in(server: Server) -> None:
    """Start and cancel are accepted with every key of the key set, so that a new key can be rolled out."""
    keys = key_set()
    rolled = KeySet.model_validate({"signing": "new", "keys": {"new": key_set().keys["k1"], "k1": keys.keys["k1"]}})
    async with (
        operators_proxy(bearer(keys)) as (url, aim),
        running_side(server, url=url, auth="bearer", bearer_keys=rolled) as world,
    ):
        aim(world.service.url)
        ask = Ask(world.key(), "cleanup")
        handle = await call(world, ask)
        await until_known_to_run(handle)
        await handle.cancel()
        with pytest.raises(WorkflowFailureError):
            await handle.result()
        assert world.service.statuses == [201, 202]


@pytest.mark.parametrize("found", ["missing", "wrong", "basic"])
async def test_a_wrong_or_missing_bearer_secret_is_refused(server: Server, found: str) -> None:
    keys = key_set()
    sent = {"missing": None, "wrong": bearer(key_set()), "basic": bearer(keys).replace("Bearer", "Basic")}[found]
    async with (
        operators_proxy(sent) as (url, aim),
        running_side(server, url=url, auth="bearer", bearer_keys=keys) as world,
    ):
        aim(world.service.url)
        await assert_refused(world)


async def test_an_address_outside_the_callers_networks_is_refused(server: Server) -> None:
    async with running_side(server, auth="none", networks=["10.0.0.0/8"]) as world:
        await assert_refused(world)


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "Via"])
async def test_the_network_of_a_proxy_is_no_proof_for_a_forwarded_request(world: World, name: str) -> None:
    ask = Ask(world.key())
    headers = {"Nexus-Request-Id": ask.key, name: "for=10.0.0.1"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{world.service.url}/c/{SERVER}/ProbeService/probe", json={"key": ask.key}, headers=headers
        ) as answer,
    ):
        assert answer.status == 401
    assert await is_unknown(world.target(ask))


@pytest.mark.parametrize("adds", ["nothing", "its own start key", "another caller's secret"])
async def test_by_default_the_servers_unsigned_calls_are_refused(server: Server, adds: str) -> None:
    """A caller that must sign cannot use an Authorization header instead."""
    start_keys, completion_keys = key_set(), key_set()
    sent = {"nothing": None, "its own start key": bearer(start_keys), "another caller's secret": bearer(key_set())}[
        adds
    ]
    async with (
        operators_proxy(sent) as (url, aim),
        running_side(server, url=url, start_keys=start_keys, completion_keys=completion_keys) as world,
    ):
        aim(world.service.url)
        await assert_refused(world)


async def test_outcomes_of_the_servers_calls_go_to_the_servers_own_endpoint_only(world: World) -> None:
    """The allow list has the cluster's completion endpoint; another namespace or another host is refused."""
    async with aiohttp.ClientSession() as session:
        for callback in (
            f"{world.server.http}/namespaces/another/nexus/callback",
            f"{world.receiver.url}/callbacks/x",
            f"{world.server.http}/namespaces/{CALLER}/nexus/callback/../../../x",
        ):
            start = URL(f"{world.service.url}/c/{SERVER}/ProbeService/probe").with_query(callback=callback)
            ask = Ask(world.key())
            body = {"key": ask.key}
            async with session.post(start, json=body, headers={"Nexus-Request-Id": ask.key}) as answer:
                assert answer.status == 400
            assert await is_unknown(world.target(ask))


@pytest.mark.parametrize("auth", ["none", "bearer"])
async def test_the_documents_settings_and_command_let_the_server_call(server: Server, auth: str) -> None:
    """The document's text works unchanged, except for ports, keys and the endpoint's name."""
    keys = key_set()
    toml, command = blocks(PAGE, "toml")[["none", "bearer"].index(auth)], blocks(PAGE, "sh")[1]
    assert server.http is not None
    text = toml.replace("http://127.0.0.1:7243", server.http).replace("BEARER-KEY", keys.keys["k1"].get_secret_value())
    peer = tomllib.loads(text)["callers"][SERVER]
    peer["operations"] = ["ProbeService/*"]
    prepare = takes_calls_of_the_server(server, **peer)
    async with (
        operators_proxy(bearer(keys)) as (proxy, aim),
        running_world(server, without=("receiver", "caller"), prepare=prepare) as world,
    ):
        aim(world.service.url)
        url = proxy if auth == "bearer" else world.service.url
        process = await asyncio.create_subprocess_exec(
            str(server.program or await temporal_cli.find(temporal_cli.chosen())),
            *command.replace("payments-by-url", world.nexus_endpoint)
            .replace("http://127.0.0.1:8081", url)
            .removeprefix("temporal ")
            .split(),
            env={**os.environ, "TEMPORAL_ADDRESS": server.address},
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await process.wait() == 0
        async with Worker(world.caller_client, task_queue=world.order_queue, workflows=[NativeCaller]):
            assert await (await call(world, Ask(world.key(), text="documented"))).result() == Reply("documented")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
