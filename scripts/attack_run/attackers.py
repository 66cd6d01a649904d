"""The attackers, each in a process of its own: `python -m scripts.attack_run.attackers NAME`.

Standard input has one line of JSON: what `Aim` needs. Standard output has a line when the attack is under way, and one
JSON object at the end: what was sent and answered. An attack goes to the loopback only. It ends when standard input
ends, or by itself after two minutes.
"""

import asyncio
import contextlib
import json
import os
import secrets
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from bridge.security.keys import KeySet
from bridge.security.signatures import MessageKind, MessageSigner
from scripts.attack_run.calls import BAD

_ACCOMPLICES = 20
"""Requests in flight of an attack that waits for answers."""
_LONGEST_S = 120.0
_PAUSE_S = 0.2
"""After a connection was refused or closed."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is attacked, and by whom."""

    service_url: str
    receiver_url: str
    keys: dict[str, dict[str, Any]]
    """Key sets of the bad peer: `start` and `completion` as a caller, `handler` for its completions as a handler."""
    port: int
    """Where the bad peer listens."""

    @property
    def services(self) -> list[str]:
        """Both services."""
        return [self.service_url, self.receiver_url]

    def signer(self, name: str) -> MessageSigner:
        """A signer with a key set of the bad peer."""
        key_set = KeySet.model_validate(self.keys[name])
        return MessageSigner(lambda: key_set)


Attack = Callable[[Aim, Counter[str]], Awaitable[None]]


async def slow_headers(aim: Aim, counts: Counter[str]) -> None:
    """300 clients that send headers of 16 kB, and never finish them."""

    async def client(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await _connect(aim.services[number % 2])
                counts["connections"] += 1
                writer.write(b"POST /c/order-prod/PaymentService/process HTTP/1.1\r\nHost: x\r\n")
                for header in range(120):
                    writer.write(b"X-%d: %s\r\n" % (header, b"a" * 16_000))
                    await writer.drain()
                    if reader.at_eof() or writer.is_closing():
                        break
                    await asyncio.sleep(0.1)
                writer.close()
            await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(_go_on(), *map(client, range(300)))


async def idle_connections(aim: Aim, counts: Counter[str]) -> None:
    """1 015 connections to each service that send nothing."""

    async def client(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await _connect(aim.services[number % 2])
                counts["connections"] += 1
                await reader.read()
                writer.close()
            # Most are closed soon in favor of new ones. Opened again at once, they would be a flood of connections.
            await asyncio.sleep(5)

    await asyncio.gather(_go_on(), *map(client, range(2 * 1015)))


async def bad_signatures(aim: Aim, counts: Counter[str]) -> None:
    """1 000 requests a second in the names of honest peers, signed with keys that they do not have."""
    paths = {
        aim.service_url: "/c/order-prod/PaymentService/process",
        aim.receiver_url: f"/callbacks/{'c' * 22}?sig=e30.x",
    }

    async def client(number: int) -> None:
        url = aim.services[number % 2]
        headers = CIMultiDict({"Content-Type": "application/json", "Nexus-Request-Id": secrets.token_hex(8)})
        aim.signer("start").sign(MessageKind.START, url + paths[url], headers, b"{}")
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        message = f"POST {paths[url]} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{head}\r\n{{}}".encode()
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await _connect(url)
                while True:
                    began = loop.time()
                    writer.write(message)
                    answered = await reader.readuntil(b"\r\n\r\n")
                    length = answered.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length or b"0"))
                    counts[f"answered {answered[9:12].decode()}"] += 1
                    await asyncio.sleep(max(0.0, _ACCOMPLICES / 1000 - (loop.time() - began)))
            await asyncio.sleep(_PAUSE_S)

    await asyncio.gather(_go_on(), *map(client, range(_ACCOMPLICES)))


async def hanging_receiver(aim: Aim, counts: Counter[str]) -> None:
    """A caller whose receiver never answers starts 400 payments."""

    async def hang(_: web.Request) -> web.Response:
        counts["callbacks"] += 1
        await asyncio.Event().wait()
        raise AssertionError

    async with _listening(aim, hang):
        await _starts(aim, counts, "PaymentService/process", calls=400)
        await _go_on()


