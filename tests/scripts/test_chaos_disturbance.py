"""The harm that is done to the processes of a stack: here to a real process that is not ours."""

import contextlib
from pathlib import Path

import pytest

from scripts.chaos_run.disturbance import Disturbance, Equipment
from scripts.chaos_run.fault_proxy import FaultProxy
from scripts.chaos_run.schedule import Harm, HarmKind
from scripts.environment.processes import stop_process
from scripts.environment.server import Server
from scripts.environment.stack import Stack, StackOptions, start_process

NAME = "payment-worker"
OPTIONS = StackOptions(
    separate=True,
    # Prints a line when it listens, and then runs until it is stopped.
    payment_worker=("http.server", "0", "--bind", "127.0.0.1"),
    environment={"PYTHONUNBUFFERED": "1"},
)


@pytest.mark.parametrize(
    "kinds", [[HarmKind.KILL_HANDLER_WORKER], [HarmKind.REMOVE_PLUGIN], []], ids=["killed", "without plugin", "no harm"]
)
async def test_a_process_that_ended_by_itself_is_recorded_and_runs_again(tmp_path: Path, kinds: list[HarmKind]) -> None:
    """Whichever harm finds it, and also if none does. A process that runs is not recorded."""
    server = Server(address="127.0.0.1:1", ui=None, version="1.29.1")
    urls = {"receiver_url": "http://127.0.0.1:1", "service_url": "http://127.0.0.1:1"}
    stack = Stack(folder=tmp_path, servers={"caller": server, "handler": server}, processes={}, **urls)
    async with contextlib.AsyncExitStack() as started:
        await start_process(stack, OPTIONS, NAME)
        started.push_async_callback(lambda: stop_process(stack.processes[NAME]))
        disturbance = Disturbance(stack, OPTIONS, FaultProxy(iter(())), Equipment(library=None, disks=None))
        harms = [Harm(at=0, kind=kind, victims=(NAME,), down_s=0) for kind in kinds]
        await disturbance.carry_out(harms)
        assert disturbance.died == []

        first = stack.processes[NAME]
        first.terminate()
        await first.wait()
        await disturbance.carry_out(harms)
        assert disturbance.died == [f"{NAME} with code -15"]
        assert stack.processes[NAME].returncode is None
