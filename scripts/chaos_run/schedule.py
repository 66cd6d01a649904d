"""The plan of a chaos run, made before the run begins: which calls are made, what harm is done, and when.

Pure functions: the same seed and sizes give the same plan. The plan contains the right answer of each call.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from scripts.chaos_run.fault_proxy import Fault, FaultKind


class CallKind(str, Enum):
    """How a payment behaves."""

    AT_ONCE = "at once"
    SETTLES = "settles"
    APPROVED = "approved"
    REJECTED = "rejected"
    DECLINED = "declined"
    REFUSED = "refused"
    """The handler refuses the input. The target never runs."""
    TWICE = "twice"
    """Two calling workflows call with the same order. Both get the outcome of the one payment."""


# Orders of each kind among eighteen orders, which are twenty calls: an order of kind TWICE is two calls.
_MIX = (
    *(CallKind.AT_ONCE,) * 7,
    *(CallKind.SETTLES,) * 4,
    *(CallKind.APPROVED,) * 1,
    *(CallKind.REJECTED,) * 1,
    *(CallKind.DECLINED,) * 2,
    *(CallKind.REFUSED,) * 1,
    *(CallKind.TWICE,) * 2,
)

_AMOUNTS = {
    CallKind.AT_ONCE: 42.0,
    CallKind.SETTLES: 420.0,
    CallKind.APPROVED: 4_200.0,
    CallKind.REJECTED: 4_200.0,
    CallKind.DECLINED: 42_000.0,
    CallKind.REFUSED: -42.0,
    CallKind.TWICE: 420.0,
}

REVIEW_S = 1.0
"""Time in seconds between the start of an order and the decision of its reviewer."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call to make, by a calling workflow of its own."""

    workflow_id: str
    order_id: str
    kind: CallKind
    at: float
    """Seconds after the load began."""
    own_s: float
    """Duration of the call without harm, in seconds: the time for which the payment waits."""

    @property
    def amount(self) -> float:
        """Amount of the order, which decides how the payment behaves."""
        return _AMOUNTS[self.kind]

    @property
    def target_runs(self) -> int:
        """How often the target of its order runs."""
        return 0 if self.kind is CallKind.REFUSED else 1

    @property
    def answer(self) -> str:
        """The right answer, in the words of `verdict.answer_of`."""
        match self.kind:
            case CallKind.AT_ONCE | CallKind.SETTLES | CallKind.TWICE:
                return f"order {self.order_id}: paid, payment p-{self.order_id}"
            case CallKind.APPROVED:
                return f"order {self.order_id}: approved, payment p-{self.order_id}"
            case CallKind.REJECTED:
                return f"order {self.order_id}: PaymentRejected p-{self.order_id}"
            case CallKind.DECLINED:
                return f"order {self.order_id}: CardDeclined {self.order_id}"
            case CallKind.REFUSED:
                return "refused: the amount must be positive"


def plan_calls(seed: int, *, calls: int, seconds: float, settlement: float) -> tuple[Call, ...]:
    """*calls* calls over *seconds*, one at a random time in each of *calls* equal intervals."""
    chance = random.Random(f"{seed} calls")
    orders = enumerate(_kinds(chance))
    planned: list[Call] = []
    while len(planned) < calls:
        number, kind = next(orders)
        at = (len(planned) + chance.random()) * seconds / calls
        match kind:
            case CallKind.SETTLES | CallKind.TWICE:
                own_s = settlement
            case CallKind.APPROVED | CallKind.REJECTED:
                own_s = REVIEW_S
            case _:
                own_s = 0.0
        first = Call(workflow_id=f"order-{number}-a", order_id=str(number), kind=kind, at=at, own_s=own_s)
        planned.append(first)
        if kind is CallKind.TWICE:
            # The second call comes while the payment runs, or after it has ended.
            later = min(at + chance.uniform(0, 2 * settlement), seconds)
            left = max(0.0, at + settlement - later)
            planned.append(replace(first, workflow_id=f"order-{number}-b", at=later, own_s=left))
    return tuple(sorted(planned[:calls], key=lambda call: call.at))


def _kinds(chance: random.Random) -> Iterator[CallKind]:
    while True:
        yield from chance.sample(_MIX, k=len(_MIX))


class HarmKind(str, Enum):
    """A harm of the schedule. Faults of the network are of `FaultKind`."""

    KILL_CALLER_WORKER = "kill_caller_worker"
    KILL_RECEIVER = "kill_receiver"
    KILL_HANDLER_SERVICE = "kill_handler_service"
    KILL_HANDLER_WORKER = "kill_handler_worker"
    RESTART_SERVER = "restart_server"
    RECEIVERS_DOWN = "receivers_down"
    KILL_AT_CALLBACK = "kill_at_callback"
    """Kills every process that runs targets, after a target has closed and while its outcome is being sent."""
    MOVE_CLOCK = "move_clock"
    """Moves the clock of one of the caller's processes."""
    REFUSE_DECODES = "refuse_decodes"
    """The codec of the caller's workers refuses some of the decodes."""


VICTIMS: Mapping[HarmKind, tuple[str, str]] = {
    HarmKind.KILL_CALLER_WORKER: ("order-worker-1", "order-worker-2"),
    HarmKind.KILL_RECEIVER: ("receiver-1", "receiver-2"),
    HarmKind.KILL_HANDLER_SERVICE: ("handler-1", "handler-2"),
    HarmKind.KILL_HANDLER_WORKER: ("payment-worker-1", "payment-worker-2"),
}
"""Processes by the harm that kills one of them, named as `stack.plan` does."""
CALLER_PROCESSES = VICTIMS[HarmKind.KILL_CALLER_WORKER] + VICTIMS[HarmKind.KILL_RECEIVER]
TARGET_HOSTS = ("payment-worker-1", "payment-worker-2", "handler-1")
"""Processes that run targets, and send their outcomes."""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """One harm to be done."""

    at: float
    """Seconds after the load began."""
    kind: HarmKind
    victims: tuple[str, ...] = ()
    """Processes to kill, or whose clock is moved; empty for the server and the codec."""
    down_s: float
    """Time in seconds until they are started again, or the disturbance ends."""
    amount: float = 0.0
    """Seconds by which a clock is moved, or the share of the decodes that are refused."""


