"""The services' listener on real sockets: what a stranger can use up, and what honest callers get meanwhile."""

import asyncio
import json
import logging
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import ClientError, ClientSession, web

from bridge.http import application, listener
from bridge.http.application import create_app
from bridge.http.listener import bind, listening
from tests.support.helpers import assert_eventually

SOON = timedelta(milliseconds=300)
HEAD = b"GET /livez HTTP/1.1\r\nHost: h\r\n"


class Service:
    """A service on a free port, with a route that answers when `released` is set."""

    def __init__(self) -> None:
        self.checks = 0
        self.held = 0
        self.released = asyncio.Event()
        self.app = create_app(self._check)
        self.app.router.add_get("/hold", self._hold)
        self.app.router.add_get("/port", self._port)
        self.app.router.add_get("/large", self._large)
        self.url = ""
        self.writers: list[asyncio.StreamWriter] = []

    async def _check(self) -> bool:
        self.checks += 1
        return True

    async def _large(self, _: web.Request) -> web.Response:
        self.held += 1
        return web.Response(body=b"x" * 16_000_000)

    async def _port(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        return web.Response(text=str(request.transport.get_extra_info("peername")[1]))

    async def _hold(self, _: web.Request) -> web.Response:
        self.held += 1
        await self.released.wait()
        return web.Response()

    async def connect(self, sent: bytes = b"") -> asyncio.StreamReader:
        """A connection that has sent *sent*. It is closed at the end of the test."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
        self.writers.append(writer)
        writer.write(sent)
        return reader


@asynccontextmanager
async def serving(*, max_connections: int = 512) -> AsyncIterator[Service]:
    service = Service()
    async with listening(service.app, bind("127.0.0.1", 0), max_connections=max_connections) as service.url:
        try:
            yield service
        finally:
            service.released.set()
            for writer in service.writers:
                writer.transport.abort()


async def get(service: Service, path: str = "/livez") -> int:
    async with ClientSession() as session, session.get(service.url + path) as response:
        return response.status


async def port_of(session: ClientSession, service: Service) -> int:
    """Our port of the connection that a request of *session* uses."""
    async with session.get(f"{service.url}/port") as response:
        return int(await response.text())


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Everything that arrives before the service closes the connection."""
    try:
        return await asyncio.wait_for(reader.read(), 20)
    except ConnectionError:
        return b""


async def test_idle_connections_are_closed_in_favor_of_new_ones(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of strangers first: a connection that has carried a request is kept."""
    monkeypatch.setattr(listener, "HEADER_TIMEOUT", timedelta(hours=1))
    async with serving(max_connections=4) as service, ClientSession() as honest:
        assert await port_of(honest, service) == (port := await port_of(honest, service))
        strangers = [await service.connect(HEAD if number % 2 else b"") for number in range(20)]
        for _ in range(3):
            assert await get(service) == 200
        assert [await ended(each) for each in strangers[:16]] == [b""] * 16
        assert await port_of(honest, service) == port
    assert "bridge.connections_exhausted" not in caplog.text


async def test_a_connection_over_the_limit_is_closed_while_all_others_work(caplog: pytest.LogCaptureFixture) -> None:
    """Requests in progress end as if nothing had happened; one line a second says what is the matter."""
    async with serving(max_connections=2) as service:
        working = [asyncio.create_task(get(service, "/hold")) for _ in range(2)]

        async def arrived() -> None:
            assert service.held == 2

        await assert_eventually(arrived)
        assert [await ended(await service.connect(HEAD + b"\r\n")) for _ in range(20)] == [b""] * 20
        service.released.set()
        assert await asyncio.gather(*working) == [200, 200]
        assert await get(service) == 200
    lines = [each for each in caplog.records if each.getMessage().startswith("bridge.connections_exhausted")]
    assert 1 <= len(lines) < 20


EXHAUSTED = """
import asyncio, json, logging, resource, sys
from bridge.http.application import create_app
from bridge.http.listener import bind, listening

async def check():
    return True

async def main():
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    async with listening(create_app(check), bind("127.0.0.1", 0), max_connections=512) as url:
        print(url, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

logging.basicConfig(format="%(message)s")
asyncio.run(main())
"""


@asynccontextmanager
async def flooded(program: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, Service]]:
    """A process that serves, and a stranger who holds more connections than the process has descriptors."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    service = Service()
    service.url = (await process.stdout.readline()).decode().strip()
    try:
        for _ in range(80):
            await service.connect()
        yield process, service
    finally:
        for writer in service.writers:
            writer.transport.abort()
        process.stdin.close()
        await process.wait()


async def test_a_process_without_descriptors_serves_honest_callers_and_logs_once_a_second() -> None:
    """Honest callers connect while a stranger holds all descriptors."""
    began = asyncio.get_running_loop().time()
    async with flooded(EXHAUSTED) as (process, service):
        assert [await asyncio.wait_for(get(service), 20) for _ in range(5)] == [200] * 5
    seconds = asyncio.get_running_loop().time() - began
    assert process.stderr is not None
    lines = (await process.stderr.read()).decode().splitlines()
    assert lines
    assert {each.partition(": ")[0] for each in lines} == {"bridge.connections_exhausted"}
    assert len(lines) <= seconds + 1


async def test_headers_must_be_complete_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time does not begin anew with every byte. A kept connection that waits for its next request may be idle."""
    monkeypatch.setattr(listener, "HEADER_TIMEOUT", SOON)
    async with serving() as service, ClientSession() as honest:
        port = await port_of(honest, service)
        silent = await service.connect()
        reader = await service.connect(HEAD + b"\r\n" + HEAD)
        assert b"200" in await reader.readuntil(b"alive\n")
        writer = service.writers[-1]

        async def drip() -> None:
            while True:
                writer.write(b"X-Drip: 1\r\n")
                await asyncio.sleep(0.05)  # the drip itself

        dripping = asyncio.create_task(drip())
        assert await ended(silent) == b""
        assert await ended(reader) == b""
        dripping.cancel()
        assert await port_of(honest, service) == port


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_answers_must_be_read_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who asks and never reads holds neither a place nor a descriptor."""
    monkeypatch.setattr(listener, "ANSWER_TIMEOUT", SOON)
    async with serving(max_connections=2) as service:
        before = descriptors()
        strangers = []
        for _ in range(2):
            stranger = socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2])))
            stranger.sendall(HEAD.replace(b"/livez", b"/large") + b"\r\n")
            strangers.append(stranger)

        async def arrived() -> None:
            assert service.held == len(strangers)

        async def served() -> None:
            try:
                status = await get(service)
            except ClientError:
                status = 0
            assert status == 200, "all places are taken"
            assert descriptors() <= before + len(strangers)

        await assert_eventually(arrived)
        await assert_eventually(served)
        for stranger in strangers:
            stranger.close()


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "unfinished"])
async def test_headers_over_the_limit_are_refused_in_the_documented_form(*, is_complete: bool) -> None:
    """Each line is short, and the lines are fewer than the parser's maximum. The limit is that of their sum."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(17))
    async with serving() as service:
        reader = await service.connect(HEAD + lines[: len(lines) // 2])
        await asyncio.sleep(0)
        service.writers[-1].write(lines[len(lines) // 2 :] + (b"\r\n" if is_complete else b""))
        if is_complete:
            head = await reader.readuntil(b"\r\n\r\n")
            text = await reader.readuntil(b"}}")
        else:
            head, _, text = (await ended(reader)).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert json.loads(text)["metadata"]["type"] == "nexus.HandlerError"


async def test_headers_below_the_limit_are_taken_however_they_are_cut() -> None:
    """Requests over one connection are counted one by one, and bodies are not headers."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"x" * 1000) for number in range(15))
    request = b"GET /livez HTTP/1.1\r\nHost: h\r\nContent-Length: 60000\r\n" + lines + b"\r\n" + b"x" * 60_000
    async with serving() as service:
        reader = await service.connect()
        for _ in range(3):
            for start in range(0, len(request), 3000):
                service.writers[-1].write(request[start : start + 3000])
                await service.writers[-1].drain()
            assert b" 200 " in await reader.readuntil(b"alive\n")


