"""The services of `compose.yaml` in a container engine, from a copy of the checkout with secrets of its own."""

import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.environment.container_engine import ContainerError, Engine
from scripts.environment.progress import say, with_ticker
from scripts.environment.stack import ROOT
from scripts.environment.stand_in_images import TARGETS, build_stand_ins

PROJECT = "callback-bridge-run"
"""Not the name in `compose.yaml`, so that a developer's own containers and data stay as they are."""
HEALTH_S = 300.0
"""Longest time until all containers are healthy."""


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

    async def until_healthy(self) -> None:
        """Wait until every container is as it should be.

        Raises:
            ContainerError: One is not, after some minutes.
        """
        deadline = time.monotonic() + HEALTH_S
        while found := await self.unhealthy():
            if time.monotonic() > deadline:
                message = f"not all containers are healthy after {HEALTH_S:g} s: {', '.join(found)}"
                raise ContainerError(message)
            await asyncio.sleep(1)


async def prepare_project(engine: Engine, folder: Path, *, stand_ins: bool) -> Project:
    """Copy the checkout into *folder*, make secrets, and build our image and, if wanted, the stand-ins."""
    ignored = shutil.ignore_patterns(".git", ".venv", ".venv.lock", "secrets", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    await engine.run(sys.executable, folder / "deploy" / "new_secrets.py")
    project = Project(engine=engine, folder=folder, services={})
    services = json.loads(await project.compose("config", "--format", "json"))["services"]
    ours = services["receiver-1"]["image"]
    network: tuple[str, ...] = ()
    if stand_ins:
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
async def running_project(project: Project) -> AsyncIterator[None]:
    """Bring the services up, and take them down with their data. Keep their logs if something failed."""
    try:
        await with_ticker(
            "bringing the containers up", project.compose("up", "--detach", "--no-build", *project.services)
        )
        await with_ticker("waiting until all containers are healthy", project.until_healthy())
        yield
    except ContainerError:
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
