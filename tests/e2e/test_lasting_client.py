"""Services and workers go on when the certificate or the API key of their connection to Temporal changes."""

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest
from aiohttp import ClientSession
from temporalio.client import Client
from temporalio.worker import Worker

import caller
import handler
from bridge.http.listener import bind, listening
from bridge.temporal.connection import connect
from bridge.temporal.lasting_client import lasting_client
from scripts.environment.server import Server
from tests.support.certificates import Authority
from tests.support.helpers import CALLER, HANDLER, Keys, assert_eventually, caller_settings, handler_settings
from tests.support.mounted import by_rename
from tests.support.targets import Ask, ProbeWorkflow, Reply
from tests.support.world import RUNNER


class TlsFront:
    """TLS in front of a Temporal server. It accepts certificates of one authority only."""

    def __init__(self, authority: Authority, upstream: str) -> None:
        self._authority = authority
        self._host, _, port = upstream.rpartition(":")
        self._upstream = int(port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen with a new certificate, on the same port as before."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["h2"])
        self._authority.ca.issue_cert("localhost").configure_cert(context)
        self._authority.ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Cut all connections."""
        assert self._server is not None
        self._server.close()
        for each in list(self._writers):
            each.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            up_reader, up_writer = await asyncio.open_connection(self._host, self._upstream)
            both = {writer, up_writer}
            self._writers |= both
            pumps = [asyncio.ensure_future(_pump(reader, up_writer)), asyncio.ensure_future(_pump(up_reader, writer))]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for each in pumps:
                each.cancel()
            for one in both:
                one.transport.abort()
            self._writers -= both


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def services() -> AsyncIterator[list[str]]:
    """The URLs of a receiver and a handler service that connect by themselves."""
    keys = Keys()
    module = ModuleType("served")
    module.probe = ProbeWorkflow  # type: ignore[attr-defined] # as a team's module has it
    apps = (
        caller.create_app(caller_settings(keys, receiver_url="http://127.0.0.1:1", endpoint_url="http://127.0.0.1:2")),
        handler.create_app(
            handler_settings(keys, receiver_url="http://127.0.0.1:1", service_url="http://127.0.0.1:2", sweep=False),
            module,
        ),
    )
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(listening(app, bind("127.0.0.1", 0))) for app in apps]


async def test_both_services_connect_anew_with_a_renewed_certificate(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards the old certificate is not valid any more, and the server's own one has changed too."""
    authority = Authority(tmp_path / "authority")
    front = TlsFront(authority, server.address)
    await front.start()
    files = authority.issue("orders.example")
    monkeypatch.setenv("TEMPORAL_ADDRESS", f"localhost:{front.port}")
    monkeypatch.setenv("TEMPORAL_NAMESPACE", CALLER)
    monkeypatch.setenv("TEMPORAL_TLS_SERVER_CA_CERT_PATH", str(authority.file))
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_CERT_PATH", files["certificate_file"])
    monkeypatch.setenv("TEMPORAL_TLS_CLIENT_KEY_PATH", files["key_file"])
    async with services() as urls, ClientSession() as session:

        async def statuses() -> set[int]:
            return {(await session.get(f"{url}/readyz")).status for url in urls}

        async def ready() -> None:
            assert await statuses() == {200}

        async def cut() -> None:
            assert await statuses() == {503}

        await ready()
        await front.stop()
        await assert_eventually(cut)
        authority.renew()
        await front.start()
        await assert_eventually(ready)
    await front.stop()


@pytest.fixture
def profile(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Profile":
    path = tmp_path / "temporal.toml"
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(path))
    monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)
    found = Profile(path, server.address)
    found.write("key-1")
    return found


class Profile:
    """Temporal's configuration file with an API key, which the test server ignores."""

    def __init__(self, path: Path, address: str) -> None:
        self._path = path
        self._address = address

    def write(self, api_key: str) -> None:
        place = f'address = "{self._address}"'
        tls = "[profile.default.tls]\ndisabled = true"
        by_rename(self._path, f'[profile.default]\n{place}\napi_key = "{api_key}"\n{tls}\n')

    def spoil(self) -> None:
        by_rename(self._path, "[profile")


async def test_a_new_client_replaces_the_old_one_and_calls_that_run_finish(
    profile: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad file in between keeps the old client. The namespace, which only the settings name, stays the same."""
    queue, clients = uuid.uuid4().hex, []
    url = "http://127.0.0.1:1"
    first = await connect(handler_settings(Keys(), receiver_url=url, service_url=url, namespace=HANDLER))

    def replaced(new: Client) -> None:
        clients.append(new)
        worker.client = new

    lasting = lasting_client(first, replaced=replaced)
    worker = Worker(first, task_queue=queue, workflows=[ProbeWorkflow], workflow_runner=RUNNER)
    async with worker:
        ask = Ask(key=queue, behaviour="wait")
        handle = await lasting.start_workflow(ProbeWorkflow.run, ask, id=queue, task_queue=queue)
        result = asyncio.create_task(handle.result())
        await asyncio.sleep(0)
        profile.spoil()
        assert lasting.api_key == "key-1"
        assert "bridge.files_not_taken" in caplog.text
        profile.write("key-2")

        async def seen() -> None:
            assert lasting.api_key == "key-2"

        await assert_eventually(seen)
        assert [(each.api_key, each.namespace) for each in clients] == [("key-2", HANDLER)]
        assert worker.client is clients[0]
        assert not result.done()
        await lasting.get_workflow_handle(queue).signal("say", "done")
        assert await result == Reply("done")