async def test_readiness_is_checked_once_a_second_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check is a call to Temporal, and no proof is needed to ask."""
    async with serving() as service:
        monkeypatch.setattr(application, "_READY_CACHE_S", 3600)
        assert set(await asyncio.gather(*(get(service, "/readyz") for _ in range(30)))) == {200}
        assert service.checks == 1
        monkeypatch.setattr(application, "_READY_CACHE_S", 0)
        assert await get(service, "/readyz") == 200
        assert service.checks == 2


LIMITS = """
import resource
from bridge.http.listener import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {}))
print(raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised"),
    [(256, 1024, 512, 1024), (256, 256, 128, 256), (100, 20_000, 512, 4096), (8192, 20_000, 512, 8192)],
)
def test_a_service_raises_its_descriptors_and_accepts_fewer_connections(
    soft: int, hard: int, connections: int, raised: int
) -> None:
    """Half of the descriptors are left for outgoing connections, Temporal and files."""
    program = LIMITS.format(soft, hard)
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert printed.stdout.split() == [b"%d" % each for each in (connections, raised, hard)]


WORKER = (
    EXHAUSTED.replace(", max_connections=512", "")
    .replace(
        "sys.stdin.read)", "sys.stdin.readline)\n        print(len([open('/dev/null') for _ in range(10)]), flush=True)"
    )
    .replace("(40, resource.getrlimit(resource.RLIMIT_NOFILE)[1])", "(64, 64)")
)


