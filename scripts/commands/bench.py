"""Measure the bridge, activity wrappers, native Nexus and a child workflow in one run.

Everything runs on this machine: a Temporal server of its own for each setting, and every mode as separate processes
with it. In every round the modes take turns, so that what disturbs one disturbs all; what to read are the ratios.
A full run takes about fifty minutes and writes docs/bench.md with its plots; --quick takes less than two, and writes a
report only if --output names a folder. Progress goes to standard error; Ctrl-C stops everything.
"""

import argparse
import asyncio
import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from scripts.benchmark import against
from scripts.benchmark.measure import LONG_CALLS, Plan, computed, count_requests, fill, run_batch
from scripts.benchmark.plots import draw
from scripts.benchmark.report import markdown, summary
from scripts.benchmark.results import Batch, LongCall, Memory, Results, ratios, to_json
from scripts.benchmark.world import (
    BRIDGE,
    CHILD,
    DEFAULT,
    DEFAULT_EAGER,
    MODES,
    NAMED_MODES,
    NEXUS,
    NEXUS_EAGER,
    OBSERVED,
    POLL,
    RAISED,
    RAISED_EAGER,
    SEPARATE,
    SYNC,
    UNLOGGED,
    WAIT,
    Mode,
    Setting,
    World,
    running_world,
)
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import say
from scripts.environment.stack import ROOT

LIMIT_S = 4500.0
"""Seconds after which a run ends in any case."""
MEMORY_LIMIT_S = 600.0
"""How long calls are brought into flight, if it does not go faster."""

PARTS = ("latency", "throughput", "targets", "long", "memory")
SETTINGS = (DEFAULT_EAGER, RAISED_EAGER, DEFAULT, RAISED)
SUBJECTS = (BRIDGE, SEPARATE, WAIT, OBSERVED, UNLOGGED)
REFERENCES = (NEXUS, NEXUS_EAGER, CHILD, SYNC, POLL, BRIDGE, SEPARATE)

ONE_SECOND, ONE_MINUTE = 1.0, 60.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    rounds: int
    """One call at a time."""
    rounds_elsewhere: int
    """The same, in settings other than the first."""
    calls: int
    """Of each mode in such a round."""
    seconds: float
    """No call of a round is begun after that."""
    throughput_rounds: int
    levels: dict[int, int]
    """Calls in flight, and how many calls are made so."""
    is_thorough: bool
    """Whether longer targets and memory are measured, too."""
    settings: Sequence[Setting]


FULL = Size(
    rounds=6,
    rounds_elsewhere=2,
    calls=20,
    seconds=8,
    throughput_rounds=6,
    levels={10: 50, 50: 120, 200: 280},
    is_thorough=True,
    settings=SETTINGS,
)
QUICK = Size(
    rounds=2,
    rounds_elsewhere=1,
    calls=5,
    seconds=3,
    throughput_rounds=1,
    levels={50: 100},
    is_thorough=False,
    settings=(DEFAULT_EAGER,),
)
LEAD_IN = 6
"""Calls before those of a round: `history.transferProcessorMaxPollRPS` allows a burst, which is then used up."""
IN_FLIGHT_FOR_MEMORY = 10_000
ELSEWHERE = {RAISED_EAGER.name: 50}
"""Calls in flight that throughput is measured with in a setting other than the first."""


