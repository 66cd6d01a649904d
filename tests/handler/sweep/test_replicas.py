"""Several handler services: whose sweep runs, and with which plan."""

import asyncio
import json
from typing import Any

from temporalio.exceptions import (
    TerminatedError,
)

from handler.delivery.records import milliseconds
from scripts.environment.server import Server
from tests.support.calling_workflows import failure_of
from tests.support.helpers import assert_eventually
from tests.support.sweeps import (
    FLAKY,
    assert_delivered_once,
    end_sweep,
    hasten,
    place,
    runs_of_sweep,
    set_interval,
    swept_on,
    terminated,
)
from tests.support.targets import (
    Ask,
    FlakyWorkflow,
    ProbeWorkflow,
)
from tests.support.world import World, events, running_world


async def test_replicas_share_one_sweep(swept: World, looks: list[str]) -> None:
    """Any number of replicas may start it, at once or later. Its history stays at five events."""
    await asyncio.gather(*(swept.start_sweep() for _ in range(4)))
    ask = Ask(key=swept.key(), behaviour="wait")
    await failure_of(await terminated(swept, ask))
    await swept.start_sweep()
    await assert_delivered_once(swept, ask)
    assert len(await runs_of_sweep(swept)) == 1
    assert len(await events(swept.sweep)) == 5
    assert len(looks) == 1


async def test_replicas_that_start_together_make_one_sweep(server: Server) -> None:
    """Each replica finds no sweep, and all start the same one."""
    async with running_world(server, prepare=hasten) as world:
        await asyncio.gather(*(world.start_sweep() for _ in range(4)))
        await swept_on(world)
        assert len(await runs_of_sweep(world)) == 1
        await end_sweep(world)


async def test_a_sweep_with_another_plan_goes_on_where_the_old_one_was(swept: World, looks: list[str]) -> None:
    """The new sweep misses no outcome and repeats no delivery."""
    first = Ask(key=swept.key(), behaviour="wait")
    await failure_of(await terminated(swept, first))

    async def recorded() -> dict[str, Any]:
        found = await place(swept)
        assert looks[0] in found["handled"]
        return found

    old = await assert_eventually(recorded)
    await swept.stop_worker("handler")
    set_interval(swept, 0.3)
    await swept.start_sweep()
    plan = (await swept.sweep.fetch_history()).events[0].workflow_execution_started_event_attributes.input
    assert json.loads(plan.payloads[0].data)["since_ms"] >= old["until_ms"]
    await swept.start_worker("handler")
    await swept_on(swept)
    assert len(await runs_of_sweep(swept)) == 2
    # A new sweep does not know which runs the old one handled. The receiver recognizes the repeat.
    assert await swept.receiver.answered() == [200, 200]


async def test_two_handlers_with_different_targets_on_one_queue_are_both_swept(server: Server) -> None:
    """This holds even if an old replica with fewer targets restarts during a deploy."""
    async with running_world(server, prepare=hasten) as world:
        new, old = world.targets, [FlakyWorkflow]
        for targets in (new, old):
            world.targets = list(targets)
            await world.start_sweep()
        ask, flaky = (Ask(key=world.key(), behaviour="wait") for _ in range(2))
        assert isinstance(await failure_of(await terminated(world, ask)), TerminatedError)
        assert isinstance(await failure_of(await terminated(world, flaky, FLAKY)), TerminatedError)
        world.targets = new
        await end_sweep(world)


async def test_a_handler_whose_callers_all_renew_takes_no_sweep_from_one_whose_callers_do_not(server: Server) -> None:
    """Two services with different callers serve the same targets. The last one that starts needs the sweep less."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.targets = [ProbeWorkflow]

    async with running_world(server, prepare=prepare) as world:
        for renews in (False, True):
            world.peer_options = {"renews": renews}
            await world.start_sweep()
        plan = (await world.sweep.fetch_history()).events[0].workflow_execution_started_event_attributes.input
        assert "Completed" in json.loads(plan.payloads[0].data)["query"]
        await end_sweep(world)


async def test_a_sweep_that_replaces_one_that_never_ran_begins_where_that_one_would_have(server: Server) -> None:
    """The service was started with three intervals before any worker. Meanwhile runs may close that it must look at."""
    async with running_world(server, prepare=hasten, without=("handler",)) as world:
        await world.start_sweep()
        first = (await world.sweep.describe()).start_time
        for seconds in (0.3, 0.4):
            set_interval(world, seconds)
            await world.start_sweep()
        plan = (await world.sweep.fetch_history()).events[0].workflow_execution_started_event_attributes.input
        assert json.loads(plan.payloads[0].data)["since_ms"] == milliseconds(first)
        await end_sweep(world)