_REFUSED_SHARE, _REFUSED_S = 0.2, 10.0
_CLOCK_S = (30, 3600)
"""Least and greatest amount by which a clock is moved. Beyond five minutes the peers refuse each other's messages."""


def plan_disturbances(seed: int, *, seconds: float, times: int, clocks: bool) -> tuple[Harm, ...]:
    """*times* failures of the caller's codec over *seconds*, and if *clocks* three times as many moves of a clock."""
    chance = random.Random(f"{seed} disturbances")

    def moments(count: int) -> list[float]:
        return [(number + chance.uniform(0.1, 0.6)) * seconds / count for number in range(count)]

    harms = [
        Harm(at=at, kind=HarmKind.REFUSE_DECODES, down_s=_REFUSED_S, amount=_REFUSED_SHARE) for at in moments(times)
    ]
    for at in moments(3 * times if clocks else 0):
        ahead_s = chance.uniform(*_CLOCK_S) * chance.choice((1, -1))
        victim = (chance.choice(CALLER_PROCESSES),)
        harms.append(Harm(at=at, kind=HarmKind.MOVE_CLOCK, victims=victim, down_s=chance.uniform(3, 6), amount=ahead_s))
    return tuple(sorted(harms, key=lambda harm: harm.at))


def plan_harm(seed: int, *, kills: int, seconds: float, restarts: int, down_s: float) -> tuple[Harm, ...]:
    """*kills* kills over *seconds*, *restarts* restarts of the server, and one outage of both receivers for *down_s*.

    All processes that run targets are killed between a closing and its callback, *restarts* times too.
    """
    chance = random.Random(f"{seed} harm")
    # The outage comes early, so that the calls that it delays go on before the last harm is done.
    down_at = chance.uniform(0.15, 0.4) * seconds
    harms = [
        Harm(
            at=down_at,
            kind=HarmKind.RECEIVERS_DOWN,
            victims=VICTIMS[HarmKind.KILL_RECEIVER],
            down_s=down_s,
        )
    ]
    harms += [
        Harm(
            at=(number + chance.uniform(0.2, 0.8)) * seconds / restarts,
            kind=HarmKind.RESTART_SERVER,
            down_s=chance.uniform(1, 3),
        )
        for number in range(restarts)
    ]
    harms += [
        Harm(
            at=(number + chance.uniform(0.2, 0.8)) * seconds / restarts,
            kind=HarmKind.KILL_AT_CALLBACK,
            victims=TARGET_HOSTS,
            down_s=chance.uniform(0.2, 2),
        )
        for number in range(restarts)
    ]
    order = _victims(chance)
    for number in range(kills):
        at = (number + chance.random()) * seconds / kills
        kind, victim = next(order)
        while kind is HarmKind.KILL_RECEIVER and down_at - 1 < at < down_at + down_s + 1:
            kind, victim = next(order)
        harms.append(Harm(at=at, kind=kind, victims=(victim,), down_s=chance.uniform(0.2, 2)))
    return tuple(sorted(harms, key=lambda harm: harm.at))


def _victims(chance: random.Random) -> Iterator[tuple[HarmKind, str]]:
    """Every process equally often, in a new random order each time."""
    everyone = [(kind, name) for kind, names in VICTIMS.items() for name in names]
    while True:
        yield from chance.sample(everyone, k=len(everyone))


# Faults in every hundred requests. The other requests pass.
START_FAULTS: Mapping[FaultKind, int] = {
    FaultKind.LATENCY: 10,
    FaultKind.RESET: 3,
    FaultKind.CUT: 3,
    FaultKind.DUPLICATE: 5,
    FaultKind.REPLY_LOST: 2,
}
CALLBACK_FAULTS: Mapping[FaultKind, int] = {
    FaultKind.LATENCY: 10,
    FaultKind.RESET: 3,
    FaultKind.CUT: 3,
    FaultKind.DUPLICATE: 10,
    FaultKind.DELAY: 5,
    FaultKind.REPLY_LOST: 2,
}

_SECONDS: Mapping[FaultKind, tuple[float, float]] = {
    FaultKind.LATENCY: (0.05, 0.5),
    # Some delays are longer than the first lease, so that the renewal arrives before the callback.
    FaultKind.DELAY: (2, 7),
    FaultKind.DUPLICATE: (0, 2),
}


def plan_faults(seed: int, name: str, shares: Mapping[FaultKind, int]) -> Iterator[Fault]:
    """An endless sequence with the fault of each request. In every hundred requests each kind has its share."""
    chance = random.Random(f"{seed} {name}")
    kinds: Sequence[FaultKind] = [kind for kind, share in shares.items() for _ in range(share)]
    passing = [FaultKind.NONE] * (100 - len(kinds))
    while True:
        for kind in chance.sample([*kinds, *passing], k=100):
            first, last = _SECONDS.get(kind, (0, 0))
            # Half of the duplicates are sent at the same moment as the first request, to compete with it.
            at_once = kind is FaultKind.DUPLICATE and chance.random() < 0.5
            yield Fault(kind=kind, seconds=0.0 if at_once else chance.uniform(first, last))
