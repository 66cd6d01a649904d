"""Make calls with known answers while a seeded schedule does harm, then judge the calls by the histories.

The command starts the example with two of each process, a Temporal server with a database file, and a bad network
between the two sides. It kills and restarts all of these. The caller's workers have interceptors that change all
activities, their codec fails at times, and the clocks of the caller's processes jump. The command exits with 1 if any
call was lost, answered wrongly, made twice, is still pending, or did not get its outcome. The same seed and sizes give
the same schedule. Everything is on the loopback.
"""

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from temporalio.client import Client
from temporalio.service import RPCError

from handler.sweep.workflow import SWEEP_WORKFLOW
from scripts.chaos_run import clocks
from scripts.chaos_run.calls import Call, plan_calls
from scripts.chaos_run.disks import Disks, NoDisksError
from scripts.chaos_run.disturbance import Disturbance, Equipment
from scripts.chaos_run.fault_proxy import FaultKind, FaultProxy
from scripts.chaos_run.load import OPEN, connect_both, count, make_call, read_runs, until_quiet
from scripts.chaos_run.schedule import (
    CALLBACK_FAULTS,
    PROCESSES,
    ROUND_S,
    SERVER_PARTS,
    START_FAULTS,
    HarmKind,
    plan_faults,
    plan_harm,
)
from scripts.chaos_run.verdict import Recovery, Run, Verdict, judge, recoveries
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import say
from scripts.environment.stack import (
    CALLER_NAMESPACE,
    HANDLER_NAMESPACE,
    StackOptions,
    port_of,
    running_stack,
)

_QUICK = (200, 20, 30.0)
_USUAL = (2_000, 110, 360.0)
_LONG = (10_000, 1_000, 3_200.0)
"""Calls, kills, and seconds of harm."""
_TICK_S = 10.0
_LOAD_PATIENCE_S = 900.0
"""Longest time after the planned end until all calls are made and all processes run again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run does."""

    seed: int
    calls: int
    kills: int
    seconds: float
    """How long calls are made and harm is done."""
    down_s: float
    """How long both receivers are down, in seconds."""
    first_lease: float
    """In seconds."""
    renewal: float
    """Interval between renewals in seconds. It does not grow."""
    settlement: float
    """Duration of a payment that settles, in seconds."""
    patience: float
    """After this time after the last harm, in which no workflow has ended, the open calls count as pending. Seconds."""
    keep: bool
    temporal: str | None
    """Address of a server that is used and not restarted; None starts one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run left."""

    callers: Sequence[Run]
    handlers: Sequence[Run]
    disturbance: Disturbance
    seconds: float
    """How long calls were made and harm was done."""


async def run_chaos(plan: Plan, *, as_json: bool) -> int:
    """Make one run and return the exit code."""
    starts = FaultProxy(plan_faults(plan.seed, "starts", START_FAULTS))
    callbacks = FaultProxy(plan_faults(plan.seed, "callbacks", CALLBACK_FAULTS))
    calls = plan_calls(plan.seed, calls=plan.calls, seconds=plan.seconds, settlement=plan.settlement)
    with _equipment() as equipment:
        async with starts.running(), callbacks.running():
            outcome = await _make_run(plan, calls, equipment, starts=starts, callbacks=callbacks)
    faults = starts.counts + callbacks.counts
    del faults[FaultKind.NONE]
    counts = Counter({kind.value: 0 for kind in (*HarmKind, *FaultKind) if kind is not FaultKind.NONE})
    counts.update(harm.name for harm in outcome.disturbance.done)
    counts.update({kind.value: count for kind, count in faults.items()})
    verdict = judge(calls, callers=outcome.callers, handlers=outcome.handlers)
    slowest = recoveries(calls, callers=outcome.callers, handlers=outcome.handlers, harms=outcome.disturbance.done)
    _report(plan, verdict, counts, slowest, outcome)
    if as_json:
        recovery_s = round(slowest[0].recovery_s, 1) if slowest else None
        facts = {"seed": plan.seed, "calls": len(calls), "harm": counts, **verdict.counts()}
        print(json.dumps({**facts, "slowest_recovery_s": recovery_s}), flush=True)
    return 1 if any(verdict.counts().values()) else 0


