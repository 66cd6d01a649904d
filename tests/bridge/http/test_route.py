"""TLS and egress proxies of outgoing requests, on real sockets."""

import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiohttp import web
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from temporalio.common import MetricMeter
from yarl import URL

from bridge.errors import DestinationRefusedError, TransportError
from bridge.http.client import HttpClient
from bridge.http.peer_client import PeerClient
from bridge.http.route import Route
from bridge.protocol.answers import Answer, Sent
from bridge.runtime.metrics import Metrics
from bridge.runtime.settings import SettingsError, load
from bridge.security.keys import new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.certificates import Authority, tls_of
from tests.support.helpers import CALLER
from tests.support.mounted import by_rename
from tests.support.proxies import egress_proxy
from tests.support.settings_files import Configured, Tree, caller_tree, handler_tree

LOOPBACK = (IPv4Network("127.0.0.0/8"),)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


class TlsPeer:
    """A server that asks for a certificate, and notes whose it got."""

    def __init__(self, authority: Authority, *, trusts: trustme.CA) -> None:
        self.seen: list[str] = []
        self.port = 0
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.ca.issue_cert("localhost").configure_cert(self.context)
        trusts.configure_trust(self.context)
        self.context.verify_mode = ssl.CERT_REQUIRED

    async def answer(self, request: web.Request) -> web.Response:
        assert request.transport is not None
        names = request.transport.get_extra_info("peercert")["subjectAltName"]
        self.seen.append(names[0][1])
        return web.Response(text="{}")


@asynccontextmanager
async def listening(peer: TlsPeer) -> AsyncIterator[TlsPeer]:
    app = web.Application()
    app.router.add_post("/{path:.*}", peer.answer)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=peer.context)
        await site.start()
        peer.port = runner.addresses[0][1]
        yield peer
    finally:
        await runner.cleanup()


@asynccontextmanager
async def peer_client() -> AsyncIterator[PeerClient]:
    async with aclosing(HttpClient()) as http:
        yield PeerClient(http, metrics=Metrics(MetricMeter.noop))


async def post(client: PeerClient, url: str, **route: Any) -> Answer:
    way = Route(**{"networks": LOOPBACK, **route})
    return await client.post(Sent.ECHO, "peer", url, {}, b"", signer=None, answers="unsigned", route=way)


async def test_each_entry_has_its_own_authorities_certificate_and_connections(
    authority: Authority, tmp_path: Path
) -> None:
    """Two entries for one host show two certificates. Without the right files nothing is sent, and the cure is said."""
    clients = Authority(tmp_path / "clients")
    async with listening(TlsPeer(authority, trusts=clients.ca)) as peer, peer_client() as client:
        url = f"https://localhost:{peer.port}/"
        ca = str(authority.file)
        ours, theirs = (tls_of(ca_file=ca, **clients.issue(name)) for name in ("orders.example", "stock.example"))
        for tls in (ours, theirs, ours):
            assert (await post(client, url, tls=tls)).status == 200
        assert peer.seen == ["orders.example", "stock.example", "orders.example"]
        for unknown in (tls_of(ca_file=ca), tls_of(ca_file=ca, **authority.issue("other.example"))):
            # Whether the peer's alert or the end of the connection is seen first differs.
            with pytest.raises(TransportError, match=r"TLS failed|connection lost"):
                await post(client, url, tls=unknown)
        for untrusting in (None, tls_of(ca_file=str(clients.file), **clients.issue("x.example"))):
            with pytest.raises(TransportError, match=r"its authority has to be in tls\.ca_file of its entry"):
                await post(client, url, tls=untrusting)
        assert len(peer.seen) == 3


