"""A container engine with Compose: the engine that runs already, or one that is started here and ends with its context.

An engine that is started here keeps its images in the user's cache. It shares no folder, socket and network with any
other engine.
"""

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.environment.go_programs import GO_MISSING, build_program, find_go
from scripts.environment.processes import stop_process
from scripts.environment.program_cache import cached, folder_of, on_path
from scripts.environment.progress import with_ticker

COMPOSE_VERSION = "2.40.3"
_PACKAGES = "Debian: apt-get install docker.io iptables mmdebstrap"
_PATIENCE_S = 60


class NoEngineError(Exception):
    """No container engine runs, and none can be started. The text begins with "no container engine"."""


class ContainerError(RuntimeError):
    """A command of the engine failed. The text is the command and the end of its output."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that answers."""

    docker: Path
    compose: tuple[str, ...]
    """The command that runs Compose 2."""
    environment: Mapping[str, str]
    is_own: bool
    """Whether this process started the engine, so that no other user has images in it."""

    async def run(self, *command: str | Path, timeout_s: float = 1800) -> str:
        """Run *command* with this engine, and return its standard output.

        Raises:
            ContainerError: The command failed, or did not end in time.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Not in our process group: Ctrl-C reaches us, and we end them in order.
            start_new_session=True,
        )
        try:
            out, said = await asyncio.wait_for(process.communicate(), timeout_s)
        except TimeoutError:
            message = f"`{_shown(command)}` did not end within {timeout_s:g} s"
            raise ContainerError(message) from None
        finally:
            await stop_process(process)
        if process.returncode != 0:
            message = f"`{_shown(command)}` failed:\n{(said or out).decode(errors='replace').strip()[-2000:]}"
            raise ContainerError(message)
        return out.decode(errors="replace")


def obstacle() -> str | None:
    """Why no engine can be started here; None if one can. An engine that runs already is not considered."""
    if sys.platform != "linux":
        return "only Linux can start one; start Docker yourself"
    missing = [name for name in ("docker", "dockerd", "iptables", "mmdebstrap") if on_path(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed ({_PACKAGES})"
    if os.geteuid() != 0:
        return "only root can start one; start Docker yourself, or run the command as root"
    return None if find_go() else GO_MISSING


@contextlib.asynccontextmanager
async def running_engine() -> AsyncIterator[Engine]:
    """The engine that runs already (DOCKER_HOST, or the default socket), or a new one.

    Raises:
        NoEngineError: No engine answers, and none can be started.
    """
    docker = on_path("docker")
    if docker is not None and await _answers(docker, os.environ):
        yield await _with_compose(docker, os.environ, is_own=False)
        return
    reason = obstacle()
    if reason is not None or docker is None:
        message = f"no container engine: none answers, and {reason}"
        raise NoEngineError(message)
    data = folder_of("container-engine")
    data.mkdir(parents=True, exist_ok=True)
    with _locked(data), tempfile.TemporaryDirectory(prefix="bridge-engine-") as folder:
        environment = {**os.environ, "DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_BUILDKIT": "0"}
        with (Path(folder) / "log").open("wb") as log:
            # Without a bridge of its own: each network that Compose makes has one.
            process = await asyncio.create_subprocess_exec(
                *(str(on_path("dockerd")), "--host", environment["DOCKER_HOST"], "--bridge=none"),
                *("--data-root", str(data), "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            await with_ticker("starting a container engine", _until_ready(docker, environment, process, Path(folder)))
            yield await _with_compose(docker, environment, is_own=True)
        finally:
            await stop_process(process, patience=60)
            _unmount(folder)


def _unmount(folder: str) -> None:
    """Unmount what an engine that had to be killed left below *folder*, which could not be removed otherwise."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for point in reversed([each for each in points if each.startswith(f"{folder}/")]):
        subprocess.run(["umount", point], check=False)


async def _answers(docker: Path, environment: Mapping[str, str]) -> bool:
    command = (docker, "version", "--format", "{{.Server.Version}}")
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    return await process.wait() == 0


async def _until_ready(
    docker: Path, environment: Mapping[str, str], process: asyncio.subprocess.Process, folder: Path
) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE_S):
            while process.returncode is None:
                if await _answers(docker, environment):
                    return
                await asyncio.sleep(0.2)
    said = (folder / "log").read_text(errors="replace").strip()[-1000:]
    message = f"no container engine: dockerd does not start here:\n{said}"
    raise NoEngineError(message)


async def _with_compose(docker: Path, environment: Mapping[str, str], *, is_own: bool) -> Engine:
    engine = Engine(docker=docker, compose=(str(docker), "compose"), environment=environment, is_own=is_own)
    try:
        await engine.run(*engine.compose, "version")
    except ContainerError:
        name = f"docker-compose-{COMPOSE_VERSION}"
        if not folder_of(name).is_dir() and find_go() is None:
            message = f"no container engine: Docker Compose 2 is not installed, and {GO_MISSING}"
            raise NoEngineError(message) from None
        module = f"github.com/docker/compose/v2@v{COMPOSE_VERSION}"
        building = asyncio.to_thread(cached, name, lambda into: build_program(module, "./cmd", into / "docker-compose"))
        folder = await with_ticker(f"building Docker Compose {COMPOSE_VERSION} (once)", building)
        return Engine(docker=docker, compose=(str(folder / "docker-compose"),), environment=environment, is_own=is_own)
    return engine


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"no container engine: another run uses the images in {folder}; wait for its end"
            raise NoEngineError(message) from None
        yield


def _shown(command: tuple[str | Path, ...]) -> str:
    return " ".join(str(part) for part in command)[:200]
