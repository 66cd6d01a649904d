"""The harm of a chaos run, planned before the run begins: what is done, to which process, and when.

Pure functions: the same seed and sizes give the same harm.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from scripts.chaos_run.fault_proxy import OWN_ANSWERS, Fault, FaultKind
from scripts.environment.production_server import DATABASE, NODES
from scripts.environment.server import DEV_SERVER


class HarmKind(str, Enum):
    """A harm of the schedule. Faults of the network are of `FaultKind`."""

    KILL_CALLER_WORKER = "kill_caller_worker"
    KILL_RECEIVER = "kill_receiver"
    KILL_HANDLER_SERVICE = "kill_handler_service"
    KILL_HANDLER_WORKER = "kill_handler_worker"
    RESTART_SERVER = "restart_server"
    """Kills the dev server."""
    KILL_SERVER_NODE = "kill_server_node"
    """Kills one of the nodes of production's server."""
    KILL_DATABASE = "kill_database"
    """Kills the PostgreSQL of production's server."""
    RECEIVERS_DOWN = "receivers_down"
    KILL_AT_CALLBACK = "kill_at_callback"
    """Kills every process that runs targets, after a target has closed and while its outcome is being sent."""
    MOVE_CLOCK = "move_clock"
    """Moves the clock of one process."""
    REFUSE_DECODES = "refuse_decodes"
    """The codec of the caller's workers refuses some of the decodes."""
    FILL_DISK = "fill_disk"
    """One process cannot write: the disk of its log and its temporary files is full."""
    ROTATE_KEYS = "rotate_keys"
    """Start keys and completion keys are replaced by new ones while both sides use them."""
    REMOVE_PLUGIN = "remove_plugin"
    """A payment worker is stopped in order and runs without its plugin for a time."""


VICTIMS: Mapping[HarmKind, tuple[str, str]] = {
    HarmKind.KILL_CALLER_WORKER: ("order-worker-1", "order-worker-2"),
    HarmKind.KILL_RECEIVER: ("receiver-1", "receiver-2"),
    HarmKind.KILL_HANDLER_SERVICE: ("handler-1", "handler-2"),
    HarmKind.KILL_HANDLER_WORKER: ("payment-worker-1", "payment-worker-2"),
}
"""Processes by the harm that kills one of them, named as `stack.plan` does."""
SERVER_PARTS: Mapping[HarmKind, tuple[str, ...]] = {
    HarmKind.RESTART_SERVER: (DEV_SERVER,),
    HarmKind.KILL_SERVER_NODE: NODES,
    HarmKind.KILL_DATABASE: (DATABASE,),
}
"""Parts of a Temporal server by the harm that kills one of them. No server has all of them."""
PROCESSES = tuple(name for names in VICTIMS.values() for name in names)
CALLER_PROCESSES = VICTIMS[HarmKind.KILL_CALLER_WORKER] + VICTIMS[HarmKind.KILL_RECEIVER]
TARGET_HOSTS = ("payment-worker-1", "payment-worker-2", "handler-1")
"""Processes that run targets, and send their outcomes."""

ROUND_S = 120.0
"""Length of a round in seconds: every kind of harm is done in every round."""

_IN_A_ROUND: Mapping[HarmKind, int] = {
    HarmKind.RESTART_SERVER: 1,
    HarmKind.KILL_SERVER_NODE: 2,
    HarmKind.KILL_DATABASE: 1,
    HarmKind.KILL_AT_CALLBACK: 1,
    HarmKind.REFUSE_DECODES: 1,
    HarmKind.MOVE_CLOCK: 4,
    HarmKind.FILL_DISK: 2,
    HarmKind.ROTATE_KEYS: 1,
    HarmKind.REMOVE_PLUGIN: 1,
}
_REFUSED_SHARE, _REFUSED_S = 0.2, 10.0
_ACCEPTED_JUMP_S = 120.0
"""Seconds by which the clock of any process jumps. The peers accept a difference of five minutes."""
_REFUSED_JUMP_S = (30, 3600)
"""Least and greatest amount by which a clock of the caller's side is moved. The peers refuse most of it."""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """One harm to be done."""

    at: float
    """Seconds after the load began."""
    kind: HarmKind
    victims: tuple[str, ...] = ()
    """The processes or parts of the server that are harmed; empty for the codec and the keys."""
    down_s: float
    """Time in seconds until they are started again, or the disturbance ends. For keys: the pause between two steps."""
    amount: float = 0.0
    """Seconds by which a clock is moved, or the share of the decodes that are refused."""