async def test_a_renewed_certificate_is_used_without_a_restart(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Certificate and key are replaced one after the other: the pair in between does not fit, and the old one stays."""
    monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)
    async with listening(TlsPeer(authority, trusts=authority.ca)) as peer, peer_client() as client:
        files = authority.issue("old.example")
        tls = tls_of(ca_file=str(authority.file), **files)
        new = authority.issue("new.example")
        url = f"https://localhost:{peer.port}/"
        for field in ("certificate_file", "certificate_file", "key_file"):
            assert (await post(client, url, tls=tls)).status == 200
            by_rename(Path(files[field]), Path(new[field]).read_text())
        assert (await post(client, url, tls=tls)).status == 200
    assert peer.seen == ["old.example", "old.example", "old.example", "new.example"]
    assert "changed files with tls cannot be used" in caplog.text
    assert "KEY_VALUES_MISMATCH" in caplog.text


@pytest.mark.part("proxies")
async def test_requests_go_through_an_egress_proxy_only(authority: Authority, tmp_path: Path) -> None:
    """The proxy tunnels TLS and opens the connection to the peer. The guard checks the address of the proxy."""
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(listening(TlsPeer(authority, trusts=authority.ca)))
        client = await stack.enter_async_context(peer_client())
        proxy = await stack.enter_async_context(egress_proxy(tmp_path, connect_port=peer.port))
        tls = tls_of(ca_file=str(authority.file), **authority.issue("orders.example"))
        url = f"https://localhost:{peer.port}/"
        assert (await post(client, url, tls=tls, proxy=proxy.url)).status == 200
        assert f"CONNECT localhost:{peer.port}" in proxy.log()
        with pytest.raises(TransportError, match="the egress proxy answered 403"):
            await post(client, "https://localhost:444/", tls=tls, proxy=proxy.url)
        with pytest.raises(DestinationRefusedError, match="in `networks` of its entry"):
            await post(client, url, tls=tls, proxy=proxy.url, networks=())
        with pytest.raises(TransportError, match="cannot connect to the egress proxy: ConnectionRefusedError"):
            await post(client, url, tls=tls, proxy="http://127.0.0.1:1")
    assert peer.seen == ["orders.example"]


def encrypted(path: str) -> str:
    key = load_pem_private_key(Path(path).read_bytes(), password=None)
    blob = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password"))
    other = Path(path).with_name("encrypted.pem")
    other.write_bytes(blob)
    return str(other)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda tls: tls | {"ca_file": "missing.pem"}, "missing.pem: no such file"),
        (lambda tls: tls | {"ca_file": tls["key_file"]}, "ca_file: .* has no certificate in PEM form"),
        (lambda tls: {"key_file": tls["key_file"]}, "key_file: certificate_file is missing"),
        (lambda tls: {"certificate_file": tls["certificate_file"]}, "certificate_file: .* belong together"),
        (lambda tls: tls | {"certificate_file": tls["ca_file"]}, "KEY_VALUES_MISMATCH"),
        (lambda tls: tls | {"key_file": encrypted(tls["key_file"])}, "the key must have no password"),
        (lambda tls: tls | {"key_file": str(Path(tls["key_file"]).parent)}, "a folder"),
        (lambda tls: tls | {"verify": False}, "verify"),
    ],
)
@pytest.mark.parametrize("side", ["caller", "handler"])
def test_files_that_cannot_be_used_are_named_at_start(
    configured: Configured, authority: Authority, side: str, spoil: Any, says: str
) -> None:
    """The error has the field, the file and the remedy, and quotes no key."""
    tls = spoil({"ca_file": str(authority.file), **authority.issue("orders.example")})
    model, tree, where = sides(side, tls=tls)
    configured(tree)
    with pytest.raises(SettingsError, match=rf"(?s){where}.tls.*{says}") as raised:
        load(model)
    assert "PRIVATE" not in str(raised.value)


def sides(side: str, **fields: Any) -> tuple[type[CallerSettings] | type[HandlerSettings], Tree, str]:
    if side == "caller":
        caller = caller_tree()
        caller["endpoints"]["payments"] |= fields
        return CallerSettings, caller, "endpoints.payments"
    handler = handler_tree()
    handler["callers"][CALLER] |= fields
    return HandlerSettings, handler, f"callers.{CALLER}"


@pytest.mark.parametrize("side", ["caller", "handler"])
def test_paths_start_in_the_folder_of_the_settings_file(
    configured: Configured, authority: Authority, side: str
) -> None:
    """As paths of key files do. A proxy needs a URL without a user."""
    tls = {"ca_file": "authority/ca.pem"}
    model, tree, where = sides(side, tls=tls, proxy="http://proxy.example:3128")
    configured(tree)
    settings = load(model)
    entry = settings.endpoints["payments"] if isinstance(settings, CallerSettings) else settings.callers[CALLER]
    assert entry.tls is not None
    assert entry.tls.files == [authority.file]
    model, tree, where = sides(side, proxy=f"http://user:{(secret := new_key())}@proxy.example:3128")
    configured(tree)
    with pytest.raises(SettingsError, match=f"{where}.proxy") as raised:
        load(model)
    assert secret not in str(raised.value)


async def test_each_route_has_connections_of_its_own(authority: Authority) -> None:
    """Networks, proxy and certificates separate destinations, also at one address."""
    names = ("a.example", "b.example")
    a, b = (tls_of(ca_file=str(authority.file), **authority.issue(name)) for name in names)
    routes = [Route(), Route(networks=LOOPBACK), Route(tls=a), Route(tls=b)]
    routes += [Route(proxy="http://p.example:1"), Route(proxy="http://q.example:1")]
    async with peer_client() as client:
        found = [client._http._destination(URL("https://payments.example"), each, "payments") for each in routes]
    assert len(set(map(id, found))) == len(routes)


async def test_a_renewed_authority_is_taken_also_without_a_new_certificate(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the file of the authority changes."""
    monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)
    clients = Authority(tmp_path / "clients")
    tls = tls_of(ca_file=str(authority.file), **clients.issue("orders.example"))
    async with peer_client() as client:
        for _ in range(2):
            async with listening(TlsPeer(authority, trusts=clients.ca)) as peer:
                assert (await post(client, f"https://localhost:{peer.port}/", tls=tls)).status == 200
            authority.renew()


async def test_a_route_by_a_proxy_never_goes_past_it() -> None:
    """The peer would answer, and the proxy is down."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(app)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = await stack.enter_async_context(peer_client())
        with pytest.raises(TransportError, match="cannot connect to the egress proxy"):
            await post(client, f"http://127.0.0.1:{runner.addresses[0][1]}/", proxy="http://127.0.0.1:1")
