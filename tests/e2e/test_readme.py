"""The README's files and commands work in the README's order in an empty folder."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from scripts.environment import temporal_cli
from scripts.environment.server import free_ports, stop_process
from scripts.environment.stack import ROOT
from tests.support.helpers import assert_eventually

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    """The code blocks of one language in order, without the indentation that a list gives them."""
    found = [(match[1], match[3]) for match in BLOCK.finditer(README) if match[2] == language]
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


@pytest.fixture(name="newcomer")
def newcomers_environment(tmp_path: Path) -> dict[str, str]:
    """The variables of a newcomer's shell: a new environment, in which the README's command installs the package.

    The dependencies are those of the tests' environment, so that nothing is downloaded.
    """
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    checkout = tmp_path / "callback-bridge"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("bridge", "caller", "handler"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "project").mkdir()
    path = os.pathsep.join([str(environment / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "BRIDGE_", "PYTHON"))
    }
    shell = kept | {"PATH": path, "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    [install] = [block for block in blocks("sh") if block.startswith("pip install")]
    subprocess.run(
        install, shell=True, check=True, cwd=tmp_path, env=shell | {"PIP_PYTHON": str(environment / "bin" / "python")}
    )
    return shell


@contextlib.asynccontextmanager
async def running(command: str, *, folder: Path, shell: dict[str, str]) -> AsyncIterator[None]:
    """Keep one command of the README running, as in a terminal."""
    with (folder / f"{abs(hash(command))}.log").open("wb") as log:
        process = await asyncio.create_subprocess_shell(
            f"exec env {command}", cwd=folder, env=shell, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        await stop_process(process)


async def run(command: str, *, folder: Path, shell: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command of the README that ends by itself."""
    return await asyncio.to_thread(
        subprocess.run,
        command,
        shell=True,
        cwd=folder,
        env=shell,
        timeout=60,
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.part("readme", short=True)
async def test_a_newcomer_follows_the_readme(newcomer: dict[str, str], tmp_path: Path) -> None:
    """The files, settings and processes of the README pay an order; only ports differ from the README."""
    folder = tmp_path / "project"
    program = await temporal_cli.find(temporal_cli.chosen())
    server_port, receiver_port, service_port = free_ports(3)
    shell = newcomer | {
        "PATH": f"{program.parent}{os.pathsep}{newcomer['PATH']}",
        "TEMPORAL_ADDRESS": f"127.0.0.1:{server_port}",
    }
    for text in blocks("python"):
        title = re.match(r"# (\w+\.py)\n", text)
        assert title is not None, text
        (folder / title[1]).write_text(text.replace("localhost:7233", f"127.0.0.1:{server_port}"))
    start, init, handler, worker, order = [block.strip() for block in blocks("sh")[-5:]]
    async with running(f"{start} --headless --port {server_port}", folder=folder, shell=shell):
        assert (await run(init, folder=folder, shell=shell)).returncode == 0
        for name in ("caller.toml", "handler.toml"):
            text = (folder / name).read_text()
            text = text.replace("8080", str(receiver_port)).replace("8081", str(service_port))
            (folder / name).write_text(text)

        async def answers() -> None:
            listed = await run("temporal workflow list --namespace payment-prod --limit 1", folder=folder, shell=shell)
            assert listed.returncode == 0

        await assert_eventually(answers)
        async with running(handler, folder=folder, shell=shell), running(worker, folder=folder, shell=shell):
            done = await run(order, folder=folder, shell=shell)
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert "paid 12.50" in done.stdout
