"""The order team's own data. It is apart from the workflow, so that all runs share it: see docs/processes.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """What a customer ordered."""

    order_id: str
    amount: float


@dataclass(frozen=True)
class OrderReceipt:
    """What the customer gets."""

    order_id: str
    payment_id: str
    status: str
