"""Make calls at half of the highest rate for a long time, and check that nothing grows.

A short burst, in which a worker's cache is filled, measures the highest rate. Then orders are made at half of it, one
in ten with a payment that takes some seconds. At the end of each window the command reads memory, descriptors and
threads of every process, connections to the services, open delivery workflows and pending calls, and the slowest
percent of the orders that ended in it.

The rule: a value is flat if its median over the last third of the windows is within a bound of its median over the
first third. The first sixth of the windows is left out, because processes warm up. The command exits with 1 if a value
is not flat, or if an order was not paid. It starts all that it needs on the loopback, and ends all that it started,
also after Ctrl-C.
"""

import argparse
import asyncio
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from scripts.chaos_run.calls import Call, CallKind
from scripts.chaos_run.load import is_paid, read_runs
from scripts.chaos_run.verdict import recoveries
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import conclude, say
from scripts.environment.stack import StackOptions, running_stack
from scripts.scale_run.load import Load
from scripts.scale_run.observer import Observer
from scripts.scale_run.pages import PAGE, machine, write_report
from scripts.scale_run.report import BOUNDS, number, soak_report
from scripts.scale_run.results import CACHED, Series, Window, percentile_99, soak_series

_AT_ONCE = 50
"""Orders in flight in the burst."""
_SETTLEMENT_S = 5.0
_SETTLES_EVERY = 10
_PATIENCE_S = 60.0
"""After it an order counts as not paid."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run does."""

    minutes: float
    burst: int
    """Orders of the burst."""
    windows: int
    server: str | None


@dataclass(kw_only=True)
class Results:
    """What one run measured."""

    highest_per_s: float
    """Orders a second in the burst."""
    made: int = 0
    """Orders that were begun after the burst."""
    paid: int = 0
    slowest: str = ""
    """The slowest order, and where its time went."""
    windows: list[Window] = field(default_factory=list)
    is_cache_full: bool
    """Whether the burst filled the workers' caches. If not, their memory is not judged."""

    @property
    def series(self) -> list[Series]:
        """Every value over the windows, without the warm-up."""
        return soak_series(self.windows, is_cache_full=self.is_cache_full)

    def faults(self) -> list[str]:
        """What is wrong."""
        found = [
            f"{each.name} grew from {number(each.early)} to {number(each.late)}"
            for each in self.series
            if not each.is_flat
        ]
        return found + ([f"{self.made - self.paid} orders were not paid"] if self.paid < self.made else [])

    def unjudged(self) -> list[str]:
        """What the run was too small to judge."""
        reason = f"because the burst did not fill their caches of {CACHED} workflows"
        return [] if self.is_cache_full else [f"memory of the workers, {reason}"]

    def facts(self) -> dict[str, str]:
        """The run, as rows for people."""
        return {
            "Highest rate, 50 in flight": f"{self.highest_per_s:.1f} orders a second",
            "Orders made at half of it": f"{self.made}, of which {self.paid} were paid",
            "Windows": f"{len(self.windows)}",
            "Slowest order": self.slowest,
        }


