"""No process in between reads a payload, and no secret leaves the process that holds it."""

import json
import logging
from typing import Any

import pytest
from aiohttp import web
from google.protobuf.json_format import MessageToJson
from temporalio.client import WorkflowFailureError

from bridge.runtime.event_log import JsonFormatter
from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler
from tests.support.helpers import assert_eventually
from tests.support.peer import send, start
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world, with_codec

PLANTED = "planted-4711"
CALLBACK_TOKEN = "?sig="


async def history_text(world: World, ask: Ask, handle: Any) -> tuple[str, str]:
    """Both histories and the output of describe, as text."""
    texts = []
    for each in (handle, world.target(ask)):
        described = await each.describe()
        history = [MessageToJson(event) for event in (await each.fetch_history()).events]
        texts.append("".join([*history, MessageToJson(described.raw_description)]))
    return texts[0], texts[1]


async def test_encrypted_payloads_cross_unread(server: Server) -> None:
    """With a codec on both sides, neither HTTP nor any history contains the plain value."""
    bodies: list[tuple[str, bytes]] = []

    async def capture(request: web.Request) -> None:
        bodies.append((request.headers.get("Content-Type", ""), await request.read()))

    async with running_world(server, converters=(with_codec(Scrambler()), with_codec(Scrambler()))) as world:
        world.service.before = world.receiver.before = capture
        ask = Ask(key=world.key(), text=PLANTED)
        handle = await world.call(ask)
        assert await handle.result() == Reply(PLANTED)
        assert [kind for kind, _ in bodies] == ["application/x-temporal-payload"] * 2
        assert not any(PLANTED.encode() in body for _, body in bodies)
        for text in await history_text(world, ask, handle):
            assert PLANTED not in text

        failing = Ask(key=world.key(), behaviour="fail", text=PLANTED)
        handle = await world.call(failing)
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        outer = raised.value.cause.__cause__
        assert list(outer.details) == [{"key": failing.key}, "two"]  # type: ignore[union-attr]


async def test_no_secret_is_logged_answered_or_recorded(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """For success, failure, renewal, refusal and a forged message: no key appears, and tokens only where required."""
    caplog.set_level(logging.DEBUG)
    secrets = [world.keys.hash] + [
        key_set.keys["k1"].get_secret_value()
        for key_set in (world.keys.callback, world.keys.start, world.keys.completion)
    ]
    asks = [Ask(key=world.key()), Ask(key=world.key(), behaviour="fail"), Ask(key=world.key(), behaviour="wait")]
    handles = [await world.call(ask, CallPlan(first_lease=1, renewal=1)) for ask in asks]
    await world.until_attempt(handles[2], 2)
    await world.target(asks[2]).signal("say", "on")
    for handle in handles:
        try:
            await handle.result()
        except WorkflowFailureError:
            continue
    forged = start(world, {"key": world.key()})
    answer = await send(forged, MessageSigner(world.keys.completion))
    assert answer.status == 401

    logs = "\n".join(JsonFormatter().format(record) for record in caplog.records) + caplog.text
    assert "bridge.http_request" in logs
    assert CALLBACK_TOKEN not in logs
    assert "Signature" not in logs
    for ask, handle in zip(asks, handles, strict=True):
        of_caller, of_target = await history_text(world, ask, handle)
        # The target's memo holds the callback URL, signed for one wait. The caller's history holds no part of it.
        assert CALLBACK_TOKEN not in of_caller
        for secret in secrets:
            assert secret not in logs + of_caller + of_target


async def test_access_logs_show_requests_and_renewals_of_a_call(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Both services log each request id: the demo, the benchmark and operators count these lines."""
    caplog.set_level(logging.INFO)
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await world.until_attempt(handle, 3)
    await world.target(ask).signal("say", "on")
    await handle.result()
    request_id = (await handle.fetch_history()).events[4].activity_task_scheduled_event_attributes.activity_id

    async def logged() -> list[dict[str, Any]]:
        lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
        own = [line for line in lines if line.get("bridge.request_id") == request_id]
        requests = [line for line in own if line["event"] == "bridge.http_request"]
        assert any(line["bridge.route"] == "/callbacks/{callback_id}" for line in requests)
        return requests

    requests = await assert_eventually(logged)
    starts = [line for line in requests if line["bridge.route"] == "/c/{caller}/{service}/{operation}"]
    assert [line["bridge.attempt"] for line in starts] == list(range(1, len(starts) + 1))
    assert len(starts) >= 2
    assert all(line["bridge.target"] == f"probe-{ask.key}" for line in starts)
