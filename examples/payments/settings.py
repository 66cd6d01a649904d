"""What one deployment of the example sets, from its environment, read once.

Workflow modules import it past the sandbox. A changed value is safe for runs under way: Temporal compares which
commands a replay gives, not how long their timers and timeouts are.
"""

import os
from datetime import timedelta

import bridge


def _seconds(name: str, default: float) -> timedelta:
    return timedelta(seconds=float(os.environ.get(name, default)))


SETTLEMENT = _seconds("PAYMENT_SETTLEMENT_SECONDS", 5)
"""How long a payment of the middle kind takes."""

ORDER_DEADLINE = _seconds("ORDER_DEADLINE_SECONDS", 30 * 24 * 3600)
"""How long an order waits for its payment; a review may take weeks."""

FIRST_LEASE = _seconds("ORDER_FIRST_LEASE_SECONDS", 30)

RENEWALS = bridge.Renewals(
    initial=_seconds("ORDER_RENEWAL_SECONDS", 60), maximum=_seconds("ORDER_RENEWAL_MAXIMUM_SECONDS", 3600)
)
