"""Calls through real proxies that speak TLS and HTTP/2, and that ask for client certificates."""

import asyncio
import re
import ssl
from contextlib import aclosing
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from bridge.http.client import HttpClient
from bridge.http.peer_client import PeerClient
from bridge.http.route import Route
from bridge.protocol.answers import Answer, Sent
from bridge.runtime.metrics import Metrics
from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server, free_ports
from scripts.environment.stack import ROOT
from tests.support.callers import CallPlan
from tests.support.certificates import Authority, tls_of
from tests.support.helpers import CALLER, HANDLER
from tests.support.proxies import PREFIX, Proxy, running
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

PATIENT = CallPlan(first_lease=600)
"""Only a callback ends such a call in the time of a test."""
CERTIFICATE = """
openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost
-keyout key.pem -out certificate.pem
"""


EDGES = """
https://localhost:{outer} {{
    tls {folder}/certificate.pem {folder}/key.pem
    reverse_proxy https://localhost:{inner} {{
        transport http {{
            versions 2
            tls_trust_pool file {folder}/certificate.pem
        }}
    }}
}}
https://localhost:{inner} {{
    tls {folder}/certificate.pem {folder}/key.pem
    reverse_proxy 127.0.0.1:{front}
}}
"""


@pytest.mark.part("proxies")
async def test_calls_cross_proxies_that_speak_tls_and_http_2(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS from the caller to the first proxy, HTTP/2 over TLS between the proxies, HTTP/1.1 to the service."""
    made = await asyncio.create_subprocess_exec(
        *CERTIFICATE.split(), cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    assert await made.wait() == 0
    trusting = ssl.create_default_context(cafile=str(tmp_path / "certificate.pem"))
    monkeypatch.setattr("aiohttp.connector._SSL_CONTEXT_VERIFIED", trusting)
    front, back, outer, inner = free_ports(4)

    def prepare(world: World) -> None:
        world.service.url = world.endpoint_url = f"https://localhost:{outer}{PREFIX}"

    async with running_world(server, prepare=prepare) as world:
        proxy = Proxy("caddy", tmp_path, front, back, world.service.port, world.receiver.port)
        async with running(proxy, more=EDGES.format(folder=tmp_path, outer=outer, inner=inner, front=front)):
            for plan, text in ((PATIENT, "called"), (CallPlan(transport="wait", first_lease=600), "held")):
                handle = await world.call(Ask(key=world.key(), text=text), plan)
                assert await handle.result() == Reply(text)
        assert world.service.statuses == [201, 200]


def example(name: str, teams: dict[str, Path], ports: dict[str, int]) -> str:
    """The file of deploy/tls for the proxy *name*, with the files, names and ports of a test."""
    text = (ROOT / "deploy" / "tls" / {"nginx": "nginx.conf", "caddy": "Caddyfile"}[name]).read_text()
    for team, folder in teams.items():
        text = text.replace(f"/etc/bridge/{team}/", f"{folder}/")
        for old, new in (
            (f"listen 443 ssl;\n    server_name {team}.example", f"listen 127.0.0.1:{ports[team]} ssl"),
            (f"{team}.example {{", f"https://localhost:{ports[team]} {{"),
        ):
            text = text.replace(old, new)
    for port in ("8081", "8080"):
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[port]}")
    return text


@pytest.mark.part("proxies")
@pytest.mark.parametrize("name", ["nginx", "caddy"])
async def test_proxies_that_ask_for_certificates_are_crossed_in_both_directions(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With the files of deploy/tls. Certificates and authorities are renewed in place, without a restart of ours."""
    monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)
    orders, payments = (Authority(tmp_path / team) for team in ("orders", "payments"))
    ports = dict(zip(("orders", "payments", "front", "back"), free_ports(4), strict=True))

    def put_files() -> None:
        for own, other, trusted in ((orders, payments, "handlers-ca.pem"), (payments, orders, "callers-ca.pem")):
            own.issue("localhost")
            (own.file.parent / "localhost" / trusted).write_bytes(other.file.read_bytes())

    put_files()
    to_payments = {"ca_file": str(payments.file), **orders.issue("orders.example")}
    to_orders = {"ca_file": str(orders.file), **payments.issue("payments.example")}

    def prepare(world: World) -> None:
        world.service.url = world.endpoint_url = f"https://localhost:{ports['payments']}"
        world.receiver.url = f"https://localhost:{ports['orders']}"
        world.endpoint_options, world.peer_options = {"tls": to_payments}, {"tls": to_orders}

    async with running_world(server, prepare=prepare) as world:
        ports |= {"8081": world.service.port, "8080": world.receiver.port}
        folders = {team: tmp_path / team / "localhost" for team in ("orders", "payments")}
        proxy = Proxy(name, tmp_path, ports["front"], ports["back"], world.service.port, world.receiver.port)
        async with running(proxy, more=example(name, folders, ports)):
            for _ in range(2):
                called = await world.call(Ask(key=world.key(), text="through"), PATIENT)
                assert await asyncio.wait_for(called.result(), 60) == Reply("through")
                before, sent = len(world.service.requests), len(world.receiver.requests)
                await refused_without_certificate(world, payments, orders)
                assert (len(world.service.requests), len(world.receiver.requests)) == (before, sent)
                orders.renew()
                payments.renew()
                put_files()
                await proxy.reload(more=example(name, folders, ports))
        assert world.service.statuses == [201, 201]
        assert await world.receiver.answered() == [200, 200]


async def refused_without_certificate(world: World, payments: Authority, orders: Authority) -> None:
    """Ask both services for an echo, signed but without a certificate: neither gets the request."""
    asked = (
        (f"{world.service.url}/c/{CALLER}", payments, world.keys.start),
        (f"{world.receiver.url}/callbacks?handler={HANDLER}", orders, world.keys.completion),
    )
    async with aclosing(HttpClient()) as http:
        client = PeerClient(http, metrics=Metrics.of(world.caller_client))
        for url, authority, keys in asked:
            route = Route(networks=(IPv4Network("127.0.0.0/8"),), tls=tls_of(ca_file=str(authority.file)))
            asking = client.post(
                Sent.ECHO, "peer", url, {}, b"", signer=MessageSigner(keys), answers="signed", route=route
            )
            # nginx answers 400, and Caddy closes the connection.
            [found] = await asyncio.gather(asking, return_exceptions=True)
            said = str(found.error if isinstance(found, Answer) else found)
            assert re.search(r"TLS failed|connection lost|answered 400.*nginx", said), said
