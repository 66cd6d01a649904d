"""Durations of the example, read once from environment variables.

Workflow modules import this module past the sandbox. A changed value is safe for open runs, because Temporal compares
the commands of a replay and not the lengths of their timers and timeouts.
"""

import os
from datetime import timedelta

import bridge


def _seconds(name: str, default: float) -> timedelta:
    return timedelta(seconds=float(os.environ.get(name, default)))


SETTLEMENT = _seconds("PAYMENT_SETTLEMENT_SECONDS", 5)
"""How long a payment takes that settles after some seconds."""

ORDER_DEADLINE = _seconds("ORDER_DEADLINE_SECONDS", 30 * 24 * 3600)
"""How long an order waits for its payment. A review may take weeks."""

FIRST_LEASE = _seconds("ORDER_FIRST_LEASE_SECONDS", 30)

RENEWALS = bridge.Renewals(
    initial=_seconds("ORDER_RENEWAL_SECONDS", 60), maximum=_seconds("ORDER_RENEWAL_MAXIMUM_SECONDS", 3600)
)