class Bench:
    """One run: what has been measured so far."""

    def __init__(self, *, size: Size, modes: Sequence[Mode], parts: Sequence[str], address: str | None = None) -> None:
        self._size = size
        self._address = address
        self._modes = modes
        self._parts = parts
        self._began = time.monotonic()
        self._batches: list[Batch] = []
        self._long_calls: list[LongCall] = []
        self._memory: list[Memory] = []
        self._server = ""

    async def run(self) -> Results:
        """Measure everything, setting by setting."""
        for setting in self._size.settings:
            if {"latency", "throughput", "targets"} & set(self._parts):
                await self._measure_setting(setting)
        await self._measure_minute()
        if "memory" in self._parts and SEPARATE in self._modes and self._size.is_thorough:
            await self._measure_memory()
        return Results(
            server=self._server,
            settings=[{"name": each.name, "flags": each.dynamic_config} for each in self._size.settings],
            batches=self._batches,
            long_calls=self._long_calls,
            memory=self._memory,
        )

    def _say(self, text: str) -> None:
        say(f"[{time.monotonic() - self._began:4.0f} s] {text}")

    async def _enter(self, stack: AsyncExitStack, modes: Sequence[Mode], setting: Setting, **environment: str) -> World:
        world = await stack.enter_async_context(
            running_world(modes, setting, address=self._address, environment=environment)
        )
        self._server = world.server.version
        return world

    async def _measure_setting(self, setting: Setting) -> None:
        size, is_first = self._size, setting is self._size.settings[0]
        modes = [
            mode
            for mode in self._modes
            # A question every five seconds is as slow in every setting, and without eager start two modes are one.
            if (is_first or mode is not POLL) and (setting.is_eager or mode is not NEXUS_EAGER)
        ]
        async with AsyncExitStack() as stack:
            world = await self._enter(stack, modes, setting, PAYMENT_SETTLEMENT_SECONDS=str(ONE_SECOND))
            await self._warm_up(world, modes)
            if "latency" in self._parts:
                plan = Plan(name="latency", calls=size.calls, lead_in=LEAD_IN, seconds=size.seconds)
                rounds = size.rounds if is_first else size.rounds_elsewhere
                await self._take_turns(world, modes, plan, rounds=rounds)
            if "throughput" in self._parts:
                for level, calls in size.levels.items():
                    if is_first or ELSEWHERE.get(setting.name) == level:
                        plan = Plan(name="throughput", calls=calls, in_flight=level, seconds=size.seconds)
                        await self._take_turns(world, modes, plan, rounds=size.throughput_rounds if is_first else 1)
            if "targets" in self._parts and is_first and size.is_thorough:
                plan = Plan(name="second", calls=8, target_seconds=ONE_SECOND, seconds=9)
                await self._take_turns(world, modes, plan)

    async def _warm_up(self, world: World, modes: Sequence[Mode]) -> None:
        self._say(f"{world.setting.name}: warming up")
        # Together, because nothing is read from them.
        plan = Plan(name="warm-up", calls=10, in_flight=5, seconds=5, samples=0, is_alone=False)
        await asyncio.gather(*(run_batch(world, mode, plan) for mode in modes))
        await world.measure_idle(modes[0])

    async def _take_turns(self, world: World, modes: Sequence[Mode], plan: Plan, *, rounds: int = 1) -> None:
        for number in range(rounds):
            self._say(
                f"{world.setting.name}: targets of {plan.target_seconds:g} s, {plan.in_flight} in flight, "
                f"round {number + 1} of {rounds}"
            )
            for mode in modes:
                # The wrapper that polls is as slow in every round, and takes more time than all others.
                if mode is not POLL:
                    self._batches.append(await run_batch(world, mode, replace(plan, round=number)))
                elif number == 0:
                    self._batches.append(await run_batch(world, mode, replace(plan, lead_in=0)))

    async def _measure_minute(self) -> None:
        """Targets of a minute, of all modes at once, and with them the long calls, shortened to a minute."""
        plans = [computed(each) for each in LONG_CALLS]
        if not self._size.is_thorough:
            self._long_calls = plans if "long" in self._parts else []
            return
        targets = self._modes if "targets" in self._parts else []
        long_modes = [
            replace(BRIDGE, name=f"long-{number}", environment=plan.environment)
            for number, plan in enumerate(LONG_CALLS)
            if "long" in self._parts
        ]
        if not targets and not long_modes:
            return
        async with AsyncExitStack() as stack:
            environment = {"PAYMENT_SETTLEMENT_SECONDS": str(ONE_MINUTE)}
            world = await self._enter(stack, [*targets, *long_modes], DEFAULT_EAGER, **environment)
            self._say("targets of a minute, all modes at once, and shortened calls of an hour and a day")
            plan = Plan(name="minute", calls=5, in_flight=5, target_seconds=ONE_MINUTE, is_alone=False)
            batches, counts = await asyncio.gather(
                asyncio.gather(*(run_batch(world, mode, plan) for mode in targets)),
                asyncio.gather(*(count_requests(world, mode) for mode in long_modes)),
            )
        self._batches += batches
        self._long_calls = [replace(each, counted_requests=count) for each, count in zip(plans, counts, strict=False)]

    async def _measure_memory(self) -> None:
        environment = {"ORDER_FIRST_LEASE_SECONDS": "7200"}
        # Our processes are what is measured: the server need not pace their tasks.
        async with running_world(
            [SEPARATE], RAISED_EAGER, address=self._address, is_split=True, environment=environment
        ) as world:
            self._server = world.server.version
            self._say("memory: warming up")
            await run_batch(world, SEPARATE, Plan(name="warm-up", calls=1500, in_flight=50, seconds=120, samples=0))
            self._say(f"memory: bringing {IN_FLIGHT_FOR_MEMORY} calls into flight")
            self._memory = list(await fill(world, SEPARATE, calls=IN_FLIGHT_FOR_MEMORY, seconds=MEMORY_LIMIT_S))


