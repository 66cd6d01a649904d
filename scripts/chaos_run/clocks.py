"""Move the clocks of single processes, by libfaketime. The machine's clock and the server's stay as they are.

libfaketime is a library that a process loads before the C library. It reads the offset from a file once a second. Only
the time of day is moved, and not the monotonic clock, by which timers run.
"""

from collections.abc import Iterable
from pathlib import Path

MISSING = "libfaketime is not installed, so that no clock is moved (Debian and Ubuntu: apt-get install libfaketime)"

_FOLDERS = ("/usr/lib/*/faketime", "/usr/lib/faketime", "/usr/lib64/faketime", "/usr/local/lib/faketime")


_SHARED = ("/dev/shm/faketime_shm_", "/dev/shm/sem.faketime_sem_")


def find_library() -> Path | None:
    """Return the path of libfaketime for threads; None if it is not installed."""
    found = (path for folder in _FOLDERS for path in Path("/").glob(f"{folder[1:]}/libfaketimeMT.so.1"))
    return next(found, None)


def clean_up(pids: Iterable[int]) -> None:
    """Remove the shared memory that the library has made for these processes, which have ended."""
    for pid in pids:
        for prefix in _SHARED:
            Path(f"{prefix}{pid}").unlink(missing_ok=True)


class Clocks:
    """The clocks of the processes of a stack, by the names of the processes."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self._folder = folder

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment with which process *name* must be started."""
        if not self._file(name).exists():
            self.set(name, 0)
        return {
            "LD_PRELOAD": str(self._library),
            "FAKETIME_TIMESTAMP_FILE": str(self._file(name)),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # Otherwise every file seems to change when the clock moves.
            "NO_FAKE_STAT": "1",
            # Otherwise the timed waits of threads, Python's for its global lock too, are far too long.
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }

    def set(self, name: str, offset_s: float) -> None:
        """Set the clock of process *name* to *offset_s* ahead of the machine's."""
        self._file(name).write_text(f"{offset_s:+.0f}\n")

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.clock"
