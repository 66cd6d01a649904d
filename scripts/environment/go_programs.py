"""Programs that no package brings, built from the source of a Go module."""

import json
import os
import subprocess
from pathlib import Path

from scripts.environment.program_cache import on_path

GO_MISSING = "Go is not installed, which builds the programs that no package brings"


def find_go() -> Path | None:
    """The Go command on PATH, or where Go's own archive puts it."""
    usual = Path("/usr/local/go/bin/go")
    return on_path("go") or (usual if usual.exists() else None)


def module_folder(module: str) -> Path:
    """The unpacked source of *module*, written as path@version.

    Raises:
        RuntimeError: Go is missing, or the module cannot be downloaded.
    """
    return Path(json.loads(_go("mod", "download", "-json", module))["Dir"])


def build_program(module: str, package: str, into: Path) -> None:
    """Build *package*, a path inside *module*, as the static program *into*.

    Raises:
        RuntimeError: Go is missing, or the module cannot be downloaded or built.
    """
    source = str(module_folder(module))
    _go("build", "-C", source, "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", str(into), package)


def _go(*arguments: str) -> str:
    go = find_go()
    if go is None:
        raise RuntimeError(GO_MISSING)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off"}
    done = subprocess.run([go, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"`go {' '.join(arguments)}` failed:\n{(done.stderr or done.stdout).strip()[-2000:]}"
        raise RuntimeError(message)
    return done.stdout
