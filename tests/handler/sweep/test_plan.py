"""What a sweep looks for, and how far it has come."""

from collections.abc import Iterable
from datetime import timedelta

import pytest

import bridge
from bridge.workflow.targets import Target, Targets
from handler.delivery.records import milliseconds
from handler.sweep.place import SweepPlace
from handler.sweep.plan import SweepPlan, sweep_plans
from tests.support.helpers import assert_eventually
from tests.support.targets import (
    ProbeService,
    ProbeWorkflow,
)
from tests.support.world import World, clock


def named(name: str, queue: str) -> Target:
    return bridge.external_target(
        service=ProbeService,
        operation=ProbeService.foreign,
        workflow_type=name,
        workflow_id=lambda ask: ask.key,
        task_queue=queue,
    )


def plans_of(targets: Iterable[Target], *, is_renewed: bool = True) -> dict[str, SweepPlan]:
    return sweep_plans(targets, task_queue="queue", interval_s=1, is_renewed=lambda _: is_renewed)


async def test_a_name_with_a_quote_can_be_asked_for(world: World) -> None:
    """The sweep builds the query, but teams choose the names."""
    target = named("it's -- größer; 100%", f"odd'{world.id}")
    handle = await world.handler_client.start_workflow(
        target.workflow_type, id=world.key(), task_queue=target.task_queue or ""
    )
    await handle.terminate()

    async def found() -> None:
        [plan] = plans_of([target]).values()
        assert [each.id async for each in world.handler_client.list_workflows(plan.query)] == [handle.id]

    await assert_eventually(found)


@pytest.mark.parametrize("name", ['say "x"', "back\\slash", "new\nline"])
def test_a_name_that_no_query_finds_is_refused(name: str) -> None:
    """Otherwise its outcomes would never be delivered, without an error."""
    for target in (named(name, "queue"), named("fine", name)):
        with pytest.raises(ValueError, match="set sweep = false"):
            plans_of([target])


def test_each_target_is_swept_for_what_no_worker_delivers() -> None:
    """If several operations have the same workflow, the widest query applies."""
    forced = "AND ExecutionStatus IN ('Terminated', 'TimedOut')"
    every = "AND ExecutionStatus IN ('Canceled', 'Completed', 'Failed', 'Terminated', 'TimedOut')"
    [probe] = Targets([ProbeWorkflow])
    elsewhere = named("ProbeWorkflow", "queue")
    names = "TaskQueue = 'queue' AND WorkflowType = 'ProbeWorkflow'"
    [name] = plans_of([probe])
    assert name == "bridge-sweep:queue:ProbeWorkflow"
    assert plans_of([probe])[name].query == f"{names} {forced}"
    assert plans_of([probe], is_renewed=False)[name].query == f"{names} {every}"
    for targets in ([probe, elsewhere], [elsewhere, probe]):
        assert plans_of(targets)[name] == SweepPlan(query=f"{names} {every}", is_instrumented=False, interval_s=1)


def test_targets_whose_names_look_alike_have_a_sweep_each() -> None:
    """A sweep that exists already is not started again. The other target's outcomes would never be delivered."""
    on_a = plans_of([named("b-c", "queue"), named("c", "b"), named("queue", "b"), named("c", "b:c"), named("c:c", "b")])
    assert len(on_a) == 5
    assert len(plans_of([named("c", "b%3Ac"), named("c", "b:c")])) == 2


def test_a_place_forgets_what_is_outside_its_window() -> None:
    """A place never grows too large to be recorded."""
    now = milliseconds(clock())
    minute = 60_000
    place = SweepPlace(until_ms=now, handled={"old": now - 3 * minute, "young": now - minute})
    assert place.trimmed().handled == {"young": now - minute}
    full = SweepPlace(until_ms=now, handled={str(index): now - minute + index for index in range(9000)}).trimmed()
    assert len(full.handled) == 5000
    assert min(full.handled.values()) == now - minute + 4000


def test_a_place_never_moves_back() -> None:
    """An attempt may have been scheduled before the previous attempt recorded its place."""
    now = clock()
    place = SweepPlace(until_ms=milliseconds(now) + 5)
    assert place.moved_to(now, {}) == place


def test_a_run_that_cannot_be_read_stays_in_the_query() -> None:
    """The query asks for it by its id. If more than a hundred cannot be read, the query goes back to all of them."""
    now = clock()
    place = SweepPlace(until_ms=milliseconds(now))
    moved = place.moved_to(now + timedelta(hours=1), {"b": 2, "a": 1})
    assert moved.until_ms == place.until_ms + 3_600_000
    assert moved.query.endswith(" OR RunId IN ('a', 'b'))")
    assert (moved.earliest_ms, place.earliest_ms) == (1, place.until_ms)
    assert SweepPlace.read(moved.text) == moved
    many = place.moved_to(now + timedelta(hours=1), {str(index): index for index in range(102, 0, -1)})
    assert many.until_ms == place.until_ms
    assert list(many.unread.values()) == list(range(1, 101))
    assert "RunId" not in many.moved_to(now, {}).query
