"""An endpoint is moved to another handler while a call runs: that handler starts and cancels nothing."""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import Client, WorkflowHandle
from temporalio.service import RPCError

import handler
from scripts.environment.server import Server, free_ports, running_server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually, handler_settings
from tests.support.targets import TARGETS, Ask, Reply
from tests.support.world import Listener, World, events

CURE = "point the endpoint's url back to the handler that started it"


class OtherHandler:
    """A handler service with the same name and keys in another namespace."""

    def __init__(self, world: World, client: Client) -> None:
        self._world = world
        self._client = client
        self.listener = Listener(free_ports(1)[0], self._make)

    def _make(self) -> Any:
        module: Any = type("served", (), {each.__name__: each for each in TARGETS})
        settings = handler_settings(
            self._world.keys,
            receiver_url=self._world.receiver.url,
            service_url=self.listener.url,
            task_queue=self._world.payment_queue,
            sweep=False,
        )
        return handler.create_app(settings, module, client=self._client, executor=self._world.executor)

    async def has_started(self, ask: Ask) -> bool:
        try:
            await self._client.get_workflow_handle(f"probe-{ask.key}").describe()
        except RPCError:
            return False
        return True

    def statuses(self, *, of_cancels: bool) -> set[int]:
        return {status for path, status in self.listener.requests if path.endswith("/cancel") == of_cancels}


@pytest_asyncio.fixture(loop_scope="session", params=["another namespace", "the same name on another cluster"])
async def other(world: World, server: Server, request: pytest.FixtureRequest) -> AsyncIterator[OtherHandler]:
    async with contextlib.AsyncExitStack() as stack:
        address, namespace = server.address, CALLER
        if request.param != "another namespace":
            cluster = await stack.enter_async_context(running_server(namespaces=[HANDLER]))
            address, namespace = cluster.address, HANDLER
        made = OtherHandler(world, await Client.connect(address, namespace=namespace))
        await made.listener.start()
        stack.push_async_callback(made.listener.stop)
        yield made


async def call_that_moves(world: World, other: OtherHandler) -> tuple[Ask, WorkflowHandle[Any, Reply]]:
    """Start a call, and restart the caller's worker with an endpoint that points to *other*."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await world.until_attempt(handle, 2)

    async def known() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads, "the 201 is not recorded yet"

    await assert_eventually(known)
    await world.stop_worker("caller")
    world.endpoint_url = other.listener.url
    await world.start_worker("caller")

    async def asked() -> None:
        assert other.statuses(of_cancels=False), "the other handler was not asked"

    await assert_eventually(asked)
    return ask, handle


async def test_the_other_handler_starts_nothing_and_the_first_handlers_callback_ends_the_call(
    world: World, other: OtherHandler, caplog: pytest.LogCaptureFixture
) -> None:
    """The renewals are answered 421. The pending activity and the log say what to do."""
    caplog.set_level(logging.WARNING, "caller.endpoint_client")
    ask, handle = await call_that_moves(world, other)

    async def shown() -> None:
        assert CURE in (await world.pending(handle)).last_failure.message

    await assert_eventually(shown)
    assert any(CURE in each.getMessage() for each in caplog.records)
    await world.target(ask).signal("say", "from the first")
    assert await handle.result() == Reply("from the first")
    assert other.statuses(of_cancels=False) == {421}
    assert await world.receiver.answered() == [200]
    assert not await other.has_started(ask)


async def test_a_cancel_at_the_other_handler_cancels_nothing(world: World, other: OtherHandler) -> None:
    """The signed 404 is final: the cancel is not repeated, and the call waits on for the first handler."""
    ask, handle = await call_that_moves(world, other)
    await handle.cancel()

    async def refused() -> None:
        assert other.statuses(of_cancels=True) == {404}

    await assert_eventually(refused)
    await world.target(ask).signal("say", "all the same")
    assert await handle.result() == Reply("all the same")
    assert [path for path, _ in other.listener.requests if path.endswith("/cancel")] == [
        f"/c/{CALLER}/ProbeService/probe/cancel"
    ]
    assert "WORKFLOW_EXECUTION_CANCEL_REQUESTED" not in await events(world.target(ask))
