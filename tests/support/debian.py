"""Programs of Debian's packages, unpacked into the user's cache, without being installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.environment.program_cache import cached, on_path


def debian_program(name: str, package: str) -> Path:
    """The program *name*: the one on PATH, or that of Debian's *package*. Skips the test where it cannot be had."""
    found = on_path(name)
    if found is not None:
        return found
    try:
        folder = cached(f"debian-{package}", lambda into: _unpack(package, into))
    except OSError as error:
        pytest.skip(f"{name} is neither on PATH nor can it be installed: {error}")
    return next(path for path in (folder / "usr/bin" / name, folder / "usr/sbin" / name) if path.exists())


def _unpack(package: str, into: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        message = "there is no apt-get"
        raise OSError(message)
    archives = into / "archives"
    (archives / "partial").mkdir(parents=True)
    options = ["-o", "Debug::NoLocking=1", "-o", f"Dir::Cache::archives={archives}"]
    install = ["apt-get", "install", "-y", "--download-only", "--no-install-recommends", *options, package]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(done.stderr.strip()[-200:])
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, into], check=True)