class Soak:
    """Makes the orders of one run."""

    def __init__(self, load: Load, plan: Plan) -> None:
        self._load, self._plan = load, plan
        self._ended_ms: list[float] = []
        self._slowest: tuple[float, Call | None] = (0.0, None)

    async def run(self) -> Results:
        """The burst, then the long time."""
        say(f"a burst of {self._plan.burst} orders")
        began = time.monotonic()
        await self._load.pay(self._plan.burst, at_once=_AT_ONCE)
        highest = self._plan.burst / (time.monotonic() - began)
        results = Results(highest_per_s=highest, is_cache_full=self._plan.burst >= CACHED)
        say(f"{highest:.1f} orders a second; now {self._plan.minutes:g} minutes with half of it")
        orders = asyncio.create_task(self._orders(highest / 2, results))
        try:
            for number_ in range(1, self._plan.windows + 1):
                await asyncio.sleep(self._plan.minutes * 60 / self._plan.windows)
                results.windows.append(await self._window())
                _say_window(number_, results.windows[-1])
                if orders.done():
                    orders.result()
            await orders
        finally:
            orders.cancel()
            await asyncio.wait({orders})
        results.slowest = await self._explain()
        return results

    async def _explain(self) -> str:
        """Where the time of the slowest order went, by its histories."""
        ms, call = self._slowest
        if call is None:
            return "no order was paid"
        caller, handler = self._load.observer.clients
        found = recoveries(
            [call],
            callers=await read_runs(caller, f"WorkflowId = '{call.workflow_id}'"),
            handlers=await read_runs(handler, f"WorkflowId = 'payment-{call.order_id}'"),
            harms=[],
        )
        why = found[0].why.removesuffix(" (harm meanwhile: none)") if found else "its histories are not listed yet"
        return f"{ms:.0f} ms; {why}"

    async def _window(self) -> Window:
        ended, self._ended_ms = self._ended_ms, []
        return Window(
            processes=self._load.observer.processes(),
            queues=await self._load.observer.queues(),
            orders=len(ended),
            p99_ms=percentile_99(ended),
        )

    async def _orders(self, per_s: float, results: Results) -> None:
        """Begin orders at a steady rate until the time is over, and wait for those that have begun."""
        began, count = time.monotonic(), int(per_s * self._plan.minutes * 60)
        async with asyncio.TaskGroup() as group:
            for order in range(count):
                await asyncio.sleep(max(0.0, began + order / per_s - time.monotonic()))
                results.made += 1
                group.create_task(self._order(order, results))

    async def _order(self, order: int, results: Results) -> None:
        settles = order % _SETTLES_EVERY == 0
        call, began = self._load.new(CallKind.SETTLES if settles else CallKind.AT_ONCE), time.perf_counter()
        if not await is_paid(self._load.observer.caller, call, patience_s=_PATIENCE_S):
            return
        results.paid += 1
        own_ms = _SETTLEMENT_S * 1000 if settles else 0.0
        self._ended_ms.append((time.perf_counter() - began) * 1000 - own_ms)
        self._slowest = max(self._slowest, (self._ended_ms[-1], call), key=lambda each: each[0])


def _say_window(which: int, window: Window) -> None:
    memory = ", ".join(f"{name} {each.memory_mb:.0f} MB" for name, each in window.processes.items())
    queues = f"{window.queues.pending} pending, {window.queues.deliveries} deliveries"
    say(f"window {which}: {window.orders} orders, p99 {window.p99_ms:.0f} ms; {queues}; {memory}")


async def run_soak(plan: Plan, *, output: Path | None, as_json: bool) -> int:
    """Make one run and return the exit code."""
    taken_on = machine()
    options = StackOptions(ui=False, separate=True, settlement=_SETTLEMENT_S, server=plan.server)
    async with running_stack(options) as stack:
        results = await Soak(Load(await Observer.of(stack)), plan).run()
    text = soak_report(
        command=shlex.join(["./scripts/soak", *sys.argv[1:]]),
        machine=taken_on,
        facts=results.facts(),
        series=results.series,
        faults=results.faults(),
        unjudged=results.unjudged(),
    )
    if output is None:
        say(text)
    else:
        write_report(output, "soak", text)
    return conclude(results.faults(), results.unjudged(), to_json(results) if as_json else None)


def to_json(results: Results) -> dict[str, object]:
    """The last line of `--json`."""
    return {
        "highest_per_s": round(results.highest_per_s, 2),
        "orders": results.made,
        "paid": results.paid,
        "values": {
            each.name: {
                "first third": round(each.early, 1),
                "last third": round(each.late, 1),
                "at most": round(each.bound.most(each.early), 1),
            }
            for each in results.series
        },
        "faults": results.faults(),
        "unjudged": results.unjudged(),
    }


def main() -> NoReturn:
    """Parse the command line, make the run and report."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The bounds: {BOUNDS}, connections, deliveries and pending calls 10% and 50, p99 50% and 100 ms.",
    )
    parser.add_argument("--minutes", type=float, metavar="N", help="length after the burst (30; quick: 0.5)")
    parser.add_argument("--quick", action="store_true", help="a short run, about a minute in all")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write the report into {PAGE} there")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    temporal_cli.add_server_option(parser, is_one_process=True)
    given = parser.parse_args()
    minutes = given.minutes if given.minutes is not None else 0.5 if given.quick else 30.0
    if not 0.2 <= minutes <= 24 * 60:
        parser.error("--minutes is 0.2 to 1440")
    plan = Plan(
        minutes=minutes,
        burst=60 if given.quick else CACHED + 200,
        windows=6 if given.quick else 30,
        server=given.server,
    )
    temporal_cli.choose(given.server)
    end(until_stopped(lambda: run_soak(plan, output=given.output, as_json=given.json)))


if __name__ == "__main__":
    main()
