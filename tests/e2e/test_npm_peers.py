"""Peers in JavaScript: two npm packages sign starts for the real handler service, and check its answers."""

import asyncio
import base64
import json
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import ClientSession
from http_message_signatures import ContentDigest
from multidict import CIMultiDict
from yarl import URL

from bridge.errors import UntrustedError
from bridge.security.signatures import MessageKind, MessageSigner, RequestProof
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.helpers import key_set
from tests.support.peer import start
from tests.support.world import World, running_world

PACKAGES = ["http-message-signatures@1.0.6", "http-message-sig@0.3.0"]
BOUND = '"signature";req;key="bridge"'
BODY = b'{"token":"t","state":"running"}'


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which both packages are installed."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm is not installed: the packages cannot be had")
    return tmp_path_factory.mktemp("npm")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def peer(installed: Path) -> Path:
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", *PACKAGES]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=installed, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    if process.returncode != 0:
        pytest.skip(f"npm cannot install the packages: {out.decode()[-300:]}")
    shutil.copy(ROOT / "tests" / "support" / "npm_peer.mjs", installed)
    return installed


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def quiet(server: Server) -> AsyncIterator[World]:
    async with running_world(server, without=("caller", "handler", "receiver")) as made:
        yield made


async def ask(peer: Path, package: str, key: bytes, **job: Any) -> Any:
    """Run one job with *package*."""
    text = json.dumps({"package": package, "key": base64.b64encode(key).decode(), **job})
    process = await asyncio.create_subprocess_exec(
        *("node", "npm_peer.mjs"), cwd=peer, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate(text.encode())
    assert process.returncode == 0
    return json.loads(out)


def plain(headers: Mapping[str, str]) -> dict[str, str]:
    return dict(headers.items())


@pytest.mark.parametrize("package", [each.partition("@")[0] for each in PACKAGES])
async def test_a_start_signed_in_javascript_gets_an_answer_that_is_checked_there(
    quiet: World, peer: Path, package: str
) -> None:
    """The real service answers 201 and a refusal, both bound to their request; a changed answer does not verify."""
    key = quiet.keys.start.raw()["k1"]
    for ask_for, status in (({"key": quiet.key()}, 201), ({"key": quiet.key(), "behaviour": "refused"}, 400)):
        message = start(quiet, ask_for)
        headers = plain(message.headers) | {"Repr-Digest": ContentDigest.create(message.body)}
        names = [n.lower() for n in headers if n.lower() != "repr-digest"]
        components = ["@method", "@path", "@query", "repr-digest", *names]
        unsigned = {"method": "POST", "url": message.url, "headers": headers}
        signed = await ask(peer, package, key, do="sign", tag="bridge-start", components=components, message=unsigned)
        async with (
            ClientSession() as session,
            session.post(URL(message.url, encoded=True), headers=signed, data=message.body) as response,
        ):
            assert response.status == status
            received = plain(response.headers)
        request = {"method": "POST", "url": message.url, "headers": signed}
        for claimed_status, expected in ((status, True), (200, False)):
            answer = {"status": claimed_status, "headers": received}
            held = await ask(peer, package, key, do="verify", tag="bridge-answer", message=answer, request=request)
            assert held is expected


@pytest.mark.parametrize("package", [each.partition("@")[0] for each in PACKAGES])
async def test_our_start_is_checked_in_javascript_and_its_answer_is_checked_here(peer: Path, package: str) -> None:
    """Our request and the package's answer verify, and neither verifies for another request."""
    keys = key_set()
    key, url = keys.raw()["k1"], "https://payments.example/op?callback=https%3A%2F%2Forders.example%2F7"
    proofs: list[RequestProof] = []
    requests: list[dict[str, Any]] = []
    for number in ("7", "8"):
        asked = CIMultiDict({"Nexus-Request-Id": number, "Content-Type": "application/json"})
        proofs.append(MessageSigner(keys).sign(MessageKind.START, url, asked, b"{}"))
        requests.append({"method": "POST", "url": url, "headers": plain(asked)})
        assert await ask(peer, package, key, do="verify", tag="bridge-start", message=requests[-1])
    spoilt = requests[0] | {"headers": requests[0]["headers"] | {"Nexus-Request-Id": "9"}}
    assert not await ask(peer, package, key, do="verify", tag="bridge-start", message=spoilt)

    headers = {"Content-Type": "application/json", "Repr-Digest": ContentDigest.create(BODY)}
    signed = await ask(
        peer,
        package,
        key,
        do="sign",
        tag="bridge-answer",
        components=["@status", "repr-digest", BOUND, "content-type"],
        message={"status": 201, "headers": headers},
        request=requests[0],
    )
    assert proofs[0].verify_answer(201, CIMultiDict(signed), BODY)["Content-Type"] == "application/json"
    with pytest.raises(UntrustedError):
        proofs[1].verify_answer(201, CIMultiDict(signed), BODY)
    with pytest.raises(UntrustedError):
        proofs[0].verify_answer(200, CIMultiDict(signed), BODY)