async def test_strangers_leave_descriptors_to_a_process_that_has_other_work() -> None:
    """A worker with a receiver inside calls handlers and Temporal. No command has raised its limit."""
    async with flooded(WORKER) as (process, service):
        assert await asyncio.wait_for(get(service), 20) == 200
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"10\n"


FEW = """
import resource
from nexusrpc import HandlerError
from bridge.http.in_flight import InFlight
resource.setrlimit(resource.RLIMIT_NOFILE, ({0}, {0}))
peer, places = InFlight(), []
try:
    while True:
        places.append(peer.place())
        places[-1].__enter__()
except HandlerError:
    print(len(places) - 1)
"""


@pytest.mark.parametrize(("descriptors", "requests"), [(4096, 256), (256, 64), (64, 16)])
def test_one_peer_gets_half_of_the_connections_that_the_process_may_have(descriptors: int, requests: int) -> None:
    """With few descriptors the process accepts fewer connections, and one peer must not hold all of them."""
    printed = subprocess.run([sys.executable, "-c", FEW.format(descriptors)], capture_output=True, check=True)
    assert int(printed.stdout) == requests


@pytest.mark.parametrize("host", ["127.0.0..1", "x" * 64, "no such host"])
def test_a_host_that_cannot_be_used_is_named(host: str) -> None:
    """A typo in the settings or on the command line."""
    with pytest.raises(OSError, match="cannot listen on") as raised:
        bind(host, 0)
    assert str(raised.value.strerror).startswith(f"cannot listen on {host} port 0: ")


@pytest.mark.parametrize(
    "line", [b"G<T /callbacks?token=s3cret HTTP/1.1", b"GET /callbacks?token=s3cret HTTP/9.x", b"GET / s3cret HTTP/1.1"]
)
async def test_a_line_that_cannot_be_parsed_is_quoted_at_no_level(
    caplog: pytest.LogCaptureFixture, line: bytes
) -> None:
    """It may hold a token. aiohttp logs a bad method on the level of debugging."""
    caplog.set_level(logging.DEBUG)
    async with serving() as service:
        reader = await service.connect(line + b"\r\nHost: h\r\n\r\n")
        assert b" 400 " in await ended(reader)
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("path", [b"/livez", b"/nowhere"])
async def test_an_unknown_expectation_is_refused_and_not_quoted(path: bytes) -> None:
    """aiohttp answers it before any middleware runs, with a text of its own that quotes the request."""
    async with serving() as service:
        head = b"GET " + path + b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\nExpect: s3cret\r\n\r\n"
        answered = await ended(await service.connect(head))
    assert answered.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answered.rpartition(b"\r\n\r\n")[2])["details"]["type"] == "BAD_REQUEST"
    assert b"s3cret" not in answered
    assert b"aiohttp" not in answered


async def test_a_request_that_breaks_the_parser_costs_its_connection_and_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stranger could otherwise fill the log with tracebacks."""
    caplog.set_level(logging.INFO)
    async with serving() as service:
        reader = await service.connect(b"GET http://[::1];@/s3cret HTTP/1.1\r\nHost: h\r\n\r\n")
        assert await ended(reader) == b""
        assert await get(service) == 200
    assert "s3cret" not in caplog.text
    assert "Traceback" not in caplog.text
    assert caplog.text.count("bridge.request_unreadable") == 1
