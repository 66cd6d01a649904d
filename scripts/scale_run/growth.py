"""The parts of a scale run that let one number grow: attached calls, age, history length, closed runs."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from temporalio.client import Client, WorkflowExecutionDescription

from examples.payments.contract import PaymentRequest
from examples.payments.payments import PAYMENT_QUEUE, PaymentWorkflow
from scripts.chaos_run.calls import Call, CallKind
from scripts.chaos_run.load import review
from scripts.environment.progress import say
from scripts.environment.stack import HANDLER_NAMESPACE
from scripts.scale_run.load import Load
from scripts.scale_run.patience import until_all
from scripts.scale_run.readings import Interval
from scripts.scale_run.results import Bound, Table
from scripts.scale_run.sweeps import SWEEP_ID, next_sweeps_ms

SWEEP_S = 2.0
"""Interval of the sweep in the part with closed runs, so that several sweeps are seen in a short time."""
_ORDERS = 20
_TARGETS = 5
_CALLS_THAT_AGE = 20
_SIGNALS_AT_ONCE = 20
_CLOSED_AT_ONCE = 30

_COST = Bound(share=1.0, allowance=20)
"""Of CPU in ms: below twice the first row and 20 ms. A cost that grows with the number would be far over it."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One number that grows."""

    grow: Callable[[Load, Sequence[int]], Awaitable[Table]]
    sizes: Sequence[int]
    quick: Sequence[int]
    """The sizes of a quick run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the options of its stack are, in addition to those of every part."""


async def attach(load: Load, sizes: Sequence[int]) -> Table:
    """Let ever more calls share one run."""
    rows = []
    for size in sizes:
        first = load.new(CallKind.APPROVED)
        await load.bring_into_flight([first])
        before = await load.observer.settled()
        further = [load.new(CallKind.APPROVED, order_id=first.order_id) for _ in range(size)]
        await load.bring_into_flight(further)
        made = Interval(first=before, last=await load.observer.settled())
        described = await _describe(load.observer.handler, _payment(first))
        before = await load.observer.settled()
        await review(load.observer.handler, first)
        await load.until_none_waits()
        ended = Interval(first=before, last=await load.observer.settled())
        rows.append(
            [
                size,
                made.own_cpu_s / size * 1000,
                made.server_cpu_s / size * 1000,
                described.history_length,
                described.raw_description.workflow_execution_info.history_size_bytes / 1000,
                ended.own_cpu_s / (size + 1) * 1000,
                ended.completions / (size + 1),
            ]
        )
    return Table(
        name="attached",
        title="Calls that share one run",
        about="Further calls attach to one target; then it ends. CPU in ms for each call while the calls attach, the "
        "history of the target, and for each call of the end: CPU of our processes and callbacks.",
        columns=[
            "attached calls",
            "own CPU ms",
            "server CPU ms",
            "events of the target",
            "kB of the target",
            "own CPU ms at the end",
            "callbacks",
        ],
        rows=rows,
        drawn=["own CPU ms", "server CPU ms", "own CPU ms at the end"],
        unit="ms of CPU for each call",
        bounds={"own CPU ms": _COST, "own CPU ms at the end": _COST, "callbacks": Bound(share=0.0, allowance=0.2)},
    )


async def age(load: Load, sizes: Sequence[int]) -> Table:
    """Let calls renew ever more often. *sizes* are renewals of each call."""
    calls = [load.new(CallKind.APPROVED) for _ in range(_CALLS_THAT_AGE)]
    await load.bring_into_flight(calls)

    async def renewals() -> int:
        calls_started = load.observer.calls_started()
        return load.observer.requests.starts - calls_started

    rows: list[list[float]] = []
    before = await load.observer.settled()
    for size in sizes:
        await until_all("renewals", size * _CALLS_THAT_AGE, renewals, pause_s=1)
        now = await load.observer.read()
        made, before = Interval(first=before, last=now), now
        caller = await _describe(load.observer.caller, calls[0].workflow_id)
        target = await _describe(load.observer.handler, _payment(calls[0]))
        rows.append(
            [
                (now.starts - now.calls) / _CALLS_THAT_AGE,
                made.own_cpu_s / made.renewals * 1000,
                made.server_cpu_s / made.renewals * 1000,
                caller.history_length,
                target.history_length,
                now.processes["order-worker"].memory_mb,
                now.processes["handler"].memory_mb,
            ]
        )
    return Table(
        name="age",
        title="Age of a call",
        about=f"{_CALLS_THAT_AGE} calls renew every second instead of every minute to hour. By default a call of one "
        "day renews 29 times. CPU in ms for each renewal since the row before, the histories of one call, and memory.",
        columns=[
            "renewals of each call",
            "own CPU ms",
            "server CPU ms",
            "events of the caller",
            "events of the target",
            "order-worker MB",
            "handler MB",
        ],
        rows=rows,
        drawn=["own CPU ms", "server CPU ms"],
        unit="ms of CPU for each renewal",
        bounds={
            "own CPU ms": _COST,
            "events of the caller": Bound(share=0.0, allowance=0.0),
            "events of the target": Bound(share=0.0, allowance=0.0),
            "order-worker MB": Bound(share=0.1, allowance=10.0),
            "handler MB": Bound(share=0.1, allowance=10.0),
        },
    )


