"""Bring the example up as containers, restart all of them while orders run, kill some, and judge by the histories.

The command uses `Dockerfile` and `compose.yaml` unchanged, from a copy of the checkout with secrets of its own. If no
container engine runs, it starts one, and builds stand-ins for the published images from packages. It exits with 1 if an
order was lost, answered wrongly, made twice, is still pending, or did not get its outcome, or if a container does not
become healthy again. At the end, also after Ctrl-C, it takes everything down.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from temporalio.client import Client
from temporalio.service import RPCError

from scripts.chaos_run.calls import Call, plan_calls
from scripts.chaos_run.load import OPEN, connect_both, count, make_call, read_runs, until_quiet
from scripts.chaos_run.verdict import judge
from scripts.environment.command_end import end, until_stopped
from scripts.environment.compose_project import Project, prepare_project, running_project
from scripts.environment.container_engine import ContainerError, NoEngineError, running_engine
from scripts.environment.progress import say
from scripts.environment.stack import ORDER_QUEUE

ADDRESS = "127.0.0.1:7233"
"""Where `compose.yaml` publishes the Temporal server."""
KILLED = ("receiver-1", "handler-1", "postgres")
DOCTORS = {
    "receiver-1": ("receiver", "doctor", "--task-queue", ORDER_QUEUE),
    "handler-1": ("handler", "doctor", "--module", "examples.payments.payments"),
}
"""Commands that must find nothing wrong before the first order, by the container that runs each."""

_DOWN_S = 3.0
"""How long a killed container is down."""
_TICK_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one run does."""

    seed: int
    orders: int
    seconds: float
    """How long orders are sent and harm is done."""
    patience: float
    """Longest time after the last harm until an order counts as pending, in seconds."""
    stand_ins: bool
    """Build stand-ins also in an engine that runs already."""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """One restart or kill of a container."""

    at: float
    """Seconds after the load began."""
    service: str
    is_kill: bool


def plan_harm(seed: int, services: Collection[str], *, seconds: float) -> list[Harm]:
    """Restart each of *services* once and kill those of `KILLED`, in an order that *seed* decides."""
    victims = [(name, False) for name in sorted(services)] + [(name, True) for name in KILLED]
    random.Random(f"{seed} containers").shuffle(victims)
    pause = 0.9 * seconds / len(victims)
    return [
        Harm(at=(number + 1) * pause, service=name, is_kill=is_kill) for number, (name, is_kill) in enumerate(victims)
    ]


async def run_containers(plan: Plan, *, as_json: bool) -> int:
    """Make one run and return the exit code."""
    began = time.monotonic()
    try:
        async with running_engine() as engine:
            say(f"container engine: {'our own' if engine.is_own else 'the one that runs already'}")
            with tempfile.TemporaryDirectory(prefix="bridge-containers-") as folder:
                stand_ins = plan.stand_ins or engine.is_own
                project = await prepare_project(engine, Path(folder) / "checkout", stand_ins=stand_ins)
                async with running_project(project):
                    for service, command in DOCTORS.items():
                        await project.compose("exec", "--no-TTY", service, "callback-bridge", *command)
                    ready_s = time.monotonic() - began
                    verdict, untouched = await _harm_and_judge(project, plan)
    except NoEngineError as error:
        say(str(error))
        return 1
    facts = {"seed": plan.seed, "orders": plan.orders, "containers": len(project.services), "killed": len(KILLED)}
    say(", ".join(f"{number} {name}" for name, number in verdict.items()))
    if as_json:
        facts |= {"stand_ins": stand_ins, "ready_s": round(ready_s)}
        print(json.dumps({**facts, **verdict, "untouched": untouched}), flush=True)
    return 1 if any(verdict.values()) or untouched else 0


async def _harm_and_judge(project: Project, plan: Plan) -> tuple[dict[str, int], list[str]]:
    """Send the orders while harm is done. Return the mistakes by kind, and the services that were not restarted."""
    clients = await connect_both(ADDRESS)
    calls = plan_calls(plan.seed, calls=plan.orders, seconds=plan.seconds, settlement=5.0)
    harms = plan_harm(plan.seed, project.services, seconds=plan.seconds)
    before = await project.started_at()
    say(f"seed {plan.seed}: {len(calls)} orders and {len(harms)} restarts and kills in {plan.seconds:g} s")
    progress = asyncio.create_task(_report_progress(clients, calls))
    try:
        async with asyncio.TaskGroup() as load:
            load.create_task(_carry_out(project, harms))
            for call in calls:
                load.create_task(make_call(clients, call))
        await project.until_healthy()
        await until_quiet(clients, plan.patience)
    except (ExceptionGroup, RPCError) as error:
        reason = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        message = f"the run cannot go on: {reason}"
        raise ContainerError(message) from error
    finally:
        progress.cancel()
    after = await project.started_at()
    untouched = [name for name in project.services if after[name] == before[name]]
    say("reading the histories of both namespaces …")
    callers, handlers = [await read_runs(client) for client in clients]
    verdict = judge(calls, callers=callers, handlers=handlers)
    for sentence in [*verdict.sentences(), *(f"not restarted: {name}" for name in untouched)][:50]:
        say(f"NOT right  {sentence}")
    return verdict.counts(), untouched


async def _carry_out(project: Project, harms: list[Harm]) -> None:
    """Do every harm at its time, one after the other."""
    began = time.monotonic()
    for harm in harms:
        await asyncio.sleep(max(0.0, began + harm.at - time.monotonic()))
        say(f"{time.monotonic() - began:.0f} s: {'killing' if harm.is_kill else 'restarting'} {harm.service}")
        if harm.is_kill:
            await project.compose("kill", "--signal", "KILL", harm.service)
            await asyncio.sleep(_DOWN_S)
            await project.compose("start", harm.service)
        else:
            await project.compose("restart", "--no-deps", harm.service)


async def _report_progress(clients: list[Client], calls: tuple[Call, ...]) -> None:
    while True:
        await asyncio.sleep(_TICK_S)
        try:
            closed = await count(clients[0], "ExecutionStatus != 'Running' AND WorkflowType = 'OrderWorkflow'")
            waiting = [await count(client, OPEN) for client in clients]
        except RPCError:
            say("  the server is unavailable")
        else:
            say(f"  {closed} of {len(calls)} orders ended, open {waiting[0]} + {waiting[1]}")


def main() -> NoReturn:
    """Parse the command line and make the run."""
    parser = argparse.ArgumentParser(prog="scripts/containers", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, help="of orders and harm (default: a new one, which is printed)")
    parser.add_argument("--orders", type=int, default=200, metavar="N", help="orders to send, default %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=200.0, metavar="S", help="how long to do harm, default %(default)s"
    )
    parser.add_argument(
        "--patience", type=float, default=300.0, metavar="S", help="for the last orders, seconds, default %(default)s"
    )
    parser.add_argument(
        "--stand-ins",
        action="store_true",
        help="build stand-ins also in an engine that runs already; they replace images of the same names there",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the facts as one JSON object, the last line of output"
    )
    given = parser.parse_args()
    if given.orders < 1 or not 30 <= given.seconds <= 3600 or given.patience < 0:
        parser.error("orders start at 1, seconds at 30 and end at 3600, patience starts at 0")
    plan = Plan(
        seed=random.randrange(10**6) if given.seed is None else given.seed,
        orders=given.orders,
        seconds=given.seconds,
        patience=given.patience,
        stand_ins=given.stand_ins,
    )
    end(until_stopped(lambda: run_containers(plan, as_json=given.json)))


if __name__ == "__main__":
    main()
