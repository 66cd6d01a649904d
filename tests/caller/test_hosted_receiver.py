"""The receiver in the worker's process: workers share it, a restart after a kill works, a port in use is refused."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import ClientSession
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

from bridge.runtime.settings import SettingsError
from caller import CallerPlugin, CallerSettings
from scripts.environment.server import Server, free_ports
from tests.support.callers import CALLERS, CallingWorkflow, CallPlan
from tests.support.commands import process
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

BY_CALLBACK = CallPlan(first_lease=600, deadline=3600)
"""Longer than a test, so that no renewal gets the outcome."""


@pytest_asyncio.fixture(loop_scope="session")
async def apart(server: Server) -> AsyncIterator[World]:
    """A world in which the test starts the caller's worker and receiver."""

    def prepare(world: World) -> None:
        place = {"url": world.receiver.url, "port": world.receiver.port, "allow_insecure": True}
        world.caller_options = {"receiver": place}

    async with running_world(server, without=("caller", "receiver"), prepare=prepare) as made:
        yield made


def plugin(world: World) -> CallerPlugin:
    return CallerPlugin(world.caller_settings, serve_receiver=True)


def worker(world: World, shared: CallerPlugin, queue: str, client: Client | None = None) -> Worker:
    return Worker(client or world.caller_client, task_queue=queue, workflows=CALLERS, plugins=[shared])


async def call(world: World, queue: str, ask: Ask) -> Reply:
    result: Reply = await world.caller_client.execute_workflow(
        CallingWorkflow.run, args=[ask, BY_CALLBACK], id=f"calling-{ask.key}", task_queue=queue
    )
    return result


async def is_listening(world: World) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", world.receiver.port)
    except ConnectionRefusedError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_two_workers_of_one_process_share_one_receiver(apart: World) -> None:
    """The receiver serves until the last worker has stopped, and again when another worker starts."""
    world, shared = apart, plugin(apart)
    first, second = f"first-{world.id}", f"second-{world.id}"
    async with worker(world, shared, second):
        async with worker(world, shared, first):
            for queue in (first, second):
                assert await call(world, queue, Ask(key=world.key(queue), text=queue)) == Reply(queue)
        assert await call(world, second, Ask(key=world.key("after"), text="after")) == Reply("after")
    assert not await is_listening(world)
    async with worker(world, shared, first):
        assert await call(world, first, Ask(key=world.key("again"), text="again")) == Reply("again")
    assert not await is_listening(world)


