"""Make calls and measure them, from histories, processes, the server's metrics and access logs."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta

from temporalio.client import WorkflowHandle

from bridge.workflow.call import Renewals
from bridge.workflow.client import DEFAULT_FIRST_LEASE
from examples.payments.order import Order, OrderReceipt
from scripts.benchmark.results import Batch, LongCall, Memory, Sample, read_sample, request_times
from scripts.benchmark.world import Mode, Usage, World
from scripts.environment.progress import say

SETTLING_S = 1.2
"""After a batch, before its costs are read: what a call does after its end is charged to it, too."""

AT_ONCE, SETTLES, WAITS = 10.0, 500.0, 5000.0
"""Amounts by which a payment ends at once, after its settlement time, or when it is approved."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of one batch."""

    name: str
    """Makes the order ids unique."""
    round: int = 0
    target_seconds: float = 0
    calls: int
    in_flight: int = 1
    lead_in: int = 0
    """Calls before the measured ones. None is kept: a server that was idle lets the first few pass at once."""
    seconds: float = 60
    """No call is begun after that."""
    samples: int = 20
    """How many histories are read, of the last calls."""
    is_alone: bool = True
    """Whether no other mode runs at the same time, so that the server's costs are this mode's."""


async def start_order(world: World, mode: Mode, order: Order) -> WorkflowHandle[OrderReceipt, OrderReceipt]:
    """Start the order workflow of *mode*."""
    handle: WorkflowHandle[OrderReceipt, OrderReceipt] = await world.caller.start_workflow(
        mode.workflow,
        args=[order] if mode.is_bridge else [order, mode.payment_queue],
        id=f"order-{order.order_id}",
        task_queue=mode.order_queue,
        result_type=OrderReceipt,
    )
    return handle


@asynccontextmanager
async def used(world: World, mode: Mode, into: list[Usage]) -> AsyncIterator[None]:
    """Append what *mode* and the server used inside the context to *into*, without what an idle server uses."""
    before, began = await world.usage(mode), time.perf_counter()
    yield
    await asyncio.sleep(SETTLING_S)
    after, elapsed = await world.usage(mode), time.perf_counter() - began
    into.append(after.minus(before, idle=world.idle, seconds=elapsed))


async def run_batch(world: World, mode: Mode, plan: Plan) -> Batch:
    """Make the calls of *plan*, and read what they took."""
    amount = SETTLES if plan.target_seconds else AT_ONCE
    # An earlier run on the same server may have used the rest of the name.
    prefix = f"{world.folder.name[-8:]}-{mode.name}-{plan.name}-{plan.round}-{plan.in_flight}"
    for number in range(plan.lead_in):
        await (await start_order(world, mode, Order(order_id=f"{prefix}-before-{number}", amount=amount))).result()
    numbers = iter(range(plan.calls))
    order_ms: list[float] = []
    ids: list[str] = []
    began, full_calls, full_seconds = 0.0, 0, 0.0

    async def caller() -> None:
        nonlocal full_calls, full_seconds
        for number in numbers:
            started = time.perf_counter()
            if ids and started - began > plan.seconds:
                return
            full_calls, full_seconds = len(ids), started - began
            handle = await start_order(world, mode, Order(order_id=f"{prefix}-{number}", amount=amount))
            await handle.result()
            order_ms.append((time.perf_counter() - started) * 1000)
            ids.append(f"{prefix}-{number}")

    usage: list[Usage] = []
    async with used(world, mode, usage):
        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(plan.in_flight)))
        elapsed = time.perf_counter() - began
    return Batch(
        mode=mode.name,
        setting=world.setting.name,
        round=plan.round,
        target_seconds=plan.target_seconds,
        in_flight=plan.in_flight,
        full_calls=full_calls,
        full_seconds=full_seconds,
        seconds=elapsed,
        order_ms=order_ms,
        samples=await asyncio.gather(
            *(read_call(world, mode, each) for each in ids[max(0, len(ids) - plan.samples) :])
        ),
        server_cpu_s=usage[0].server_cpu_s if plan.is_alone and world.server.parts else None,
        client_cpu_s=usage[0].client_cpu_s,
        service_cpu_s=usage[0].service_cpu_s,
        http_requests=usage[0].http_requests,
        grpc_requests=usage[0].grpc_requests if plan.is_alone and world.server.metrics else None,
    )


