"""Handlers that the tests of this folder share."""

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from scripts.environment.server import Server
from tests.support.world import World, running_world


@pytest_asyncio.fixture(loop_scope="session", scope="module", params=["", "/bridge"], ids=["alone", "mounted"])
async def quiet(server: Server, request: Any) -> AsyncIterator[World]:
    """A handler without workers, so that started runs make no progress."""
    async with running_world(server, without=("caller", "handler", "receiver"), mount=request.param) as made:
        yield made