@contextlib.contextmanager
def _equipment() -> Iterator[Equipment]:
    """What the machine has for clocks and disks. What it lacks is said."""
    library = clocks.find_library()
    if library is None:
        say(clocks.MISSING)
    with contextlib.ExitStack() as stack:
        try:
            disks = stack.enter_context(Disks.mounted(PROCESSES))
        except NoDisksError as error:
            say(str(error))
            disks = None
        equipment = Equipment(library=library, disks=disks)
        stack.callback(lambda: clocks.clean_up(equipment.pids))
        yield equipment


async def _make_run(
    plan: Plan, calls: Sequence[Call], equipment: Equipment, *, starts: FaultProxy, callbacks: FaultProxy
) -> Outcome:
    options = StackOptions(
        ui=False,
        temporal=plan.temporal,
        durable=True,
        separate=True,
        first_lease=plan.first_lease,
        renewal=plan.renewal,
        renewal_maximum=plan.renewal,
        settlement=plan.settlement,
        receivers=2,
        handlers=2,
        order_workers=2,
        payment_workers=2,
        handlers_with_worker=1,
        public_receiver_url=callbacks.url,
        public_service_url=starts.url,
        keep=plan.keep,
        order_worker=("scripts.chaos_run.disturbed_orders",),
        payment_worker=("scripts.chaos_run.payment_worker",),
        own_environment=equipment.environment,
    )
    async with running_stack(options) as stack:
        starts.upstream, callbacks.upstream = port_of(stack.service_url), port_of(stack.receiver_url)
        server = stack.servers["caller"]
        clients = await connect_both(server.address)
        # The verdict counts every run of the two namespaces, and a seed makes the same ids each time.
        if any([await count(client, f"WorkflowType != '{SWEEP_WORKFLOW}'") for client in clients]):
            message = f"{plan.temporal} has earlier runs in {CALLER_NAMESPACE} or {HANDLER_NAMESPACE}: use a new server"
            raise temporal_cli.NoServerError(message)
        other_servers = {kind for kind, parts in SERVER_PARTS.items() if not set(parts) <= set(server.parts)}
        left_out = equipment.lacking | other_servers
        harms = [
            harm
            for harm in plan_harm(plan.seed, kills=plan.kills, seconds=plan.seconds, down_s=plan.down_s)
            if harm.kind not in left_out
        ]
        disturbance = Disturbance(stack, options, callbacks, equipment)
        say(f"seed {plan.seed}: {len(calls)} calls and {len(harms)} harms in {plan.seconds:g} s")
        progress = asyncio.create_task(_report_progress(clients, calls, disturbance))
        began = time.monotonic()
        try:
            await _load(clients, calls, disturbance.carry_out(harms), patience=plan.seconds + _LOAD_PATIENCE_S)
            seconds = time.monotonic() - began
            starts.calm()
            callbacks.calm()
            await until_quiet(clients, plan.patience)
        finally:
            progress.cancel()
        say("reading the histories of both namespaces …")
        callers, handlers = [await read_runs(client) for client in clients]
        return Outcome(
            callers=callers,
            handlers=handlers,
            disturbance=disturbance,
            seconds=seconds,
        )


async def _load(
    clients: Sequence[Client], calls: Sequence[Call], harm: Coroutine[Any, Any, None], *, patience: float
) -> None:
    """Make all calls during *harm*. Return when both are done, or *patience* seconds are over."""
    try:
        async with asyncio.timeout(patience), asyncio.TaskGroup() as load:
            load.create_task(harm)
            for call in calls:
                load.create_task(make_call(clients, call))
    except TimeoutError:
        # The verdict lists the calls that are missing.
        say("not all calls were made in time, or not all processes were started again in time")
    except ExceptionGroup as errors:
        error = errors.exceptions[0]
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        message = f"the run cannot go on: {type(error).__name__}: {error}"
        raise RuntimeError(message) from errors


async def _report_progress(clients: Sequence[Client], calls: Sequence[Call], disturbance: Disturbance) -> None:
    began = time.monotonic()
    while True:
        await asyncio.sleep(_TICK_S)
        try:
            [closed] = [await count(clients[0], "ExecutionStatus != 'Running' AND WorkflowType = 'OrderWorkflow'")]
            waiting = [await count(client, OPEN) for client in clients]
        except RPCError:
            state = "the server is unavailable"
        else:
            state = f"{closed} of {len(calls)} calls ended, open {waiting[0]} + {waiting[1]}"
        say(f"{time.monotonic() - began:.0f} s: {state}, {len(disturbance.done)} harms done")


