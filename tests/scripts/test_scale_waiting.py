"""How a scale run waits: for numbers that grow, and for real sweeps."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from scripts.environment.server import Server
from scripts.scale_run.patience import NoProgressError, until_all
from scripts.scale_run.sweeps import latest_sweep, next_sweeps_ms
from tests.support.helpers import assert_eventually
from tests.support.sweeps import end_sweep, set_interval
from tests.support.world import World, running_world

INTERVAL_S = 1.0


@pytest_asyncio.fixture(loop_scope="session")
async def sweeping(server: Server) -> AsyncIterator[World]:
    """A world whose sweep comes once a second."""
    parts = ("receiver", "service", "caller")
    async with running_world(server, without=parts, prepare=lambda made: set_interval(made, INTERVAL_S)) as made:
        await made.start_sweep()
        yield made
        await end_sweep(made)


async def test_a_number_that_no_longer_grows_ends_the_run() -> None:
    """A number that grows is waited for, however slowly."""
    numbers = iter([0, 1, 2, 3, 3, 4])

    async def read() -> int:
        return next(numbers, 4)

    await until_all("renewals", 3, read, pause_s=0, patience_s=60)
    with pytest.raises(NoProgressError, match=r"^4 of 5 renewals, and no more for 0 s$"):
        await until_all("renewals", 5, read, pause_s=0.001, patience_s=0)


async def test_three_sweeps_are_three_attempts_and_none_is_read_twice(sweeping: World) -> None:
    """The sweep is read several times in each interval."""
    client, workflow_id = sweeping.handler_client, sweeping.sweep.id

    async def check() -> None:
        assert await latest_sweep(client, workflow_id) is not None

    await assert_eventually(check)
    before = await _attempt(sweeping)
    found = await next_sweeps_ms(client, workflow_id, 3, pause_s=INTERVAL_S / 10)
    after = await _attempt(sweeping)
    assert len(found) == 3
    assert after >= before + 3
    await sweeping.sweep.terminate()
    with pytest.raises(NoProgressError, match=r"^0 of 3 sweeps, and no more for 0\.5 s$"):
        await next_sweeps_ms(client, workflow_id, 3, pause_s=0.1, patience_s=0.5)
    await sweeping.start_sweep()


async def _attempt(world: World) -> int:
    activity = await world.pending(world.sweep)
    assert activity is not None
    return int(activity.attempt)
