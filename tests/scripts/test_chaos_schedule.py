"""The plan of a chaos run: decided by its seed alone."""

import itertools
from collections import Counter

import pytest

from examples.payments.payments import NEEDS_REVIEW, PAID_AT_ONCE, SETTLES
from scripts.chaos_run.calls import CallKind, plan_calls
from scripts.chaos_run.fault_proxy import OWN_ANSWERS, FaultKind
from scripts.chaos_run.schedule import (
    CALLBACK_FAULTS,
    CALLER_PROCESSES,
    PROCESSES,
    SERVER_PARTS,
    START_FAULTS,
    TARGET_HOSTS,
    VICTIMS,
    HarmKind,
    plan_faults,
    plan_harm,
)
from scripts.environment.production_server import DATABASE, NODES
from scripts.environment.server import DEV_SERVER
from scripts.environment.stack import StackOptions, plan


def test_the_same_seed_gives_the_same_plan() -> None:
    """Calls, harm and faults; another seed gives others."""

    def all_of(seed: int) -> tuple[object, ...]:
        return (
            plan_calls(seed, calls=300, seconds=60, settlement=3),
            plan_harm(seed, kills=40, seconds=60, down_s=11),
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


def test_the_proxy_answers_by_itself_with_and_without_the_request_having_arrived() -> None:
    """Both occur for each answer, and no other fault has the choice."""
    faults = list(itertools.islice(plan_faults(1, "starts", START_FAULTS), 2_000))
    for kind in OWN_ANSWERS:
        assert {fault.is_forwarded for fault in faults if fault.kind is kind} == {True, False}
    assert not any(fault.is_forwarded for fault in faults if fault.kind not in OWN_ANSWERS)


@pytest.mark.parametrize("seed", range(20))
def test_every_process_is_killed_about_equally_often(seed: int) -> None:
    """No receiver is chosen while both are down."""
    harms = plan_harm(seed, kills=110, seconds=330, down_s=30)
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


@pytest.mark.parametrize(("seconds", "rounds"), [(30, 1), (360, 3), (3_200, 27)])
def test_every_kind_of_harm_is_done_in_every_round(seconds: float, rounds: int) -> None:
    """The numbers grow with the length of the run, and all harm ends with it."""
    harms = plan_harm(7, kills=20, seconds=seconds, down_s=11)
    counts = Counter(harm.kind for harm in harms if harm.kind not in VICTIMS)
    assert counts == {
        HarmKind.RECEIVERS_DOWN: 1,
        HarmKind.RESTART_SERVER: rounds,
        HarmKind.KILL_SERVER_NODE: 2 * rounds,
        HarmKind.KILL_DATABASE: rounds,
        HarmKind.KILL_AT_CALLBACK: rounds,
        HarmKind.REFUSE_DECODES: rounds,
        HarmKind.MOVE_CLOCK: 4 * rounds,
        HarmKind.FILL_DISK: 2 * rounds,
        HarmKind.ROTATE_KEYS: rounds,
        HarmKind.REMOVE_PLUGIN: rounds,
    }
    for harm in harms:
        assert 0 <= harm.at < seconds
        assert set(harm.victims) <= set(SERVER_PARTS.get(harm.kind, PROCESSES))
        # Another worker always has the plugin, so that the sweep runs.
        assert harm.kind is not HarmKind.REMOVE_PLUGIN or len({*harm.victims} & {*TARGET_HOSTS}) == 1


def test_the_clocks_jump_by_what_the_peers_accept_and_by_more() -> None:
    """By two minutes on both sides; on the caller's side also beyond the five minutes that a peer accepts."""
    moved = [harm for harm in plan_harm(7, kills=1, seconds=3_200, down_s=11) if harm.kind is HarmKind.MOVE_CLOCK]
    jumps = [harm for harm in moved if abs(harm.amount) == 120]
    assert {harm.amount for harm in jumps} == {120, -120}
    assert {name for harm in jumps for name in harm.victims} == set(PROCESSES)
    others = [harm for harm in moved if harm not in jumps]
    assert len(others) == len(jumps)
    assert {name for harm in others for name in harm.victims} == set(CALLER_PROCESSES)
    assert min(harm.amount for harm in others) < -300
    assert max(harm.amount for harm in others) > 300


def test_every_part_of_a_server_is_killed_equally_often() -> None:
    """The nodes of production's server take turns, so that a run of one round kills each of them."""
    killed = [harm for harm in plan_harm(7, kills=20, seconds=360, down_s=11) if harm.kind in SERVER_PARTS]
    assert Counter(name for harm in killed for name in harm.victims) == dict.fromkeys((DEV_SERVER, DATABASE, *NODES), 3)
    assert all(set(harm.victims) <= set(SERVER_PARTS[harm.kind]) and harm.down_s > 0 for harm in killed)


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
