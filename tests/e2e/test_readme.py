"""The README's files and commands work in the README's order in an empty folder."""

import os
from pathlib import Path

import pytest

from scripts.environment import temporal_cli
from scripts.environment.server import free_ports
from tests.support.helpers import assert_eventually
from tests.support.newcomer import blocks, install, run, terminal, write_files


@pytest.mark.part("readme", short=True)
async def test_a_newcomer_follows_the_readme(tmp_path: Path) -> None:
    """The files, settings and processes of the README pay an order; only ports differ from the README."""
    folder = tmp_path / "project"
    folder.mkdir()
    installed = install(tmp_path)
    program = await temporal_cli.find(temporal_cli.chosen())
    server_port, receiver_port, service_port = free_ports(3)
    shell = installed | {
        "PATH": f"{program.parent}{os.pathsep}{installed['PATH']}",
        "TEMPORAL_ADDRESS": f"127.0.0.1:{server_port}",
    }
    write_files("README.md", folder, temporal=f"127.0.0.1:{server_port}")
    start, init, handler, worker, order = [block.strip() for block in blocks("README.md", "sh")[-5:]]
    async with terminal(f"{start} --headless --port {server_port}", folder=folder, shell=shell):
        assert (await run(init, folder=folder, shell=shell)).returncode == 0
        for name in ("caller.toml", "handler.toml"):
            text = (folder / name).read_text()
            text = text.replace("8080", str(receiver_port)).replace("8081", str(service_port))
            (folder / name).write_text(text)

        async def answers() -> None:
            listed = await run("temporal workflow list --namespace payment-prod --limit 1", folder=folder, shell=shell)
            assert listed.returncode == 0

        await assert_eventually(answers)
        async with terminal(handler, folder=folder, shell=shell), terminal(worker, folder=folder, shell=shell):
            done = await run(order, folder=folder, shell=shell)
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert "paid 12.50" in done.stdout
