"""Bring many calls into flight and read what they cost; restart everything; end all calls. See how each cost grows.

The part `calls` starts calls whose payments wait for a review, stops at five numbers of calls on the way, and reads
memory, descriptors, threads and CPU of every process, the renewals, and the sweep. Then it kills all of our processes
at once and starts them again. At last it approves all payments, and judges by the histories. Each further part lets one
number grow, on a server of its own: `attached` the calls that share one run, `age` the renewals of a call, `history`
the events of a target, `closed` the closed runs in the namespace.

The command exits with 1 if a call is lost, wrong, made twice, pending or undelivered, or if a value grew more than it
may. It starts all that it needs on the loopback, and ends all that it started, also after Ctrl-C.
"""

import argparse
import asyncio
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from handler.settings import HandlerSettings
from scripts.chaos_run.calls import CallKind
from scripts.chaos_run.load import read_runs
from scripts.chaos_run.verdict import judge
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import conclude, say, with_ticker
from scripts.environment.stack import StackOptions, running_stack, start_all
from scripts.scale_run.growth import PARTS
from scripts.scale_run.load import Load
from scripts.scale_run.observer import Observer
from scripts.scale_run.pages import PAGE, machine, write_report
from scripts.scale_run.plots import draw
from scripts.scale_run.readings import Interval
from scripts.scale_run.report import BOUNDS, curve_tables, number, scale_report, table
from scripts.scale_run.results import Ending, Point, Restart, Table, curve_faults, curve_unjudged, renewals_due
from scripts.scale_run.sweeps import SWEEP_ID, latest_sweep

