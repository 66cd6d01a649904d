"""A short chaos run by the user's command: every call ends once and correctly, although every process is killed."""

import asyncio
import json
import signal
import subprocess
from pathlib import Path

import pytest

from scripts.chaos_run.clocks import MISSING, find_library
from scripts.chaos_run.fault_proxy import FaultKind
from scripts.chaos_run.schedule import VICTIMS, HarmKind
from scripts.environment.server import running_server
from scripts.environment.stack import ROOT
from tests.support.helpers import assert_eventually

pytestmark = pytest.mark.usefixtures("no_named_server")

CHAOS = str(ROOT / "scripts" / "chaos")


@pytest.mark.part("chaos", short=True)
@pytest.mark.timeout(320)
def test_no_call_is_lost_wrong_or_made_twice_under_chaos() -> None:
    """The run has 200 calls, 20 kills, a killed server, and every other harm at least once.

    Clocks are moved only where libfaketime is installed, which is not part of the project. Disks are filled only where
    they can be mounted. A node of the server and its database are killed only with `--server postgres`.
    """
    done = subprocess.run(
        [CHAOS, "--quick", "--seed", "1", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    harm = report.pop("harm")
    assert report.pop("slowest_recovery_s") >= 0
    nothing = {"lost": 0, "wrong": 0, "double": 0, "pending": 0, "undelivered": 0}
    assert report == {"seed": 1, "calls": 200, **nothing}, done.stderr
    assert sum(harm[kind] for kind in VICTIMS) == 20
    elsewhere = {HarmKind.KILL_SERVER_NODE, HarmKind.KILL_DATABASE}
    several = {*VICTIMS, HarmKind.MOVE_CLOCK, HarmKind.FILL_DISK}
    assert {harm[kind] for kind in elsewhere} == {0}
    once = {kind.value for kind in HarmKind if kind not in several | elsewhere}
    assert {kind: harm[kind] for kind in once} == dict.fromkeys(once, 1)
    assert harm[HarmKind.MOVE_CLOCK] == (4 if find_library() else 0)
    assert (MISSING in done.stderr) == (find_library() is None)
    assert harm[HarmKind.FILL_DISK] == (0 if "no disk is filled" in done.stderr else 2)
    assert set(harm) == {each.value for each in (*HarmKind, *FaultKind) if each is not FaultKind.NONE}
    assert all(harm[kind] for kind in FaultKind if kind is not FaultKind.NONE)


@pytest.mark.part("chaos")
@pytest.mark.timeout(300)
async def test_a_given_server_is_used_and_never_restarted() -> None:
    """A second run on it is refused, because its verdict would count the runs of the first."""
    async with running_server(namespaces=["order-prod", "payment-prod"]) as server:
        command = [CHAOS, "--quick", "--calls", "20", "--kills", "5", "--json", "--temporal", server.address]

        async def run() -> tuple[int, str, str]:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, said = await process.communicate()
            assert process.returncode is not None
            return process.returncode, out.decode(), said.decode()

        code, out, said = await run()
        assert code == 0, said
        report = json.loads(out.splitlines()[-1])
        assert report["harm"][HarmKind.RESTART_SERVER] == 0
        assert (report["calls"], report["lost"], report["double"]) == (20, 0, 0)
        code, _, said = await run()
        assert code != 0
        assert "use a new server" in said


@pytest.mark.part("chaos")
async def test_an_interrupted_run_ends_all_that_it_started() -> None:
    """After Ctrl-C during the run, no process of the run is left."""
    process = await asyncio.create_subprocess_exec(
        *(CHAOS, "--quick", "--seed", "2"), stderr=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stderr is not None
    while b"seed 2:" not in (line := await asyncio.wait_for(process.stderr.readline(), 60)):
        assert line, "it ended before it began"
    children = _children(process.pid)
    assert len(children) >= 9
    drain = asyncio.create_task(process.stderr.read())
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 60) == 130
    await drain

    async def gone() -> None:
        left = [child for child in children if Path(f"/proc/{child}").exists()]
        assert not left

    await assert_eventually(gone)


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--kills", "0"], id="no kills"),
        pytest.param(["--calls", "0"], id="no calls"),
        pytest.param(["--seconds", "1"], id="too short"),
        pytest.param(["--quick", "--long"], id="two sizes"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(arguments: list[str]) -> None:
    """The arguments are checked before anything is started."""
    done = subprocess.run([CHAOS, *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "usage: scripts/chaos" in done.stderr
