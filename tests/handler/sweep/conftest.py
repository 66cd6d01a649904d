"""A world that is swept often."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

import handler.sweep.activity
import handler.sweep.place
from handler.delivery.close_event import read_run
from scripts.environment.server import Server
from tests.support.sweeps import end_sweep, hasten
from tests.support.world import World, running_world


@pytest_asyncio.fixture(loop_scope="session", name="swept")
async def swept_world(server: Server) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(running_world(server, prepare=hasten))
        stack.push_async_callback(end_sweep, world)
        await world.start_sweep()
        yield world


@pytest.fixture(name="looks")
def counted_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the ids of the runs that the sweep reads."""
    read: list[str] = []

    async def counting(client: Any, workflow_id: str, run_id: str) -> Any:
        read.append(run_id)
        return await read_run(client, workflow_id, run_id)

    monkeypatch.setattr(handler.sweep.activity, "read_run", counting)
    return read