async def read_call(world: World, mode: Mode, order_id: str) -> Sample:
    """Read both histories of one call, the target's once it has closed."""
    target = world.client(mode).get_workflow_handle(f"payment-{order_id}")
    await target.result()
    histories = (world.caller.get_workflow_handle(f"order-{order_id}").fetch_history(), target.fetch_history())
    caller_history, target_history = await asyncio.gather(*histories)
    return read_sample(list(caller_history.events), list(target_history.events))


@dataclass(frozen=True, kw_only=True)
class LongPlan:
    """A long call, and how it is shortened to be made here."""

    name: str
    seconds: float
    factor: float
    """What renewals and duration are divided by."""
    limit: int
    first_lease_s: float = 2.0
    """First lease of the shortened call. It is not divided by `factor`, because an attempt must fit into it."""

    @property
    def renewals(self) -> Renewals:
        """The default renewals, shortened by `factor`."""
        return Renewals(initial=Renewals().initial / self.factor, maximum=Renewals().maximum / self.factor)

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that give the example's order worker this lease and these renewals."""
        return {
            "ORDER_FIRST_LEASE_SECONDS": str(self.first_lease_s),
            "ORDER_RENEWAL_SECONDS": str(self.renewals.initial.total_seconds()),
            "ORDER_RENEWAL_MAXIMUM_SECONDS": str(self.renewals.maximum.total_seconds()),
        }


LONG_CALLS = (
    LongPlan(name="one hour", seconds=3600, factor=60, limit=12),
    LongPlan(name="one day", seconds=86_400, factor=1440, limit=40),
)


def computed(plan: LongPlan) -> LongCall:
    """The requests of a long call by its schedule, as it is and shortened."""

    def count(seconds: float, first_lease: timedelta, renewals: Renewals) -> int:
        return len(request_times(first_lease, renewals, ends=timedelta(seconds=seconds)))

    shortened = plan.seconds / plan.factor
    return LongCall(
        name=plan.name,
        seconds=plan.seconds,
        requests=count(plan.seconds, DEFAULT_FIRST_LEASE, Renewals()),
        limit=plan.limit,
        shortened_seconds=shortened,
        shortened_requests=count(shortened, timedelta(seconds=plan.first_lease_s), plan.renewals),
    )


async def count_requests(world: World, mode: Mode) -> int:
    """Make one call of *mode* whose target takes its settlement time, and count its HTTP requests."""
    handle = await start_order(world, mode, Order(order_id=f"{mode.name}-long", amount=SETTLES))
    await handle.result()
    history = await handle.fetch_history()
    [request_id] = [
        event.activity_task_scheduled_event_attributes.activity_id
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    ]
    return world.http_requests(mode)[request_id]


async def fill(world: World, mode: Mode, *, calls: int, seconds: float) -> Sequence[Memory]:
    """Bring *calls* calls into flight, or as many as start within *seconds*; how much memory each process took."""
    before = world.resident_bytes(mode)
    seen = sum(world.http_requests(mode).values())
    numbers, began = iter(range(calls)), time.monotonic()
    started = 0

    async def starter() -> None:
        nonlocal started
        for number in numbers:
            if time.monotonic() - began > seconds:
                return
            await start_order(world, mode, Order(order_id=f"{mode.name}-waiting-{number}", amount=WAITS))
            started += 1

    await asyncio.gather(*(starter() for _ in range(20)))
    while (in_flight := sum(world.http_requests(mode).values()) - seen) < started:
        resident = ", ".join(f"{role} {size / 1e6:.1f} MB" for role, size in world.resident_bytes(mode).items())
        say(f"  {in_flight} of {started} calls in flight; {resident}")
        if time.monotonic() - began > seconds:
            break
        await asyncio.sleep(2)
    await asyncio.sleep(SETTLING_S)
    after = world.resident_bytes(mode)
    return [
        Memory(role=role, in_flight=in_flight, before_bytes=before[role], after_bytes=after[role]) for role in before
    ]
