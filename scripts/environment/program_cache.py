"""Programs that are installed once, into the user's cache, because no package of the virtual environment has them."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"


def cached(name: str, install: Callable[[Path], None]) -> Path:
    """The folder *name* of the cache. If it is missing, *install* fills it. No other process sees half of it."""
    folder = folder_of(name)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
                made = Path(aside) / "made"
                made.mkdir()
                install(made)
                made.rename(folder)
    return folder


def install_package(requirements: str, into: Path) -> str | None:
    """Install the packages that the file *requirements* pins. Returns pip's last line where that failed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    pinned = ["--require-hashes", "--requirement", str(REQUIREMENTS / requirements), "--target", str(into)]
    done = subprocess.run([*pip, *pinned], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1][:200]


def on_path(name: str) -> Path | None:
    """The program *name* on PATH, also in the folders of system services."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    return None if found is None else Path(found)


def folder_of(name: str) -> Path:
    """Where the cache has the folder *name*, or would have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "callback-bridge" / name
