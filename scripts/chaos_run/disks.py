"""Small disks in memory, one for each process, that can be filled and emptied. No other process uses them.

A disk holds the log of its process and its temporary files. While the disk is full, a write fails with ENOSPC. Linux
lets only root mount such a disk; without it no disk is filled.
"""

import contextlib
import errno
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_SIZE = 64 * 1024 * 1024
"""Bytes of one disk. It takes memory only for what it holds."""
_FILLING = "filling"
_BLOCK = bytes(1024 * 1024)


class NoDisksError(RuntimeError):
    """No disk can be mounted. The text says why, and what that means for the run."""


class Disks:
    """The disks of the processes of a stack, by the names of the processes."""

    def __init__(self, root: Path) -> None:
        """*root* has one mounted folder for each process."""
        self._root = root
        self._logs: dict[str, Path] = {}

    @classmethod
    @contextlib.contextmanager
    def mounted(cls, names: Iterable[str], *, size: int = _SIZE) -> Iterator["Disks"]:
        """Mount one disk of *size* bytes for each name. At the end copy the logs that were kept, and unmount.

        Raises:
            NoDisksError: This user or system cannot mount them.
        """
        with tempfile.TemporaryDirectory(prefix="callback-bridge-disks-") as folder, contextlib.ExitStack() as stack:
            disks = cls(Path(folder))
            for name in names:
                disk = disks.folder(name)
                disk.mkdir()
                _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(disk))
                # Lazily, because a killed process may still be ending.
                stack.callback(_run, "umount", "--lazy", str(disk))
            stack.callback(disks._copy_logs)
            yield disks

    def folder(self, name: str) -> Path:
        """Return the folder of the disk of process *name*."""
        return self._root / name

    def environment(self, stack_folder: Path, name: str) -> dict[str, str]:
        """Return the environment with which process *name* must be started. Its log moves to its disk."""
        log = self._logs[name] = stack_folder / f"{name}.log"
        if not log.is_symlink():
            log.symlink_to(self.folder(name) / log.name)
        return {"TMPDIR": str(self.folder(name))}

    def fill(self, name: str) -> None:
        """Fill the disk of process *name*, so that each later write fails."""
        with _until_full(), (self.folder(name) / _FILLING).open("wb", buffering=0) as file:
            while True:
                file.write(_BLOCK)
        with contextlib.suppress(FileNotFoundError), _until_full(), self._logs[name].open("ab", buffering=0) as log:
            # What is left of the last page of a file could still be written, if the disk holds that page.
            log.write(b"\n" * (-log.seek(0, os.SEEK_END) % resource.getpagesize()))

    def empty(self, name: str) -> None:
        """Make room on the disk of process *name* again."""
        (self.folder(name) / _FILLING).unlink(missing_ok=True)

    def _copy_logs(self) -> None:
        for log in self._logs.values():
            # A stack that keeps nothing has removed its folder.
            if log.is_symlink() and log.exists():
                content = log.read_bytes()
                log.unlink()
                log.write_bytes(content)


@contextlib.contextmanager
def _until_full() -> Iterator[None]:
    """End the block at the first write that the disk has no room for."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        reason = str(error.strerror)
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr).partition("\n")[0]
    else:
        return
    message = f"no disk is filled, because {command[0]} fails: {reason} (root on Linux may mount a tmpfs)"
    raise NoDisksError(message)
