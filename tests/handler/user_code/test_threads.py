"""The threads of the team's functions: their limit, and that a caller has none but its own."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

import pytest
import pytest_asyncio
from nexusrpc.handler import StartOperationContext, service_handler, sync_operation

from bridge.errors import UnavailableError
from bridge.security.signatures import MessageSigner
from bridge.workflow.targets import external_target
from handler.user_code.threads import MAX_THREADS, BoundedThreads, CallerThreads
from scripts.environment.server import Server
from tests.support.helpers import CALLER
from tests.support.peer import Answered, send, start
from tests.support.targets import Ask, ProbeService, Reply
from tests.support.world import World, running_world


class Gate:
    """Blocks the threads of one caller's functions."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def pass_through(self, ask: Ask) -> None:
        if ask.behaviour == "block":
            self.entered.release()
            assert self.opened.wait(60)


@service_handler(name="QuoteService")
class Blocking:
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    @sync_operation
    def look_up(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        self._gate.pass_through(ask)
        return Reply(ask.text)


@pytest_asyncio.fixture(loop_scope="session")
async def blocked(server: Server) -> AsyncIterator[tuple[World, Gate]]:
    """A handler service with a second caller and its own threads."""
    gate = Gate()

    def prepare(world: World) -> None:
        world.targets = [
            external_target(
                service=ProbeService,
                operation=ProbeService.foreign,
                workflow_type="foreign-type",
                task_queue="none",
                workflow_id=lambda ask: f"blocked-{ask.key}",
                check=gate.pass_through,
            )
        ]
        world.services = [Blocking(gate)]
        world.executor = None
        settings = world.handler_settings
        callers = {**settings.callers, "other": settings.callers[CALLER]}
        world.override_handler_settings(settings.model_copy(update={"callers": callers}))

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        try:
            yield world, gate
        finally:
            gate.opened.set()


@pytest.mark.parametrize(
    ("operation", "status"),
    [("ProbeService/foreign", 201), ("QuoteService/look_up", 200)],
    ids=["check", "operation"],
)
async def test_functions_of_one_caller_take_no_thread_of_another(
    blocked: tuple[World, Gate], operation: str, status: int
) -> None:
    """All threads of one caller are blocked, and a further call of it waits. Another caller is answered."""
    world, gate = blocked

    async def ask(caller: str, behaviour: str = "") -> Answered:
        message = start(world, {"key": world.key(), "behaviour": behaviour})
        message.url = message.url.replace(f"/c/{CALLER}/ProbeService/probe", f"/c/{caller}/{operation}")
        return await send(message, MessageSigner(world.keys.start))

    waiting = [asyncio.create_task(ask(CALLER, "block")) for _ in range(MAX_THREADS + 1)]
    for _ in range(MAX_THREADS):
        assert await asyncio.to_thread(gate.entered.acquire, timeout=60)
    assert (await ask("other")).status == status
    gate.opened.set()
    await asyncio.gather(*waiting)


def test_a_place_is_free_again_however_its_call_ended() -> None:
    """The call ended with a result, with an exception, or was canceled before a thread ran it."""
    hold = threading.Event()
    with BoundedThreads(threads=1, waiting=1) as threads:
        for _ in range(3):
            first: Future[Any] = threads.submit(hold.wait, 60)
            second: Future[Any] = threads.submit(int, "no number")
            with pytest.raises(UnavailableError):
                threads.submit(int)
            assert second.cancel()
            second = threads.submit(int, "no number")
            hold.set()
            assert first.result()
            assert isinstance(second.exception(), ValueError)
            hold.clear()


def test_callers_beyond_a_hundred_share_threads() -> None:
    """Native callers may invent names, and each name must not cost a thread."""
    threads = CallerThreads(lambda: BoundedThreads(threads=1))
    assert threads["orders"] is threads["orders"]
    assert threads["orders"] is not threads["stock"]
    assert len({id(threads[f"caller-{number}"]) for number in range(500)}) == 99
    assert threads["caller-498"] is threads["caller-499"]
    assert len(threads) == 101
