"""A contract of pydantic models, and workflows on both sides of it, in and outside the sandbox."""

from datetime import datetime
from decimal import Decimal

import nexusrpc
from temporalio import workflow

import bridge

with workflow.unsafe.imports_passed_through():
    from pydantic import BaseModel


class Payment(BaseModel):
    key: str
    amount: Decimal
    due: datetime
    note: str


class Receipt(BaseModel):
    amount: Decimal
    due: datetime
    note: str


@nexusrpc.service
class Payments:
    pay: nexusrpc.Operation[Payment, Receipt]


@bridge.emits_callback(service=Payments, operation=Payments.pay, workflow_id=lambda payment: f"pay-{payment.key}")
@workflow.defn(sandboxed=False, failure_exception_types=[ValueError])
class PayWorkflow:
    @workflow.run
    async def run(self, payment: Payment) -> Receipt:
        if payment.amount < 0:
            message = "a negative amount"
            raise ValueError(message)
        return Receipt(amount=payment.amount, due=payment.due, note=payment.note)


class _Ordering:
    async def pay(self, payment: Payment) -> Receipt:
        return await bridge.create_client(service=Payments, endpoint="payments").execute_operation(
            Payments.pay, payment
        )


@workflow.defn(failure_exception_types=[KeyError])
class SandboxedOrder(_Ordering):
    @workflow.run
    async def run(self, payment: Payment) -> Receipt:
        return await self.pay(payment)


@workflow.defn(sandboxed=False, failure_exception_types=[Exception])
class UnsandboxedOrder(_Ordering):
    @workflow.run
    async def run(self, payment: Payment) -> Receipt:
        return await self.pay(payment)
