"""The calls of a scale run: they are started at the pace at which the machine takes them, wait, and are then ended."""

import asyncio
import time
from collections.abc import Iterable

from scripts.chaos_run.calls import Call, CallKind
from scripts.chaos_run.load import OPEN, count, review, start_call
from scripts.scale_run.observer import Observer
from scripts.scale_run.patience import Progress, until_all

BACKLOG = 50
"""Most calls that are started and not yet answered by the handler service. Half of the workers' slots stay free."""
_RELEASES = 50
"""Targets that are released at once."""


class Load:
    """The calls of one stack."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.calls: list[Call] = []
        self.started_at: list[float] = []
        """When the calls that wait were started, by a clock that only goes forward."""

    def new(self, kind: CallKind, *, order_id: str | None = None) -> Call:
        """A further call. *order_id* names an order that exists, whose payment the call then shares."""
        number = len(self.calls)
        call = Call(workflow_id=f"order-{number}", order_id=order_id or f"o{number}", kind=kind, at=0, own_s=0)
        self.calls.append(call)
        return call

    async def bring_into_flight(self, calls: Iterable[Call]) -> None:
        """Start *calls* and wait until the handler service has answered all of them.

        Raises:
            NoProgressError: No call was answered for two minutes.
        """
        waiting, started = list(calls), 0
        before = self.observer.calls_started()
        progress = Progress("calls in flight", len(waiting))
        while (answered := self.observer.calls_started() - before) < len(waiting):
            progress.report(answered)
            room = waiting[started : answered + BACKLOG]
            await asyncio.gather(*(start_call(self.observer.caller, call) for call in room))
            started += len(room)
            self.started_at += [time.monotonic()] * len(room)
            await asyncio.sleep(0.1)

    async def release(self, calls: Iterable[Call], *, seconds: float = 0.0) -> None:
        """Approve the payments of *calls*, evenly over *seconds*; with 0 as fast as the server takes it."""
        waiting = list(calls)
        gate, began = asyncio.Semaphore(_RELEASES), time.monotonic()

        async def approve(number: int, call: Call) -> None:
            await asyncio.sleep(max(0.0, began + seconds * number / len(waiting) - time.monotonic()))
            async with gate:
                await review(self.observer.handler, call)

        await asyncio.gather(*(approve(number, call) for number, call in enumerate(waiting)))

    async def until_none_waits(self) -> None:
        """Wait until no calling workflow is open.

        Raises:
            NoProgressError: No call ended for two minutes.
        """

        async def ended() -> int:
            return len(self.calls) - await count(self.observer.caller, OPEN)

        await until_all("calls ended", len(self.calls), ended, pause_s=0.5)

    async def pay(self, orders: int, *, at_once: int = 1) -> list[float]:
        """Make *orders* orders that are paid at once, *at_once* at a time. Return the milliseconds of each.

        Raises:
            temporalio.client.WorkflowFailureError: One of them was not paid.
        """
        numbers = iter(range(orders))
        found: list[float] = []

        async def customer() -> None:
            for _ in numbers:
                began = time.perf_counter()
                call = self.new(CallKind.AT_ONCE)
                await start_call(self.observer.caller, call)
                await self.observer.caller.get_workflow_handle(call.workflow_id).result()
                found.append((time.perf_counter() - began) * 1000)

        await asyncio.gather(*(customer() for _ in range(at_once)))
        return found