def _report(
    plan: Plan,
    verdict: Verdict,
    counts: Counter[str],
    slowest: Sequence[Recovery],
    outcome: Outcome,
) -> None:
    """Print the result for people."""
    disturbance = outcome.disturbance
    say("\nharm       " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    say(f"killed     {disturbance.killed} of our processes in {outcome.seconds:.0f} s")
    for name in disturbance.died:
        say(f"by itself  {name}")
    for sentence in list(verdict.sentences())[:50]:
        say(f"NOT right  {sentence}")
    for each in slowest[:2]:
        say(f"slowest    {each.workflow_id}, {each.recovery_s:.1f} s after the last harm that it met: {each.why}")
    for each in sorted(slowest, key=lambda recovery: -recovery.late_s)[:2]:
        say(f"latest     {each.workflow_id}, {each.late_s:.1f} s late in all: {each.why}")
    if slowest and disturbance.done:
        after = max(recovery.ended_at for recovery in slowest) - max(harm.ended for harm in disturbance.done)
        say(f"last end   {after:+.1f} s after the last harm was mended; two renewals are {2 * plan.renewal:g} s")
    figures = ", ".join(f"{count} {name}" for name, count in verdict.counts().items())
    say(f"{plan.calls} calls: {figures}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, help="of schedule, calls and faults (default: a new one, which is printed)")
    parser.add_argument("--calls", type=int, metavar="N", help="calls to make (2000; quick: 200; long: 10000)")
    parser.add_argument("--kills", type=int, metavar="N", help="processes to kill (110; quick: 20; long: 1000)")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long to do harm (360; quick: 30; long: 3200)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a short run, about a minute in all")
    size.add_argument("--long", action="store_true", help="a run of an hour, in which the receivers are down for 5 min")
    parser.add_argument("--first-lease", type=float, default=5.0, metavar="S", help="seconds, default %(default)s")
    parser.add_argument(
        "--renewal", type=float, default=10.0, metavar="S", help="seconds between renewals, default %(default)s"
    )
    temporal_cli.add_address_option(parser)
    temporal_cli.add_server_option(parser)
    parser.add_argument("--keep", action="store_true", help="keep settings, logs and database")
    parser.add_argument(
        "--json", action="store_true", help="print the facts as one JSON object, the last line of output"
    )


def _plan(parser: argparse.ArgumentParser, given: argparse.Namespace) -> Plan:
    calls, kills, seconds = _QUICK if given.quick else _LONG if given.long else _USUAL
    calls = calls if given.calls is None else given.calls
    if given.kills is not None or given.seconds is not None:
        # Derive the missing one, so that the density of the kills is that of the default.
        density = kills / seconds
        seconds = given.seconds if given.seconds is not None else max(10.0, given.kills / density)
        kills = given.kills if given.kills is not None else max(1, round(seconds * density))
    if min(calls, kills) < 1 or seconds < 10 or seconds > 3600 or min(given.first_lease, given.renewal) < 1:
        parser.error("calls and kills start at 1, seconds at 10 and end at 3600, leases and renewals start at 1")
    is_short = seconds < ROUND_S
    return Plan(
        seed=random.randrange(10**6) if given.seed is None else given.seed,
        calls=calls,
        kills=kills,
        seconds=seconds,
        # Longer than a target waits for its receiver, so that delivery workflows are started.
        down_s=11.0 if is_short else 300.0 if given.long else 30.0,
        first_lease=given.first_lease,
        renewal=given.renewal,
        settlement=3.0,
        # A call pauses for up to a minute if an interceptor ended its waiting activity again and again. A lost attempt
        # takes 15 s more.
        patience=100.0 if is_short else 150.0,
        keep=given.keep,
        temporal=given.temporal,
    )


def main() -> NoReturn:
    """Parse the command line and make the run."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=(__doc__ or "").partition("\n\n")[0])
    _add_arguments(parser)
    given = parser.parse_args()
    plan = _plan(parser, given)
    temporal_cli.choose(given.server)
    end(until_stopped(lambda: run_chaos(plan, as_json=given.json)))


if __name__ == "__main__":
    main()
