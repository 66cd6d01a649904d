"""The disks of a chaos run: real file systems that are full for a time."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.chaos_run.disks import Disks, NoDisksError
from scripts.chaos_run.disturbance import Equipment
from scripts.chaos_run.schedule import HarmKind

SIZE = 128 * 1024


@pytest.fixture
def disks() -> Iterator[Disks]:
    """Two small disks. Only root may mount them, and not in every container."""
    try:
        with Disks.mounted(["one", "two"], size=SIZE) as mounted:
            yield mounted
    except NoDisksError as error:
        pytest.skip(str(error))


def test_a_full_disk_takes_no_byte_of_its_process_until_it_is_emptied(disks: Disks, tmp_path: Path) -> None:
    """The log is on the disk, and so are temporary files. The other process is not disturbed."""
    temporary = {name: Path(disks.environment(tmp_path, name)["TMPDIR"]) for name in ("one", "two")}
    with (tmp_path / "one.log").open("ab", buffering=0) as log:
        log.write(b"before\n")
        disks.fill("one")
        with pytest.raises(OSError, match="No space left"):
            log.write(b"x")
        with pytest.raises(OSError, match="No space left"):
            (temporary["one"] / "file").write_bytes(b"x")
        (temporary["two"] / "file").write_bytes(b"x")
        disks.empty("one")
        log.write(b"after\n")
    assert (tmp_path / "one.log").read_text().split() == ["before", "after"]


def test_a_log_whose_last_page_the_disk_does_not_hold_does_not_stop_the_filling(disks: Disks, tmp_path: Path) -> None:
    """The page would need room that is gone. The disk is full all the same."""
    disks.environment(tmp_path, "one")
    with (tmp_path / "one.log").open("ab", buffering=0) as log:
        log.truncate(10)
        disks.fill("one")
        with pytest.raises(OSError, match="No space left"):
            log.write(b"x")


def test_a_log_that_is_kept_outlives_its_disk(tmp_path: Path) -> None:
    """At the end it is an ordinary file, and the disk is gone."""
    try:
        with Disks.mounted(["one"], size=SIZE) as disks:
            disks.environment(tmp_path, "one")
            (tmp_path / "one.log").write_text("line\n")
            assert (tmp_path / "one.log").is_symlink()
    except NoDisksError as error:
        pytest.skip(str(error))
    assert not (tmp_path / "one.log").is_symlink()
    assert (tmp_path / "one.log").read_text() == "line\n"
    assert str(disks.folder("one")) not in Path("/proc/mounts").read_text()


def test_where_nothing_can_be_mounted_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The run then goes on without this harm. The same holds for clocks without libfaketime."""
    assert Equipment(library=None, disks=None).lacking == {HarmKind.MOVE_CLOCK, HarmKind.FILL_DISK}
    assert Equipment(library=tmp_path, disks=Disks(tmp_path)).lacking == set()
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = pytest.raises(NoDisksError, match=r"^no disk is filled, because mount fails: No such file")
    with expected, Disks.mounted(["one"]):
        pass
