"""The sweep delivers to attached calls that no worker serves."""

from collections.abc import Sequence

import pytest
from aiohttp import web
from temporalio.api.common.v1 import Payload
from temporalio.exceptions import (
    TerminatedError,
)

from bridge.protocol.payload import encode_payload
from bridge.security.signatures import MessageSigner
from handler.delivery import close_reporter, dispatcher
from scripts.environment.server import Server
from tests.support.calling_workflows import failure_of
from tests.support.codec import Scrambler
from tests.support.helpers import assert_eventually
from tests.support.peer import send, start
from tests.support.sweeps import (
    LONG,
    end_sweep,
    place,
    swept_on,
)
from tests.support.targets import (
    Ask,
    ProbeWorkflow,
)
from tests.support.world import World, events, running_world, with_codec


class Failing(Scrambler):
    """Cannot decode what holds one of some texts."""

    def __init__(self) -> None:
        self.undecodable: set[bytes] = set()

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        decoded = await super().decode(payloads)
        if any(text in each.data for each in decoded for text in self.undecodable):
            message = "the key is unavailable"
            raise RuntimeError(message)
        return decoded


async def test_the_sweep_delivers_to_the_attached_calls_that_the_worker_did_not_keep(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy of the service counts for itself, so that a run may have more calls than its worker keeps."""
    monkeypatch.setattr(close_reporter, "MAX_ATTACHED", 1)
    monkeypatch.setattr(dispatcher, "MAX_ATTACHED", 1)

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    async with running_world(server, without=("caller",), prepare=prepare) as world:
        got: list[str] = []

        async def take(request: web.Request) -> web.StreamResponse:
            got.append(request.path[-1])
            return world.signed_response(request, 200)

        world.receiver.before = take
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="wait")
        for number in range(4):
            message = start(world, {"key": ask.key, "behaviour": "wait"}, request_id=f"{number}-{world.id}")
            message.url = message.url.replace("c" * 22, "c" * 21 + str(number))
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        await (await world.until_started(ask)).signal("say", "done")

        async def delivered() -> None:
            assert set(got) == set("0123")

        await assert_eventually(delivered)
        await swept_on(world)
        assert sorted(got) == list("0123")
        await end_sweep(world)


async def test_an_attached_call_that_the_codec_cannot_decode_is_kept_until_it_can(server: Server) -> None:
    """The codec decodes the memo of the run. The first call gets the outcome at once, the attached one later."""
    codec = Failing()

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    converters = (with_codec(codec), with_codec(codec))
    async with running_world(server, without=("caller",), converters=converters, prepare=prepare) as world:
        got: list[str] = []

        async def take(request: web.Request) -> web.StreamResponse:
            got.append(request.headers["Nexus-Operation-State"])
            return world.signed_response(request, 200)

        world.receiver.before = take
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="wait")
        [encoded] = await with_codec(codec).encode([ask])
        for request_id in ("first", "second"):
            message = start(world, {}, request_id=f"{request_id}-{world.id}")
            headers, message.body = encode_payload(encoded)
            message.headers.update(headers)
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        codec.undecodable.add(f"second-{world.id}".encode())
        target = await world.until_started(ask)
        run_id = (await target.describe()).run_id
        await target.terminate()

        async def kept() -> None:
            assert set((await place(world))["unread"]) == {run_id}

        await assert_eventually(kept)
        await swept_on(world)
        assert got == ["failed"]
        codec.undecodable.clear()

        async def delivered() -> None:
            assert got == ["failed"] * 2
            assert set((await place(world))["handled"]) == {run_id}

        await assert_eventually(delivered)
        await end_sweep(world)


async def test_an_attached_call_is_swept_through_a_codec_after_continue_as_new(server: Server) -> None:
    """By default the SDK encodes no headers, and a header carries the attached call to the next run."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.targets = [ProbeWorkflow]

    converters = (with_codec(Scrambler()), with_codec(Scrambler()))
    async with running_world(server, converters=converters, prepare=prepare) as world:
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="continue on signal")
        calls = [await world.call(ask, LONG) for _ in range(2)]
        target = await world.until_started(ask)

        async def attached() -> None:
            assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

        await assert_eventually(attached)
        await target.signal("say", "and wait")

        async def continued() -> None:
            assert (await events(target))[-1] == "WORKFLOW_TASK_COMPLETED"
            assert "WORKFLOW_EXECUTION_SIGNALED" not in await events(target)

        await assert_eventually(continued)
        await target.terminate()
        assert [type(await failure_of(each)) for each in calls] == [TerminatedError] * 2
        await end_sweep(world)
