"""A target that returns its input byte for byte, and workflows that call it."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum

import nexusrpc
from nexusrpc import HandlerError
from pydantic import BaseModel
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError, NexusOperationError

import bridge
from bridge.workflow.call import Transport

SHORT = b"please be short"
"""Begins the data of a payload that the target shall not return."""
FAILS = b"please fail"
"""Marks the data of a payload that the target shall return as the detail of a failure."""


class Currency(Enum):
    EUR = "eur"


class Line(BaseModel):
    text: str
    amount: Decimal


class Invoice(BaseModel):
    number: str
    currency: Currency
    due: datetime
    lines: list[Line]


class Paid(BaseModel):
    invoice: Invoice
    total: Decimal


@nexusrpc.service
class EchoService:
    echo: nexusrpc.Operation[RawValue, RawValue]
    pay: nexusrpc.Operation[Invoice, Paid]
    nothing: nexusrpc.Operation[None, None]


@dataclass(frozen=True)
class Route:
    """The transport of a call."""

    transport: Transport
    endpoint: str


def echo_id(value: RawValue) -> str:
    """The workflow id from the content, because the operation has no other input."""
    return f"echo-{hashlib.sha256(value.payload.SerializeToString(deterministic=True)).hexdigest()}"


@bridge.emits_callback(service=EchoService, operation=EchoService.echo, workflow_id=echo_id)
@workflow.defn(sandboxed=False)
class EchoWorkflow:
    """May also fail with its input, or return a short result."""

    @workflow.run
    async def run(self, value: RawValue) -> RawValue:
        if FAILS in value.payload.data:
            raise ApplicationError("as you wish", value, type="Echo")
        if value.payload.data.startswith(SHORT):
            return RawValue(Payload(metadata={"encoding": b"binary/plain"}, data=SHORT))
        return value


@bridge.emits_callback(
    service=EchoService, operation=EchoService.pay, workflow_id=lambda invoice: f"invoice-{invoice.number}"
)
@workflow.defn(sandboxed=False)
class PayWorkflow:
    @workflow.run
    async def run(self, invoice: Invoice) -> Paid:
        return Paid(invoice=invoice, total=sum((line.amount for line in invoice.lines), Decimal(0)))


@workflow.defn(sandboxed=False)
class NothingWorkflow:
    """Its input makes no workflow id; each test that starts it declares one."""

    @workflow.run
    async def run(self) -> None:
        """Has no input and no result."""


def declare_nothing(workflow_id: str) -> None:
    """Make the operation `nothing` start *workflow_id* from now on."""
    declare = bridge.emits_callback(
        service=EchoService, operation=EchoService.nothing, workflow_id=lambda _: workflow_id
    )
    declare(NothingWorkflow)


def _client(route: Route) -> bridge.OperationClient:
    return bridge.create_client(service=EchoService, endpoint=route.endpoint, transport=route.transport)


@workflow.defn(sandboxed=False)
class EchoCaller:
    @workflow.run
    async def run(self, value: RawValue, route: Route) -> RawValue:
        return await _client(route).execute_operation(
            EchoService.echo, value, schedule_to_close_timeout=timedelta(minutes=1)
        )


@workflow.defn(sandboxed=False)
class NothingCaller:
    @workflow.run
    async def run(self, route: Route) -> None:
        nothing: object = await _client(route).execute_operation(EchoService.nothing, None)
        assert nothing is None


@workflow.defn(sandboxed=False)
class PayCaller:
    @workflow.run
    async def run(self, number: str, route: Route) -> Paid:
        lines = [Line(text="tea", amount=Decimal("1.10")), Line(text="Gebäck", amount=Decimal("2.200"))]
        due = datetime(2026, 11, 23, 12, 30, 0, 123456, tzinfo=UTC)
        invoice = Invoice(number=number, currency=Currency.EUR, due=due, lines=lines)
        paid = await _client(route).execute_operation(EchoService.pay, invoice)
        assert paid.invoice == invoice
        return paid


@workflow.defn(sandboxed=False)
class BigCaller:
    """Makes the operation's input itself, because a workflow's input has the same limit."""

    @workflow.run
    async def run(self, key: str, size: int, route: Route) -> str:
        """Send *size* bytes, metadata included; return the result, or the error of the request."""
        payload = Payload(metadata={"encoding": b"binary/plain"}, data=SHORT + key.encode() + bytes(size))
        payload.data = payload.data[: size - (payload.ByteSize() - len(payload.data))]
        assert payload.ByteSize() == size
        try:
            reply = await _client(route).execute_operation(EchoService.echo, RawValue(payload))
        except NexusOperationError as error:
            cause = error.cause
            assert isinstance(cause, HandlerError)
            return f"{cause.type.value}: {cause}"
        return reply.payload.data.decode()


TARGETS = [EchoWorkflow, PayWorkflow, NothingWorkflow]
CALLERS = [EchoCaller, NothingCaller, PayCaller, BigCaller]
