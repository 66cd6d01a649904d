"""The calls of a chaos run, planned before the run begins. Each call has its right answer.

Pure functions: the same seed and sizes give the same calls.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum


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
