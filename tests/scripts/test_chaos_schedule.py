"""The plan of a chaos run: decided by its seed alone."""

import itertools
from collections import Counter

import pytest

from examples.payments.payments import NEEDS_REVIEW, PAID_AT_ONCE, SETTLES
from scripts.chaos_run.fault_proxy import FaultKind
from scripts.chaos_run.schedule import (
    CALLBACK_FAULTS,
    CALLER_PROCESSES,
    START_FAULTS,
    VICTIMS,
    CallKind,
    HarmKind,
    plan_calls,
    plan_disturbances,
    plan_faults,
    plan_harm,
)
from scripts.environment.stack import StackOptions, plan


def test_the_same_seed_gives_the_same_plan() -> None:
    """Calls, harm and faults; another seed gives others."""

    def all_of(seed: int) -> tuple[object, ...]:
        return (
            plan_calls(seed, calls=300, seconds=60, settlement=3),
            plan_harm(seed, kills=40, seconds=60, restarts=2, down_s=11),
            list(itertools.islice(plan_faults(seed, "starts", START_FAULTS), 500)),
        )

    assert all_of(7) == all_of(7)
    for one, other in zip(all_of(7), all_of(8), strict=True):
        assert one != other


def test_of_every_hundred_callbacks_each_fault_has_its_share() -> None:
    """One in ten is sent twice, one in twenty comes late: exactly, not on average."""
    faults = plan_faults(1, "callbacks", CALLBACK_FAULTS)
    for _ in range(3):
        counts = Counter(fault.kind for fault in itertools.islice(faults, 100))
        assert counts[FaultKind.DUPLICATE] == 10
        assert counts[FaultKind.DELAY] == 5
        assert {kind: counts[kind] for kind in CALLBACK_FAULTS} == dict(CALLBACK_FAULTS)


@pytest.mark.parametrize("seed", range(20))
def test_every_process_is_killed_about_equally_often(seed: int) -> None:
    """No receiver is chosen while both are down."""
    harms = plan_harm(seed, kills=110, seconds=330, restarts=3, down_s=30)
    kills = [harm for harm in harms if harm.kind in VICTIMS]
    counts = Counter(name for harm in kills for name in harm.victims)
    assert len(kills) == sum(counts.values()) == 110
    assert set(counts) == {name for names in VICTIMS.values() for name in names}
    assert max(counts.values()) - min(counts.values()) < 7
    assert [harm.at for harm in harms] == sorted(harm.at for harm in harms)
    [outage] = [harm for harm in harms if harm.kind is HarmKind.RECEIVERS_DOWN]
    assert outage.victims == VICTIMS[HarmKind.KILL_RECEIVER]
    for harm in kills:
        assert 0 <= harm.at <= 330
        assert harm.kind is not HarmKind.KILL_RECEIVER or not outage.at <= harm.at <= outage.at + outage.down_s
    assert sum(harm.kind is HarmKind.RESTART_SERVER for harm in harms) == 3


@pytest.mark.parametrize("clocks", [True, False], ids=["with libfaketime", "without"])
def test_the_codec_and_the_clocks_are_disturbed_during_the_run(clocks: bool) -> None:
    """The disturbances do not change the other harm of a seed. Some clocks differ by more than the peers accept."""
    harms = plan_disturbances(7, seconds=360, times=3, clocks=clocks)
    assert harms == plan_disturbances(7, seconds=360, times=3, clocks=clocks)
    assert [harm.at for harm in harms] == sorted(harm.at for harm in harms)
    kinds = Counter(harm.kind for harm in harms)
    assert kinds == {HarmKind.REFUSE_DECODES: 3} | ({HarmKind.MOVE_CLOCK: 9} if clocks else {})
    moved = [harm for harm in harms if harm.kind is HarmKind.MOVE_CLOCK]
    assert all(harm.at + harm.down_s < 360 and set(harm.victims) <= set(CALLER_PROCESSES) for harm in moved)
    assert not clocks or max(abs(harm.amount) for harm in moved) > 300


def test_the_victims_are_processes_of_the_stack() -> None:
    """Named as the stack names them where there are two of each."""
    options = StackOptions(receivers=2, handlers=2, order_workers=2, payment_workers=2, separate=True)
    assert {name for names in VICTIMS.values() for name in names} == set(plan(options))


def test_every_call_has_an_answer_of_its_own() -> None:
    """All kinds occur; no two orders share an answer, but for those that are refused; an order asked for twice does."""
    calls = plan_calls(3, calls=400, seconds=60, settlement=3)
    assert len({call.workflow_id for call in calls}) == len(calls) == 400
    assert {call.kind for call in calls} == set(CallKind)
    answers: dict[str, set[str]] = {}
    for call in calls:
        assert 0 <= call.at <= 60
        assert 0 <= call.own_s <= 3
        if call.kind is not CallKind.REFUSED:
            answers.setdefault(call.answer, set()).add(call.order_id)
    assert all(len(orders) == 1 for orders in answers.values())
    asked = Counter(call.order_id for call in calls if call.kind is CallKind.TWICE)
    assert set(asked.values()) == {2}


def test_the_amounts_lead_to_the_payments_behaviour() -> None:
    """The bounds are the example's."""
    amounts = {call.kind: call.amount for call in plan_calls(3, calls=400, seconds=60, settlement=3)}
    assert amounts[CallKind.REFUSED] < 0 < amounts[CallKind.AT_ONCE] <= PAID_AT_ONCE
    assert PAID_AT_ONCE < amounts[CallKind.SETTLES] == amounts[CallKind.TWICE] <= SETTLES
    assert SETTLES < amounts[CallKind.APPROVED] == amounts[CallKind.REJECTED] <= NEEDS_REVIEW
    assert amounts[CallKind.DECLINED] > NEEDS_REVIEW
