"""A newcomer's folder: the package installed in an environment of its own, and the commands of a page in terminals."""

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

from scripts.environment.processes import stop_process
from scripts.environment.stack import ROOT
from tests.support.helpers import assert_eventually

BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
Shell = dict[str, str]
"""The variables of a shell."""


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of *page* in one language in order, without the indentation that a list gives them."""
    found = [(match[1], match[3]) for match in BLOCK.finditer((ROOT / page).read_text()) if match[2] == language]
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def write_files(page: str, folder: Path, *, temporal: str) -> None:
    """Save the Python blocks of *page* under the names in their first lines."""
    for text in blocks(page, "python"):
        title = re.match(r"# (\w+\.py)\n", text)
        assert title is not None, text
        (folder / title[1]).write_text(text.replace("localhost:7233", temporal))


def install(folder: Path) -> Shell:
    """A new environment below *folder*, in which the README's command installs the package from its wheel.

    The dependencies are those of the tests' environment, so that nothing is downloaded.
    """
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python3.*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    checkout = folder / "callback-bridge"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("bridge", "caller", "handler"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = os.pathsep.join([str(environment / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TEMPORAL_", "BRIDGE_", "PYTHON"))
    }
    shell = kept | {"PATH": path, "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1"}
    [command] = [block for block in blocks("README.md", "sh") if block.startswith("pip install")]
    pip = shell | {"PIP_PYTHON": str(environment / "bin" / "python")}
    subprocess.run(command, shell=True, check=True, cwd=folder, env=pip)
    return shell


class Terminal:
    """One command that runs, and what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    @property
    def text(self) -> str:
        return self._log.read_text()

    async def starts(self) -> None:
        """Wait until the service of the command listens, or has ended."""

        async def check() -> None:
            assert '"url": ' in self.text or self.process.returncode is not None

        await assert_eventually(check)

    async def shows(self, *parts: str) -> None:
        """Wait until one line has all *parts*."""

        async def check() -> None:
            lines = self.text.splitlines()
            assert any(all(part in line for part in parts) for line in lines), f"{parts} in:\n{self.text}"

        await assert_eventually(check)


@contextlib.asynccontextmanager
async def terminal(command: str, *, folder: Path, shell: Shell) -> AsyncIterator[Terminal]:
    """Run *command* as in a terminal, and end it with the block."""
    number = len([*folder.glob("*.log")])
    log = folder / f"{number}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_shell(
            f"exec env {command}", cwd=folder, env=shell, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield Terminal(process, log)
    finally:
        await stop_process(process)


async def run(command: str, *, folder: Path, shell: Shell) -> "subprocess.CompletedProcess[str]":
    """Run a command that ends by itself."""
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
