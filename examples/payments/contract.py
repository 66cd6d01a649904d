"""The contract: shared by both teams, the same type that Temporal Nexus uses."""

from dataclasses import dataclass

import nexusrpc


@dataclass(frozen=True)
class PaymentRequest:
    """What the order team asks for."""

    order_id: str
    amount: float


@dataclass(frozen=True)
class PaymentResponse:
    """What the payment team answers."""

    payment_id: str
    status: str


@nexusrpc.service
class PaymentService:
    """The payment team's operations."""

    process: nexusrpc.Operation[PaymentRequest, PaymentResponse]