async def history(load: Load, sizes: Sequence[int]) -> Table:
    """Let targets have ever longer histories before they end. *sizes* are signals of each target."""
    rows = []
    for size in sizes:
        calls = [load.new(CallKind.APPROVED) for _ in range(_TARGETS)]
        await load.bring_into_flight(calls)
        await _signal(load.observer.handler, [_payment(call) for call in calls], size)
        events = max([(await _describe(load.observer.handler, _payment(call))).history_length for call in calls])
        before = await load.observer.settled()
        await load.release(calls)
        await load.until_none_waits()
        ended = Interval(first=before, last=await load.observer.settled())
        rows.append(
            [
                events,
                median([await _until_answered_ms(load, call) for call in calls]),
                ended.own_cpu_s / _TARGETS * 1000,
                ended.server_cpu_s / _TARGETS * 1000,
                ended.rpcs(HANDLER_NAMESPACE) / _TARGETS,
            ]
        )
    return Table(
        name="history",
        title="Length of the target's history",
        about=f"{_TARGETS} targets get signals before they end. For each ending: the time from the close of the target "
        "to the end of the calling workflow, CPU, and requests to the server in the handler's namespace. One of the "
        "requests is the approval, and the workers' long polls count too.",
        columns=["events of the target", "close to answer ms", "own CPU ms", "server CPU ms", "gRPC requests"],
        rows=rows,
        drawn=["close to answer ms", "own CPU ms", "server CPU ms"],
        unit="ms for each ending",
        bounds={
            "close to answer ms": Bound(share=2.0, allowance=200.0),
            "own CPU ms": _COST,
            "gRPC requests": Bound(share=0.5, allowance=4.0),
        },
    )


async def closed(load: Load, sizes: Sequence[int]) -> Table:
    """Let ever more runs be closed in the handler's namespace."""
    rows, made = [], 0
    for size in sizes:
        await _close_runs(load.observer.handler, range(made, size))
        made = size
        before = await load.observer.settled()
        order_ms = await load.pay(_ORDERS)
        paid = Interval(first=before, last=await load.observer.settled())
        sweeps = await next_sweeps_ms(load.observer.handler, SWEEP_ID, 3, pause_s=SWEEP_S / 4)
        quiet = await load.observer.watch(4 * SWEEP_S)
        rows.append(
            [
                size,
                median(sweeps),
                quiet.sweep_rpcs / (quiet.seconds / SWEEP_S),
                median(order_ms),
                paid.own_cpu_s / _ORDERS * 1000,
                paid.server_cpu_s / _ORDERS * 1000,
            ]
        )
    return Table(
        name="closed",
        title="Closed runs in the namespace",
        about="Payments that no call started are closed beforehand. A sweep: time from its schedule to its end, and "
        "its requests. Then orders that are paid at once, one after the other: median time, and CPU for each.",
        columns=["closed runs", "sweep ms", "requests of a sweep", "order ms", "own CPU ms", "server CPU ms"],
        rows=rows,
        drawn=["sweep ms", "order ms", "own CPU ms"],
        unit="ms",
        bounds={
            "sweep ms": Bound(share=2.0, allowance=100.0),
            "requests of a sweep": Bound(share=0.5, allowance=2.0),
            "own CPU ms": _COST,
        },
    )


PARTS = {
    "attached": Part(grow=attach, sizes=(10, 100, 400, 900), quick=(5, 20)),
    "age": Part(
        grow=age,
        sizes=(15, 30, 60, 90, 120),
        quick=(3, 6),
        settings={"first_lease": 1.0, "renewal": 1.0, "renewal_maximum": 1.0},
    ),
    "history": Part(grow=history, sizes=(0, 100, 1000, 3000), quick=(0, 30)),
    "closed": Part(
        grow=closed,
        sizes=(0, 1000, 4000, 10_000),
        quick=(0, 100),
        settings={
            "own_environment": lambda _folder, side, _name: (
                {"BRIDGE_SWEEP_INTERVAL_S": str(SWEEP_S)} if side == "handler" else {}
            )
        },
    ),
}


def _payment(call: Call) -> str:
    return f"payment-{call.order_id}"


async def _describe(client: Client, workflow_id: str) -> WorkflowExecutionDescription:
    return await client.get_workflow_handle(workflow_id).describe()


async def _signal(client: Client, workflow_ids: Sequence[str], size: int) -> None:
    """Send *size* signals that the payment has no handler for to each of the runs."""
    gate = asyncio.Semaphore(_SIGNALS_AT_ONCE)

    async def send(workflow_id: str) -> None:
        async with gate:
            await client.get_workflow_handle(workflow_id).signal("note", "x" * 50)

    if size:
        say(f"  {size} signals to each of {len(workflow_ids)} targets")
    await asyncio.gather(*(send(each) for _ in range(size) for each in workflow_ids))


async def _close_runs(client: Client, numbers: range) -> None:
    gate = asyncio.Semaphore(_CLOSED_AT_ONCE)

    async def close(number: int) -> None:
        async with gate:
            await client.execute_workflow(
                PaymentWorkflow.run,
                PaymentRequest(order_id=f"closed-{number}", amount=10),
                id=f"payment-closed-{number}",
                task_queue=PAYMENT_QUEUE,
            )

    if numbers:
        say(f"  closing {len(numbers)} runs")
    await asyncio.gather(*(close(number) for number in numbers))


async def _until_answered_ms(load: Load, call: Call) -> float:
    target = await _describe(load.observer.handler, _payment(call))
    order = await _describe(load.observer.caller, call.workflow_id)
    assert target.close_time is not None
    assert order.close_time is not None
    return (order.close_time - target.close_time).total_seconds() * 1000