CALLS = "calls"
"""Name of the part with the curve, the restart and the end."""
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
_PROBES = 10
_QUEUES_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run does."""

    calls: int
    parts: Sequence[str]
    window_s: float
    """Length of the time at each point of the curve in which only renewals happen, in seconds."""
    ending_s: float
    """Time over which the targets are released, in seconds. 0 releases them as fast as the server takes it."""
    is_quick: bool
    server: str | None


@dataclass(kw_only=True)
class Results:
    """What one run measured."""

    tables: list[Table] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    restart: Restart | None = None
    ending: Ending | None = None

    def faults(self) -> list[str]:
        """What is wrong."""
        found = curve_faults(self.points) if self.points else []
        for each in (self.restart, self.ending, *self.tables):
            found += each.faults() if each is not None else []
        return found

    def unjudged(self) -> list[str]:
        """What the run was too small to judge."""
        return curve_unjudged(self.points) if self.points else []

    def to_json(self) -> dict[str, Any]:
        """The last line of `--json`."""
        return {
            "tables": {
                each.name: [dict(zip(each.columns, row, strict=True)) for row in each.rows] for each in self.tables
            },
            "restart": None if self.restart is None else asdict(self.restart),
            "ending": None
            if self.ending is None
            else {name: value for name, value in asdict(self.ending).items() if name != "queues"}
            | {
                f"peak_{name}": self.ending.peak(name)
                for name in ("receiver_connections", "handler_connections", "deliveries")
            },
            "faults": self.faults(),
            "unjudged": self.unjudged(),
        }


async def measure(plan: Plan) -> Results:
    """Carry out all parts of *plan*."""
    results = Results()
    options = StackOptions(ui=False, separate=True, server=plan.server)
    for name in plan.parts:
        say(f"part {name}")
        chosen = options if name == CALLS else replace(options, **PARTS[name].settings)
        async with running_stack(chosen) as stack:
            load = Load(await Observer.of(stack))
            if name == CALLS:
                await measure_calls(load, chosen, plan, results)
                results.tables[:0] = curve_tables(results.points)
            else:
                part = PARTS[name]
                results.tables.append(await part.grow(load, part.quick if plan.is_quick else part.sizes))
                say(text_of(results.tables[-1]))
    return results


async def measure_calls(load: Load, options: StackOptions, plan: Plan, results: Results) -> None:
    """The curve, the restart and the end."""
    # Every process has loaded what it needs before its memory counts.
    await load.pay(_PROBES, at_once=_PROBES)
    waiting = len(load.calls)
    for share in _SHARES:
        results.points.append(await _point(load, max(1, round(plan.calls * share)), waiting, plan))
    results.restart = await _restart(load, options, plan, results.points[-1])
    results.ending = await _end(load, plan)


async def _point(load: Load, calls: int, offset: int, plan: Plan) -> Point:
    missing, before = calls + offset - len(load.calls), await load.observer.read()
    await load.bring_into_flight([load.new(CallKind.APPROVED) for _ in range(missing)])
    filling = Interval(first=before, last=await load.observer.settled())
    say(f"  {calls} calls in flight, {filling.calls / filling.seconds:.1f} a second; {plan.window_s:g} s of renewals")
    interval = await load.observer.watch(plan.window_s)
    sweep = await latest_sweep(load.observer.handler, SWEEP_ID)
    memory = ", ".join(f"{name} {each.memory_mb:.0f} MB" for name, each in interval.last.processes.items())
    say(f"  {interval.renewals} renewals; {memory}")
    return Point(
        calls=calls,
        interval=interval,
        sweep_ms=None if sweep is None else sweep.took_ms,
        sweeps=interval.seconds / HandlerSettings.model_fields["sweep_interval_s"].default,
        filling=filling,
    )


async def _restart(load: Load, options: StackOptions, plan: Plan, point: Point) -> Restart:
    say("  killing all of our processes at once")
    stack, before = load.observer.stack, await load.observer.read()
    began = time.monotonic()
    for process in stack.processes.values():
        process.kill()
    await asyncio.gather(*(process.wait() for process in stack.processes.values()))
    await start_all(stack, options)
    ready_s = time.monotonic() - began
    await load.pay(_PROBES, at_once=_PROBES)
    served_s, served = time.monotonic() - began, await load.observer.read()
    after = await load.observer.watch(plan.window_s)
    since = Interval(first=before, last=after.last)
    return Restart(
        calls=point.calls,
        ready_s=ready_s,
        served_s=served_s,
        requests=requests(Interval(first=before, last=served)),
        before_per_min=requests(point.interval) / point.minutes,
        after_per_min=requests(after) / after.seconds * 60,
        renewals=since.renewals,
        renewals_due=renewals_due((before.at - each for each in load.started_at), since.seconds),
        memory_before_mb={name: each.memory_mb for name, each in before.processes.items()},
        memory_after_mb={name: each.memory_mb for name, each in after.last.processes.items()},
    )


def requests(interval: Interval) -> int:
    """HTTP requests of both services: starts, renewals and callbacks."""
    return interval.calls + interval.renewals + interval.completions


async def _end(load: Load, plan: Plan) -> Ending:
    waiting = [call for call in load.calls if call.kind is CallKind.APPROVED]
    say(f"  all {len(waiting)} targets end")
    before, began = await load.observer.read(), time.monotonic()
    per_s: list[float] = []
    async with load.observer.watching_queues(_QUEUES_EVERY_S) as queues:
        counting = asyncio.create_task(_count_callbacks(load.observer, per_s))
        try:
            await load.release(waiting, seconds=plan.ending_s)
            asked_s = time.monotonic() - began
            await load.until_none_waits()
        finally:
            counting.cancel()
    seconds, ended = time.monotonic() - began, Interval(first=before, last=await load.observer.settled())
    reading = asyncio.gather(*(read_runs(client) for client in load.observer.clients))
    callers, handlers = await with_ticker("reading the histories of both namespaces", reading)
    verdict = judge(load.calls, callers=callers, handlers=handlers)
    for sentence in list(verdict.sentences())[:50]:
        say(f"NOT right  {sentence}")
    return Ending(
        calls=len(waiting),
        asked_s=asked_s,
        seconds=seconds,
        completions=ended.completions,
        per_s=max(per_s, default=0.0),
        own_cpu_ms=ended.own_cpu_s / len(waiting) * 1000,
        server_cpu_ms=ended.server_cpu_s / len(waiting) * 1000,
        queues=queues,
        mistakes=verdict.counts(),
    )


async def _count_callbacks(observer: Observer, per_s: list[float]) -> None:
    """Append the callbacks of each second."""
    observer.calls_started()
    while True:
        counted, began = observer.requests.completions, time.monotonic()
        await asyncio.sleep(1)
        observer.calls_started()
        per_s.append((observer.requests.completions - counted) / (time.monotonic() - began))


def text_of(each: Table) -> str:
    """A table for people, on standard error."""
    return table(each.columns, [[number(value) for value in row] for row in each.rows])


async def run_scale(plan: Plan, *, output: Path | None, as_json: bool) -> int:
    """Make one run and return the exit code."""
    taken_on = machine()
    results = await measure(plan)
    if output is not None:
        _write(results, output, taken_on=taken_on)
    return conclude(results.faults(), results.unjudged(), results.to_json() if as_json else None)


def _write(results: Results, output: Path, *, taken_on: str) -> None:
    text = scale_report(
        command=shlex.join(["./scripts/scale", *sys.argv[1:]]),
        machine=taken_on,
        tables=results.tables,
        restart=results.restart,
        ending=results.ending,
        faults=results.faults(),
        unjudged=results.unjudged(),
    )
    write_report(output, "scale", text)
    for each in results.tables:
        draw(each, output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"What may grow: {BOUNDS}. A worker is compared from the point on at which its cache of 1 000 is full.",
    )
    parser.add_argument("--calls", type=int, metavar="N", help="calls in flight at most (20000; quick: 160)")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=[CALLS, *PARTS],
        metavar="A,B",
        help=f"carry out only these of: {', '.join([CALLS, *PARTS])}",
    )
    parser.add_argument(
        "--window", type=float, metavar="S", help="seconds with renewals only, at each point (60; quick: 5)"
    )
    parser.add_argument(
        "--ending", type=float, default=0.0, metavar="S", help="seconds over which the targets end, default at once"
    )
    parser.add_argument("--quick", action="store_true", help="a short run of small sizes, about two minutes in all")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"write the report into {PAGE} there, and the plots next to it"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    temporal_cli.add_server_option(parser, is_one_process=True)
    return parser


def main() -> NoReturn:
    """Parse the command line, measure and report."""
    parser = _parser()
    given = parser.parse_args()
    if unknown := [name for name in given.parts if name not in {CALLS, *PARTS}]:
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join([CALLS, *PARTS])}")
    calls, window_s = (160, 5.0) if given.quick else (20_000, 60.0)
    plan = Plan(
        calls=calls if given.calls is None else given.calls,
        parts=given.parts,
        window_s=window_s if given.window is None else given.window,
        ending_s=given.ending,
        is_quick=given.quick,
        server=given.server,
    )
    if not 16 <= plan.calls <= 100_000 or not 1 <= plan.window_s <= 600 or not 0 <= plan.ending_s <= 3600:
        parser.error("--calls is 16 to 100000, --window 1 to 600, --ending 0 to 3600")
    temporal_cli.choose(given.server)
    end(until_stopped(lambda: run_scale(plan, output=given.output, as_json=given.json)))


if __name__ == "__main__":
    main()
