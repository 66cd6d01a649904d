"""Bring the example up as containers, restart all of them while orders run, kill some, and judge by the histories.

The command uses `Dockerfile` and `compose.yaml` unchanged, from a copy of the checkout with secrets of its own. If no
container engine runs, it starts one, and builds stand-ins for the published images from packages. It exits with 1 if an
order was lost, answered wrongly, made twice, is still pending, or did not get its outcome, or if a container does not
become healthy again. At the end, also after Ctrl-C, it takes everything down.
"""

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from temporalio.client import Client
from temporalio.service import RPCError

from scripts.chaos_run.load import OPEN, connect_both, count, make_call, read_runs, until_quiet
from scripts.chaos_run.schedule import Call, plan_calls
from scripts.chaos_run.verdict import judge
from scripts.commands.up import end, until_stopped
from scripts.environment.container_engine import ContainerError, Engine, NoEngineError, running_engine
from scripts.environment.progress import say, with_ticker
from scripts.environment.stack import ORDER_QUEUE, ROOT
from scripts.environment.stand_in_images import TARGETS, build_stand_ins

ADDRESS = "127.0.0.1:7233"
"""Where `compose.yaml` publishes the Temporal server."""
PROJECT = "callback-bridge-run"
"""Not the name in `compose.yaml`, so that a developer's own containers and data stay as they are."""
KILLED = ("receiver-1", "handler-1", "postgres")
DOCTORS = {
    "receiver-1": ("receiver", "doctor", "--task-queue", ORDER_QUEUE),
    "handler-1": ("handler", "doctor", "--module", "examples.payments.payments"),
}
"""Commands that must find nothing wrong before the first order, by the container that runs each."""

_DOWN_S = 3.0
"""How long a killed container is down."""
_HEALTH_S = 300.0
"""Longest time until all containers are healthy."""
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


@dataclass(frozen=True, kw_only=True)
class Project:
    """The services of `compose.yaml`, run from a copy of the checkout."""

    engine: Engine
    folder: Path
    services: Mapping[str, Mapping[str, Any]]
    """Those that are run, as Compose reads them, by name."""

    async def compose(self, *arguments: str, timeout_s: float = 900) -> str:
        """Run a command of Compose."""
        options = ("--project-name", PROJECT, "--project-directory", str(self.folder), "--progress", "plain")
        return await self.engine.run(*self.engine.compose, *options, *arguments, timeout_s=timeout_s)

    async def states(self) -> dict[str, str]:
        """The state of each service's container: "healthy", or what it is instead."""
        lines = (await self.compose("ps", "--all", "--format", "json")).splitlines()
        found = {}
        for container in map(json.loads, lines):
            name, state = container["Service"], container["Health"] or container["State"]
            found[name] = state if state != "exited" else f"ended with code {container['ExitCode']}"
        return found

    async def unhealthy(self) -> list[str]:
        """What is not as it should be: lasting services are healthy, the others have ended well."""
        states = await self.states()
        right = {
            name: "ended with code 0" if service["restart"].startswith("on-failure") else "healthy"
            for name, service in self.services.items()
        }
        return [f"{name}: {states.get(name, 'missing')}" for name in right if states.get(name) != right[name]]

    async def started_at(self) -> dict[str, str]:
        """When each service's container was started last."""
        ids = (await self.compose("ps", "--all", "--quiet")).split()
        template = '{{index .Config.Labels "com.docker.compose.service"}} {{.State.StartedAt}}'
        lines = await self.engine.run(self.engine.docker, "inspect", "--format", template, *ids)
        return dict(line.split() for line in lines.splitlines())


async def run_containers(plan: Plan, *, as_json: bool) -> int:
    """Make one run and return the exit code."""
    began = time.monotonic()
    try:
        async with running_engine() as engine:
            say(f"container engine: {'our own' if engine.is_own else 'the one that runs already'}")
            with tempfile.TemporaryDirectory(prefix="bridge-containers-") as folder:
                project = await _prepare(engine, Path(folder) / "checkout", plan)
                async with _running(project):
                    ready_s = time.monotonic() - began
                    verdict, untouched = await _harm_and_judge(project, plan)
    except NoEngineError as error:
        say(str(error))
        return 1
    facts = {"seed": plan.seed, "orders": plan.orders, "containers": len(project.services), "killed": len(KILLED)}
    say(", ".join(f"{number} {name}" for name, number in verdict.items()))
    if as_json:
        stand_ins = plan.stand_ins or engine.is_own
        print(
            json.dumps({**facts, "stand_ins": stand_ins, "ready_s": round(ready_s), **verdict, "untouched": untouched}),
            flush=True,
        )
    return 1 if any(verdict.values()) or untouched else 0


async def _prepare(engine: Engine, folder: Path, plan: Plan) -> Project:
    """Copy the checkout, make secrets, and build or pull all images."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".venv.lock", "secrets", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    await engine.run(sys.executable, folder / "deploy" / "new_secrets.py")
    project = Project(engine=engine, folder=folder, services={})
    services = json.loads(await project.compose("config", "--format", "json"))["services"]
    ours = services["receiver-1"]["image"]
    network: tuple[str, ...] = ()
    if plan.stand_ins or engine.is_own:
        services = {
            name: each
            for name, each in services.items()
            if each["image"] == ours or each["image"].partition(":")[0] in TARGETS
        }
        await build_stand_ins(engine, {each["image"] for each in services.values()} - {ours})
        network = ("--network", "host")
    await with_ticker(f"building {ours}", engine.run(engine.docker, "build", *network, "--tag", ours, folder))
    return Project(engine=engine, folder=folder, services=services)


@contextlib.asynccontextmanager
async def _running(project: Project) -> AsyncIterator[None]:
    """Bring the services up, and take them down with their data. Keep their logs if something failed."""
    try:
        await with_ticker(
            "bringing the containers up", project.compose("up", "--detach", "--no-build", *project.services)
        )
        await with_ticker("waiting until all containers are healthy", _until_healthy(project))
        for service, command in DOCTORS.items():
            await project.compose("exec", "--no-TTY", service, "callback-bridge", *command)
        yield
    except (ContainerError, RPCError):
        with contextlib.suppress(ContainerError):
            logs = Path(tempfile.mkdtemp(prefix="bridge-containers-")) / "containers.log"
            logs.write_text(await project.compose("logs", "--no-color", "--timestamps"))
            say(f"the containers' logs: {logs}")
        raise
    finally:
        await with_ticker(
            "taking the containers down",
            asyncio.shield(project.compose("down", "--volumes", "--remove-orphans", "--timeout", "10")),
        )


async def _until_healthy(project: Project) -> None:
    """Wait until every container is as it should be.

    Raises:
        ContainerError: One is not, after some minutes.
    """
    deadline = time.monotonic() + _HEALTH_S
    while found := await project.unhealthy():
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(1)
    if found:
        message = f"not all containers are healthy after {_HEALTH_S:g} s: {', '.join(found)}"
        raise ContainerError(message)


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
        await _until_healthy(project)
        await until_quiet(clients, plan.patience)
    except ExceptionGroup as errors:
        message = f"the run cannot go on: {errors.exceptions[0]}"
        raise ContainerError(message) from errors
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
