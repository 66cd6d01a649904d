"""Proofs of a caller: a message without a good one is a 401 that says nothing, and starts nothing."""

import asyncio
from typing import Any

import aiohttp
import pytest
from yarl import URL

from bridge.security import signatures
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner
from scripts.environment.server import Server
from tests.support.helpers import CALLER, key_set
from tests.support.peer import (
    UNAUTHENTICATED,
    Spoil,
    assert_nothing_started,
    body,
    header,
    send,
    signer,
    start,
    twice,
    url,
    without,
)
from tests.support.world import World, running_world


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(without("Signature"), id="no signature"),
        pytest.param(without("Signature-Input"), id="no signature input"),
        pytest.param(without("Repr-Digest"), id="no digest"),
        pytest.param(body(b'{"key": "other"}'), id="another body"),
        pytest.param(header("Nexus-Request-Id", "other"), id="another request id"),
        pytest.param(header("Operation-Timeout", "9999s"), id="another timeout"),
        pytest.param(twice("Nexus-Request-Id", "second"), id="request id twice"),
        pytest.param(header("Nexus-Link", "<temporal:///x>"), id="an added link"),
        pytest.param(url("sig%3Dtoken", "sig%3Dother"), id="another callback"),
        pytest.param(url("/probe?", "/nothing?"), id="another operation"),
        pytest.param(url(f"/c/{CALLER}/", "/c/stranger/"), id="unknown caller"),
        pytest.param(header("Signature", "bridge=:AAAA:"), id="a signature of nothing"),
        pytest.param(header("Signature-Input", "x" * 5000), id="overlong signature input"),
        pytest.param(header("Nexus-Extra", "\u00e9"), id="a header that is not ASCII"),
    ],
)
async def test_every_failed_proof_is_the_same_401(quiet: World, spoil: Spoil) -> None:
    """Status and bytes are the same for every failed check. No run starts."""
    key = quiet.key()
    message = start(quiet, {"key": key})
    message.after_signing.append(spoil)
    answer = await send(message, signer(quiet))
    assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    assert "Signature" not in answer.headers
    await assert_nothing_started(quiet, key)


async def test_a_signature_of_another_key_or_kind_is_a_401(quiet: World) -> None:
    """The key of the other direction, a stranger's key and a cancel's signature are refused."""
    for completion_keys in (quiet.keys.completion, key_set(new_key())):
        answer = await send(start(quiet, {"key": quiet.key()}), MessageSigner(completion_keys))
        assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
    message = start(quiet, {"key": quiet.key()})
    message.kind = MessageKind.CANCEL
    assert (await send(message, signer(quiet))).status == 401


async def test_an_unknown_name_or_key_id_costs_as_much_as_a_wrong_key(
    quiet: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of an answer shows neither which callers there are nor how their keys are named."""
    made: list[str] = []
    real = signatures._mac

    def mac(*given: Any) -> str:
        made.append("mac")
        return real(*given)

    monkeypatch.setattr(signatures, "_mac", mac)
    counts = set()
    unknown_id = MessageSigner(KeySet.model_validate({"signing": "k9", "keys": {"k9": new_key()}}))
    for name, own in ((CALLER, MessageSigner(key_set())), ("stranger", MessageSigner(key_set())), (CALLER, unknown_id)):
        message = start(quiet, {"key": quiet.key()})
        url(f"/c/{CALLER}/", f"/c/{name}/")(message)
        made.clear()
        answer = await send(message, own)
        assert (answer.status, answer.body) == (401, UNAUTHENTICATED)
        counts.add(len(made))
    assert len(counts) == 1


async def test_a_body_is_asked_for_only_after_the_headers_are_verified(quiet: World) -> None:
    """A stranger gets the refusal instead of `100 Continue`; a caller with a proof gets the interim answer."""
    message = start(quiet, {"key": quiet.key()})
    for is_signed in (False, True):
        if is_signed:
            signer(quiet).sign(MessageKind.START, message.url, message.headers, message.body)
        lines = [f"POST {URL(message.url, encoded=True).raw_path_qs} HTTP/1.1", "Host: h", "Expect: 100-continue"]
        lines += [f"{name}: {value}" for name, value in message.headers.items()]
        reader, writer = await asyncio.open_connection("127.0.0.1", quiet.service.port)
        writer.write("\r\n".join([*lines, f"Content-Length: {len(message.body)}", "", ""]).encode())
        assert (await reader.readline()).split()[1] == (b"100" if is_signed else b"401")
        if is_signed:
            assert await reader.readline() == b"\r\n"
            writer.write(message.body)
            assert (await reader.readline()).split()[1] == b"201"
        writer.transport.abort()


async def test_a_bearer_secret_that_is_not_text_is_a_401(server: Server) -> None:
    """No bytes from a stranger cause an internal error."""

    def prepare(world: World) -> None:
        world.peer_options = {"auth": "bearer", "start_keys": None, "bearer_keys": key_set()}

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        head = [f"POST /c/{CALLER}/ProbeService/probe HTTP/1.1", "Host: handler", "Content-Length: 0"]
        reader, writer = await asyncio.open_connection("127.0.0.1", world.service.port)
        writer.write("\r\n".join([*head, "Authorization: Bearer "]).encode() + b"\xff\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"401"
        writer.close()
        await writer.wait_closed()


async def test_a_bearer_secret_counts_once_and_by_its_scheme(server: Server) -> None:
    """Another scheme, no scheme, two headers and none are a 401."""
    secret = key_set()

    def prepare(world: World) -> None:
        world.peer_options = {"auth": "bearer", "start_keys": None, "bearer_keys": secret}

    text = secret.keys["k1"].get_secret_value()
    without = ("caller", "handler", "receiver")
    async with running_world(server, without=without, prepare=prepare) as world, aiohttp.ClientSession() as session:

        async def status(*values: str) -> int:
            headers = [("Authorization", each) for each in values]
            async with session.post(f"{world.service.url}/c/{CALLER}", headers=headers) as response:
                return response.status

        assert [await status(f"Bearer {text}"), await status(f"bearer {text}")] == [200, 200]
        refused = [(f"Basic {text}",), (text,), (f"Bearer {text}", f"Bearer {text}"), ()]
        assert [await status(*each) for each in refused] == [401] * 4