def _chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        message = f"no {what} {', '.join(unknown)}; there are: {', '.join(known)}"
        raise argparse.ArgumentTypeError(message)
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes, settings = (
        ["default", *(mode.name for mode in NAMED_MODES)],
        [each.name.replace(", ", "-").replace(" ", "-") for each in SETTINGS],
    )
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, default server only; under two minutes"
    )
    parser.add_argument("--json", action="store_true", help="print rows and ratios as one JSON object, the last line")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where bench.md and its plots go (default: docs, for a full run)"
    )
    parser.add_argument(
        "--modes",
        type=lambda text: _chosen(text, modes, "mode"),
        metavar="A,B",
        help=f"measure only these of: {', '.join(modes)}; default is the bridge by its default transport, "
        "observed the same with metrics, console and spans; separate has a receiver of its own, unlogged the same "
        "without logs. Without --modes: all but observed and unlogged",
    )
    parser.add_argument(
        "--parts",
        type=lambda text: _chosen(text, PARTS, "part"),
        default=list(PARTS),
        metavar="A,B",
        help=f"measure only these of: {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--settings",
        type=lambda text: _chosen(text, settings, "setting"),
        metavar="A,B",
        help=f"run the server only so: {', '.join(settings)}",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of every part that has rounds")
    parser.add_argument(
        "--against",
        metavar="REF",
        help="compare this checkout with another commit of the repository: paired rounds of both (six, or --rounds), "
        "each in its own worktree and environment; prints median and 95%% interval of every ratio",
    )
    temporal_cli.add_address_option(parser)
    temporal_cli.add_server_option(parser)
    return parser


async def _bench(arguments: argparse.Namespace) -> int:
    temporal_cli.choose(arguments.server)
    if arguments.against is not None and arguments.temporal is not None:
        say("--against starts servers of its own: unset TEMPORAL_ADDRESS and leave out --temporal")
        return 2
    if arguments.against is not None:
        return await until_stopped(lambda: _compare(arguments))
    size = QUICK if arguments.quick else FULL
    if arguments.rounds is not None:
        size = replace(
            size, rounds=arguments.rounds, rounds_elsewhere=arguments.rounds, throughput_rounds=arguments.rounds
        )
    if arguments.settings is not None:
        named = {each.name.replace(", ", "-").replace(" ", "-"): each for each in SETTINGS}
        size = replace(size, settings=[named[name] for name in arguments.settings])
    if arguments.temporal is not None:
        # The flags of a given server stay as they are.
        size = replace(size, settings=size.settings[:1])
    chosen = [BRIDGE.name if name == "default" else name for name in arguments.modes or ()] or [
        mode.name for mode in MODES
    ]
    modes = [mode for mode in NAMED_MODES if mode.name in chosen]
    is_whole = not arguments.quick and modes == list(MODES) and len(arguments.parts) == len(PARTS)
    output = arguments.output or (ROOT / "docs" if is_whole and len(size.settings) == len(SETTINGS) else None)

    async def work() -> int:
        async with asyncio.timeout(LIMIT_S):
            results = await Bench(size=size, modes=modes, parts=arguments.parts, address=arguments.temporal).run()
        compared = ratios(
            results, subjects=[mode.name for mode in SUBJECTS], references=[mode.name for mode in REFERENCES]
        )
        say(summary(compared))
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            plots = draw(results, output)
            command = shlex.join(["./scripts/bench", *sys.argv[1:]])
            deployments = {mode.name: mode.deployment for mode in modes}
            text = markdown(results, compared, deployments=deployments, command=command, plots=plots)
            (output / "bench.md").write_text(text)
            say(f"report: {output / 'bench.md'}")
        if arguments.json:
            print(json.dumps(to_json(results, compared)), flush=True)
        return 0

    return await until_stopped(work)


async def _compare(arguments: argparse.Namespace) -> int:
    reference = arguments.against
    comparisons = await against.compare(reference, rounds=arguments.rounds or against.ROUNDS)
    say(against.table(comparisons, reference))
    if arguments.json:
        print(json.dumps(against.to_json(comparisons, reference)), flush=True)
    return 0


def main() -> NoReturn:
    """Parse the command line, measure and report."""
    end(_bench(_parser().parse_args()))


if __name__ == "__main__":
    main()