async def dripping_handler(aim: Aim, counts: Counter[str]) -> None:
    """A handler that answers each start with one byte a second. 300 workflows call it."""

    async def drip(request: web.Request) -> web.StreamResponse:
        counts["starts"] += 1
        response = web.StreamResponse()
        with contextlib.suppress(ConnectionError):
            await response.prepare(request)
            while True:
                await response.write(b"{")
                await asyncio.sleep(1)
        return response

    async with _listening(aim, drip):
        await _go_on()


async def large_failures(aim: Aim, counts: Counter[str]) -> None:
    """A handler that answers each start late, and sends failures of 4 MB with 1.38 million empty payloads before."""
    signer = aim.signer("handler")
    failure = b'{"message":"","details":{"applicationFailureInfo":{"details":{"payloads":[%s]}}}}'
    body = failure % b",".join([b"{}"] * 1_380_000)

    async def fail(request: web.Request) -> web.Response:
        if "callback" not in request.query:
            return web.Response(status=503)
        url = request.query["callback"]
        counts["starts"] += 1
        async with aiohttp.ClientSession() as session:
            headers = CIMultiDict({"Content-Type": "application/json", "Nexus-Operation-State": "failed"})
            signer.sign(MessageKind.COMPLETION, url, headers, body)
            async with session.post(URL(url, encoded=True), headers=headers, data=body) as response:
                counts[f"answered {response.status}"] += 1
        return web.Response(status=503)

    async with _listening(aim, fail):
        await _go_on()


async def many_attaches(aim: Aim, counts: Counter[str]) -> None:
    """One caller attaches 10 000 calls to one run."""
    await asyncio.gather(_starts(aim, counts, "SharedService/rates", calls=10_000), _go_on())


ATTACKS: dict[str, Attack] = {
    each.__name__: each
    for each in (
        slow_headers,
        idle_connections,
        bad_signatures,
        hanging_receiver,
        dripping_handler,
        large_failures,
        many_attaches,
    )
}
CALLED_BY_WORKFLOWS = {"dripping_handler": 300, "large_failures": 40}
"""Attacks by a handler, and how many workflows call it."""


async def _go_on() -> None:
    """Say that the attack is under way, and end it when it has to end."""
    print("under way", flush=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LONGEST_S):
            await asyncio.to_thread(sys.stdin.read)
    raise _OverError


class _OverError(Exception):
    """The attack is over."""


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


@contextlib.asynccontextmanager
async def _listening(aim: Aim, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[None]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", aim.port).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def _starts(aim: Aim, counts: Counter[str], operation: str, *, calls: int) -> None:
    """Start *operation* so many times as the bad caller, each with a request id of its own.

    Payments are started slowly: an attack must not be more work than the machine can do.
    """
    signer, numbers = aim.signer("start"), iter(range(calls))
    callback = quote(f"http://127.0.0.1:{aim.port}/callbacks/c", safe="")
    url = f"{aim.service_url}/c/{BAD}/{operation}?callback={callback}"

    async def client(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            body = json.dumps({"order_id": f"{BAD}-{number}", "amount": 1}).encode()
            headers = CIMultiDict(
                {
                    "Content-Type": "application/json",
                    "Nexus-Request-Id": secrets.token_hex(8),
                    "Operation-Timeout": "3600s",
                    "Bridge-Scheduled-Time": datetime.now(UTC).isoformat(),
                }
            )
            signer.sign(MessageKind.START, url, headers, body)
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(URL(url, encoded=True), headers=headers, data=body) as response:
                    counts[f"answered {response.status}"] += 1
                    if operation.startswith("Payment"):
                        await asyncio.sleep(_ACCOMPLICES / 12)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(_ACCOMPLICES)))


async def attack(name: str, aim: Aim) -> Counter[str]:
    """Carry out one attack."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(_OverError):
        await ATTACKS[name](aim, counts)
    return counts


if __name__ == "__main__":
    # In production an attacker uses CPU of its own.
    os.nice(10)
    print(json.dumps(asyncio.run(attack(sys.argv[1], Aim(**json.loads(sys.stdin.readline()))))), flush=True)
