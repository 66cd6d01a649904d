"""One line of the log for each decision: who asked for what, whether it was allowed, and by which key."""

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pytest

from bridge.runtime.event_log import JsonFormatter
from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.peer import send, start
from tests.support.targets import Ask
from tests.support.world import World, running_world

OPERATION = "ProbeService/probe"


def refuse(caller: str, operation: str, ask: Ask) -> None:
    if ask.text == "too much":
        message = f"{caller} may not ask for so much"
        raise PermissionError(message)


def prepare(world: World) -> None:
    world.authorize = refuse


async def decisions(caplog: pytest.LogCaptureFixture, *kinds: str) -> list[dict[str, Any]]:
    """The lines for *kinds* of message, once there is one for each."""

    async def found() -> list[dict[str, Any]]:
        lines = [json.loads(JsonFormatter().format(each)) for each in caplog.records]
        chosen = [
            line for line in lines if line.get("event") == "bridge.http_request" and line.get("bridge.message") in kinds
        ]
        assert [line["bridge.message"] for line in chosen] == list(kinds)
        return chosen

    return await assert_eventually(found)


async def test_every_decision_is_one_line(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Start, cancel and completion of one call have one request id; a line without a reason is a request allowed."""
    async with running_world(server, prepare=prepare) as world:
        caplog.set_level(logging.INFO)
        ask = Ask(world.key(), "swallow cancel")
        handle = await world.call(ask, CallPlan(first_lease=600))
        await world.until_started(ask)
        request_id = (await world.pending(handle)).activity_id
        await handle.cancel()
        await handle.result()
        started, canceled, completed = await decisions(caplog, "start", "cancel", "completion")
        for line in (started, canceled, completed):
            assert line["bridge.request_id"] == request_id
            assert line["bridge.key_id"] == "k1"
            assert -1 <= line["bridge.skew_s"] < 60
            assert "bridge.refused" not in line
        for line in (started, canceled):
            assert (line["bridge.caller"], line["bridge.operation"]) == (CALLER, OPERATION)
            assert line["bridge.target"] == f"probe-{ask.key}"
        assert completed["bridge.peer"] == HANDLER
        assert [line["bridge.status"] for line in (started, canceled, completed)] == [201, 202, 200]


async def test_a_refusal_is_one_line_with_its_reason(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The line of an authenticated caller names its key. The line of a stranger repeats no name that it claims."""
    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        caplog.set_level(logging.INFO)
        message = start(world, {"key": world.key(), "text": "too much"}, request_id="r-1")
        assert (await send(message, MessageSigner(world.keys.start))).status == 403
        stranger = start(world, {"key": world.key()}, request_id="r-2")
        assert (await send(stranger, MessageSigner(key_set()))).status == 401
        refused, untrusted = await decisions(caplog, "start", "start")
        assert refused["bridge.refused"] == f"{CALLER} may not ask for so much"
        assert (refused["bridge.request_id"], refused["bridge.key_id"]) == ("r-1", "k1")
        assert (refused["bridge.caller"], refused["bridge.operation"]) == (CALLER, OPERATION)
        assert "signature does not hold" in untrusted["bridge.refused"]
        assert untrusted["bridge.untrusted"] == "key"
        assert not {"bridge.caller", "bridge.key_id", "bridge.request_id"} & untrusted.keys()


async def test_a_clock_that_differs_is_seen_before_it_matters(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A message is accepted up to five minutes; its line has the difference."""
    async with running_world(server, without=("caller", "handler", "receiver")) as world:
        caplog.set_level(logging.INFO)
        clocks: list[Callable[[], float]] = [lambda: time.time() - 240, lambda: time.time() + 240]
        for clock in clocks:
            signer = MessageSigner(world.keys.start, clock=clock)
            assert (await send(start(world, {"key": world.key()}), signer)).status == 201
        behind, before = await decisions(caplog, "start", "start")
        assert 239 <= behind["bridge.skew_s"] < 300
        assert -241 <= before["bridge.skew_s"] < -180
