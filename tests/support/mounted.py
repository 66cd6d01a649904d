"""The ways in which operators and platforms write files that a process reads."""

import os
from collections.abc import Callable
from pathlib import Path

Write = Callable[[Path, str], None]


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def by_rename(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    new.rename(path)


def by_rename_with_the_old_times(path: Path, text: str) -> None:
    new = path.with_name("new")
    new.write_text(text)
    before = path.stat()
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(path)


def by_symbolic_link(path: Path, text: str) -> None:
    """As Kubernetes updates a Secret: `path` -> `..data/key` -> `..2/key`, and a rename swaps `..data`."""
    folder = path.parent
    number = len(list(folder.iterdir()))
    version = folder / f"..{number}"
    version.mkdir()
    (version / "key").write_text(text)
    (folder / "..data_tmp").symlink_to(version.name)
    (folder / "..data_tmp").rename(folder / "..data")
    if not path.is_symlink():
        path.symlink_to("..data/key")


def in_place_with_the_old_times(path: Path, text: str) -> None:
    """As a copy that keeps times does: only the time of the change of the inode differs."""
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