async def test_the_receiver_uses_the_present_client_of_the_worker(
    apart: World, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The team replaces `worker.client` to change a certificate: the old client would not be accepted any more."""
    old, new = [await Client.connect(server.address, namespace=CALLER) for _ in range(2)]
    queue = f"replaced-{apart.id}"
    async with worker(apart, plugin(apart), queue, old) as running:

        async def listens() -> None:
            assert await is_listening(apart)

        await assert_eventually(listens)
        async with ClientSession() as session, session.get(f"{apart.receiver.url}/readyz") as answer:
            assert answer.status == 200
        running.client = new
        used: list[str] = []

        def refuse(*_: object, **__: object) -> None:
            used.append("the old client")
            raise RPCError("the certificate has expired", RPCStatusCode.UNAUTHENTICATED, b"")

        monkeypatch.setattr(old.workflow_service, "describe_namespace", refuse)
        for method in ("respond_activity_task_completed_by_id", "describe_workflow_execution"):
            monkeypatch.setattr(old.workflow_service, method, refuse)
        assert await call(apart, queue, Ask(key=apart.key(), text="present")) == Reply("present")
        async with ClientSession() as session, session.get(f"{apart.receiver.url}/readyz") as answer:
            assert answer.status == 200
        assert used == []


async def test_outcomes_are_accepted_until_the_activities_have_ended(apart: World) -> None:
    """A worker that stops closes the receiver last."""
    seen: list[bool] = []

    class Watching(CallerPlugin):
        async def before_close(self) -> None:
            await super().before_close()
            seen.append(await is_listening(apart))

    async with worker(apart, Watching(apart.caller_settings, serve_receiver=True), apart.order_queue):
        ask = Ask(key=apart.key(), text="done")
        assert await call(apart, apart.order_queue, ask) == Reply("done")
    assert seen == [True]
    assert not await is_listening(apart)


async def test_a_second_plugin_of_the_process_is_refused_the_port_with_the_cure(apart: World) -> None:
    """Creating the worker raises the error, because the SDK cannot report one of a worker that did not start."""
    async with worker(apart, plugin(apart), apart.order_queue):
        with pytest.raises(SettingsError) as raised:
            worker(apart, plugin(apart), f"other-{apart.id}")
    assert f"127.0.0.1 port {apart.receiver.port}" in str(raised.value)
    assert "serve_receiver=False" in str(raised.value)
    assert "BRIDGE_RECEIVER__PORT" in str(raised.value)


async def test_workers_of_two_namespaces_cannot_share_one_receiver(apart: World) -> None:
    """A receiver completes activities in one namespace."""
    shared = plugin(apart)
    async with worker(apart, shared, apart.order_queue):
        with pytest.raises(SettingsError, match=f"calls of namespace {CALLER}; give the workers of {HANDLER}"):
            worker(apart, shared, apart.order_queue, apart.handler_client)


def test_a_receiver_that_the_settings_do_not_have_is_refused(apart: World) -> None:
    """The plugin raises the error before any worker runs."""
    settings = CallerSettings.model_validate(
        apart.caller_settings.model_dump()
        | {"receiver": None, "callback_keys": None, "endpoints": {"payments": polled(apart)}}
    )
    with pytest.raises(SettingsError, match="no receiver in the settings: without one there is nothing to serve"):
        CallerPlugin(settings, serve_receiver=True)


def polled(world: World) -> dict[str, object]:
    return world.caller_settings.endpoints["payments"].model_dump() | {"transport": "poll"}


@pytest.fixture(name="config")
def settings_file(apart: World, tmp_path: Path) -> Path:
    """The caller's settings for a separate process."""

    def key_set(name: str) -> str:
        key = getattr(apart.keys, name).keys["k1"].get_secret_value()
        return f'{{ signing = "k1", keys = {{ k1 = "{key}" }} }}'

    path = tmp_path / "caller.toml"
    path.write_text(f"""\
name = "{CALLER}"
callback_keys = {key_set("callback")}
[receiver]
url = "{apart.receiver.url}"
port = {apart.receiver.port}
allow_insecure = true
[handlers.{HANDLER}]
start_keys = {key_set("start")}
completion_keys = {key_set("completion")}
[endpoints.payments]
url = "{apart.service.url}/c/{CALLER}"
handler = "{HANDLER}"
networks = ["127.0.0.0/8"]
allow_insecure = true
""")
    return path


def worker_process(
    world: World, config: Path
) -> contextlib.AbstractAsyncContextManager[tuple[asyncio.subprocess.Process, object]]:
    return process(
        *(sys.executable, "-m", "tests.support.calling_worker", world.order_queue, "--serve-receiver"),
        BRIDGE_CONFIG=str(config),
        TEMPORAL_ADDRESS=world.server.address,
        TEMPORAL_NAMESPACE=CALLER,
    )


@pytest.mark.timeout(300)
async def test_no_call_is_lost_when_worker_and_receiver_are_killed_and_started_again(
    apart: World, config: Path
) -> None:
    """SIGKILL hits while calls wait, and the targets end before the restart. The outcomes then come by callback."""
    asks = [Ask(key=apart.key(str(number)), behaviour="wait") for number in range(5)]
    async with worker_process(apart, config) as (killed, _):
        handles = [await apart.call(ask, BY_CALLBACK) for ask in asks]
        for ask in asks:
            await apart.until_started(ask)
        killed.kill()
        await killed.wait()
    assert not await is_listening(apart)
    for ask in asks:
        await apart.target(ask).signal("say", ask.key)
    # Keep the outage short: the longer it is, the longer the deliveries wait between two attempts.
    async with worker_process(apart, config):
        for ask, handle in zip(asks, handles, strict=True):
            assert await handle.result() == Reply(ask.key)


async def test_a_second_process_on_the_host_is_refused_the_port_with_the_cure(apart: World, config: Path) -> None:
    """The error names the port. With another port the process runs."""
    async with worker_process(apart, config):
        with pytest.raises(AssertionError) as raised:
            async with worker_process(apart, config):
                pass
        assert f"cannot listen on 127.0.0.1 port {apart.receiver.port}: " in str(raised.value)
        assert "serve_receiver=False" in str(raised.value)
        [port] = free_ports(1)
        config.write_text(config.read_text().replace(f"\nport = {apart.receiver.port}\n", f"\nport = {port}\n"))
        async with worker_process(apart, config) as (_, ready):
            assert ready == "ready"
