"""Temporal's server as production has it: two nodes and PostgreSQL."""

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from temporalio.client import Client

from scripts.chaos_run.schedule import VICTIMS, HarmKind
from scripts.environment.production_server import DATABASE, NODES, require_possible
from scripts.environment.server import running_server
from scripts.environment.stack import ROOT
from scripts.environment.temporal_cli import CHOICE_VARIABLE, POSTGRES, NoServerError
from tests.support.helpers import CALLER, assert_eventually


@pytest.fixture(autouse=True)
def possible_server(no_named_server: None) -> None:
    """Skips the test where the server cannot run."""
    try:
        require_possible()
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.mark.part("postgres")
@pytest.mark.timeout(1200)
async def test_two_nodes_share_one_cluster_and_either_is_enough(tmp_path: Path) -> None:
    """Both own a part of the histories. While either is dead, clients reach what was written before."""
    async with running_server(namespaces=[CALLER], choice=POSTGRES, log=tmp_path / "log") as server:
        assert set(server.parts) == {DATABASE, *NODES}

        async def shared() -> None:
            owned = [await asyncio.to_thread(_shards, url) for url in server.metrics]
            assert sum(owned) == 16
            assert all(owned)

        await assert_eventually(shared, within=120)
        client = await Client.connect(server.address, namespace=CALLER)
        await client.start_workflow("Unknown", id="before", task_queue="none")
        for name in NODES:
            await server.parts[name].kill()
            try:

                async def known() -> None:
                    described = await client.get_workflow_handle("before").describe()
                    assert described.id == "before"
                    assert (await client.count_workflows()).count == 1

                await assert_eventually(known, within=120)
            finally:
                await server.parts[name].start()
    assert not [part for part in server.parts.values() if Path(f"/proc/{part.pid}").exists()]


@pytest.mark.part("postgres")
@pytest.mark.timeout(1800)
def test_sweep_and_lists_pass_on_the_visibility_of_postgresql() -> None:
    """The tests of the sweep, of `deliveries`, `calls` and `runs`, each process of which starts such a server."""
    paths = ("tests/handler/sweep", "tests/handler/admin", "tests/e2e/test_calls_and_runs.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "-n", "1", *paths],
        cwd=ROOT,
        env={**os.environ, CHOICE_VARIABLE: POSTGRES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def _shards(metrics: str) -> int:
    with urllib.request.urlopen(metrics, timeout=10) as response:
        text = response.read().decode()
    return sum(int(float(each)) for each in re.findall(r"^numshards_gauge\S* (\S+)", text, flags=re.MULTILINE))


@pytest.mark.part("postgres", short=True)
@pytest.mark.timeout(1200)
def test_no_call_is_lost_wrong_or_made_twice_while_nodes_and_database_are_killed() -> None:
    """The run has 60 calls, 6 kills of our processes, and one of each part of the server. The first run builds it."""
    command = [str(ROOT / "scripts" / "chaos"), "--quick", "--calls", "60", "--kills", "6", "--seconds", "30"]
    done = subprocess.run(
        [*command, "--seed", "1", "--server", POSTGRES, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    nothing = dict.fromkeys(("lost", "wrong", "double", "pending", "undelivered"), 0)
    assert {name: report[name] for name in nothing} == nothing
    harm = report["harm"]
    assert (report["calls"], sum(harm[kind] for kind in VICTIMS)) == (60, 6)
    assert (harm[HarmKind.KILL_SERVER_NODE], harm[HarmKind.KILL_DATABASE], harm[HarmKind.RESTART_SERVER]) == (2, 1, 0)
