"""Parts of a server that are killed and started again."""

import os
import sys
from pathlib import Path

import pytest

from scripts.environment.processes import ServerPart
from scripts.environment.temporal_cli import NoServerError

PROGRAM = """
import pathlib, sys, time
print("I began", flush=True)
with open("starts", "a") as starts:
    starts.write("x")
down = pathlib.Path("down")
if down.exists():
    down.write_text(down.read_text()[1:])
    down.read_text() or down.unlink()
    sys.exit(3)
pathlib.Path("ready").touch()
time.sleep(600)
"""
"""Ends at once as often as the file `down` is long; else it is ready when it has made the file `ready`."""


def part(folder: Path) -> ServerPart:
    async def is_ready() -> bool:
        found = (folder / "ready").exists()
        (folder / "ready").unlink(missing_ok=True)
        return found

    return ServerPart(
        "part", [sys.executable, "-c", PROGRAM], is_ready=is_ready, log=folder / "log", options={"cwd": folder}
    )


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_killed_part_is_started_again_until_it_is_ready(tmp_path: Path) -> None:
    """The part that it needs may be down as well, and then it ends at once."""
    made = part(tmp_path)
    try:
        await made.start()
        first = made.pid
        (tmp_path / "down").write_text("12")
        await made.restart(0)
        assert not runs(first)
        assert runs(made.pid)
        assert made.exit_code is None
        assert len((tmp_path / "starts").read_text()) == 4
    finally:
        await made.stop()
    assert not runs(made.pid)


async def test_a_part_that_ends_at_its_first_start_says_why(tmp_path: Path) -> None:
    """It is not tried again: its configuration is wrong. The error ends with what the process printed."""
    (tmp_path / "down").write_text("1")
    with pytest.raises(NoServerError, match=r"the part ended at once with code 3:\nI began$"):
        await part(tmp_path).start()
    assert (tmp_path / "starts").read_text() == "x"


async def test_a_part_that_was_never_started_can_be_stopped(tmp_path: Path) -> None:
    """An earlier part may have failed to start."""
    await part(tmp_path).stop()
