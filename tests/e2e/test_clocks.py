"""The clock of a caller's worker: it shortens no call and delays no renewal."""

from datetime import UTC, datetime, timedelta

import pytest

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import scheduled
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world


@pytest.mark.parametrize("seconds", [-3600, -7, 7, 3600])
async def test_a_workers_clock_shortens_no_call(server: Server, seconds: int) -> None:
    """The worker's clock is behind or ahead, also by more than the deadline: the server's clock counts."""

    def prepare(world: World) -> None:
        world.caller_clock = lambda: datetime.now(UTC) + timedelta(seconds=seconds)

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=3600, deadline=20))
        target = await world.until_started(ask)
        await world.until_attempt(handle, 3)
        await target.signal("say", "in time")
        assert await handle.result() == Reply("in time")
        assert len(await scheduled(handle)) == 1


@pytest.mark.parametrize("seconds", [-3600, 3600])
async def test_a_clock_that_is_set_while_an_attempt_waits_delays_no_renewal(server: Server, seconds: int) -> None:
    """As when a machine resumes, or its clock is corrected: the time of an attempt does not follow the clock."""
    ahead = timedelta(0)

    def prepare(world: World) -> None:
        world.caller_clock = lambda: datetime.now(UTC) + ahead

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(world.key(), "wait")
        handle = await world.call(ask, CallPlan(first_lease=4, renewal=1, deadline=7200))
        target = await world.until_started(ask)

        async def recorded() -> None:
            assert (await world.pending(handle)).heartbeat_details.payloads, "the attempt waits from then on"

        await assert_eventually(recorded)
        ahead = timedelta(seconds=seconds)
        await world.until_attempt(handle, 3)
        await target.signal("say", "in time")
        assert await handle.result() == Reply("in time")


async def test_a_clock_that_differs_is_reported_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The report names the remedy."""

    def prepare(world: World) -> None:
        world.caller_clock = lambda: datetime.now(UTC) + timedelta(seconds=100)

    async with running_world(server, prepare=prepare) as world:
        for _ in range(2):
            assert await (await world.call(Ask(world.key(), text="paid"))).result() == Reply("paid")
    [record] = [each for each in caplog.records if each.message.startswith("bridge.clock_differs")]
    assert "100 s ahead" in record.message
    assert "Synchronize" in record.message