def plan_harm(seed: int, *, kills: int, seconds: float, down_s: float) -> tuple[Harm, ...]:
    """*kills* kills over *seconds*, one outage of both receivers for *down_s*, and every other harm in each round.

    A run that is shorter than a round has one round.
    """
    chance = random.Random(f"{seed} harm")
    # The outage comes early, so that the calls that it delays go on before the last harm is done.
    receivers = VICTIMS[HarmKind.KILL_RECEIVER]
    down_at = chance.uniform(0.15, 0.4) * seconds
    harms = [Harm(at=down_at, kind=HarmKind.RECEIVERS_DOWN, victims=receivers, down_s=down_s)]
    order = _victims(chance)
    for number in range(kills):
        at = (number + chance.random()) * seconds / kills
        kind, victim = next(order)
        while kind is HarmKind.KILL_RECEIVER and down_at - 1 < at < down_at + down_s + 1:
            kind, victim = next(order)
        harms.append(Harm(at=at, kind=kind, victims=(victim,), down_s=chance.uniform(0.2, 2)))
    rounds = max(1, round(seconds / ROUND_S))
    for kind, times in _IN_A_ROUND.items():
        # Each kind has its own chance, so that a kind that is left out does not change the others.
        chance = random.Random(f"{seed} {kind.value}")
        every = seconds / rounds / times
        harms += [_disturbance(kind, number, every, chance) for number in range(rounds * times)]
    return tuple(sorted(harms, key=lambda harm: harm.at))


def _disturbance(kind: HarmKind, number: int, every: float, chance: random.Random) -> Harm:
    """The harm that is done in the interval *number* of *every* seconds, in its first two thirds."""
    at = (number + chance.uniform(0.1, 0.65)) * every
    match kind:
        case HarmKind.REFUSE_DECODES:
            return Harm(at=at, kind=kind, down_s=_REFUSED_S, amount=_REFUSED_SHARE)
        case HarmKind.KILL_AT_CALLBACK:
            return Harm(at=at, kind=kind, victims=TARGET_HOSTS, down_s=chance.uniform(0.2, 2))
        case HarmKind.MOVE_CLOCK:
            is_accepted = number % 2 == 0
            victim = chance.choice(PROCESSES if is_accepted else CALLER_PROCESSES)
            by_s = _ACCEPTED_JUMP_S if is_accepted else chance.uniform(*_REFUSED_JUMP_S)
            return Harm(
                at=at,
                kind=kind,
                victims=(victim,),
                down_s=chance.uniform(3, 6),
                amount=by_s * chance.choice((1, -1)),
            )
        case HarmKind.FILL_DISK:
            return Harm(at=at, kind=kind, victims=(chance.choice(PROCESSES),), down_s=chance.uniform(3, 6))
        case HarmKind.ROTATE_KEYS:
            return Harm(at=at, kind=kind, down_s=chance.uniform(2, 4))
        case HarmKind.REMOVE_PLUGIN:
            victim = chance.choice(VICTIMS[HarmKind.KILL_HANDLER_WORKER])
            return Harm(at=at, kind=kind, victims=(victim,), down_s=chance.uniform(0.15, 0.25) * every)
        case _:
            parts = SERVER_PARTS[kind]
            return Harm(at=at, kind=kind, victims=(parts[number % len(parts)],), down_s=chance.uniform(1, 3))


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
    FaultKind.MAINTENANCE: 2,
    FaultKind.NOT_FOUND: 2,
    FaultKind.BAD_GATEWAY: 2,
}
CALLBACK_FAULTS: Mapping[FaultKind, int] = {
    FaultKind.LATENCY: 10,
    FaultKind.RESET: 3,
    FaultKind.CUT: 3,
    FaultKind.DUPLICATE: 10,
    FaultKind.DELAY: 5,
    FaultKind.REPLY_LOST: 2,
    FaultKind.MAINTENANCE: 2,
    FaultKind.NOT_FOUND: 2,
    FaultKind.BAD_GATEWAY: 2,
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
            is_forwarded = kind in OWN_ANSWERS and chance.random() < 0.5
            yield Fault(kind=kind, seconds=0.0 if at_once else chance.uniform(first, last), is_forwarded=is_forwarded)
