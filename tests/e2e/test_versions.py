"""The core of the tests passes on every declared Python, and with the lowest and the newest dependencies."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from packaging.requirements import Requirement

from scripts.environment.stack import ROOT

LOCKED = ("--require-hashes", "--requirement", str(ROOT / "scripts" / "requirements" / "dev.txt"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEWEST = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
"""What pip chooses from the whole index, and no lock."""
OTHERS = [
    version
    for _, _, version in (each.partition(" :: Python :: ") for each in PROJECT["classifiers"])
    if version and version != f"{sys.version_info.major}.{sys.version_info.minor}"
]
"""The declared versions of Python except the one on which the suite itself runs."""


def lower_bounds() -> Iterator[str]:
    """Every dependency of a running service, at the lowest version that pyproject.toml allows."""
    extras = PROJECT["optional-dependencies"]
    for each in [*PROJECT["dependencies"], *extras["console"], *extras["otel"]]:
        requirement = Requirement(each)
        [lowest] = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        yield f"{requirement.name}=={lowest}"


def find_python(version: str) -> str:
    """A Python of *version*, such as "3.12", on PATH or installed by pyenv. Without one, the test is skipped."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    found = [which(f"python{version}"), *sorted(str(each) for each in pyenv.glob(f"{version}.*/bin/python"))]
    show = "import sys; print('%d.%d' % sys.version_info[:2])"
    for program in filter(None, found):
        # On PATH there may be a shim of pyenv, which fails where its version is not chosen.
        said = subprocess.run([program, "-c", show], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version:
            return program
    pytest.skip(f"no Python {version} is on PATH or installed by pyenv")


def run(*command: str | Path) -> None:
    """Run *command* in the checkout. Its last lines are the message of the failure."""
    done = subprocess.run(
        [str(each) for each in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def assert_core_passes(folder: Path, program: str, *requirements: str) -> None:
    """Run the core of the tests in a new environment below *folder*, with *requirements* installed."""
    environment = folder / "environment"
    run(program, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    # Python compiles what it imports, which is a small part of the packages.
    run(*pip, "install", "--quiet", "--no-compile", *requirements)
    run(*pip, "check")
    run(python, "-m", "pytest", "--quiet", "--tier", "core", "-n", "2")


@pytest.mark.part("lowest")
@pytest.mark.timeout(1800)
def test_the_core_passes_with_the_lowest_dependencies(tmp_path: Path) -> None:
    """Each lower bound exists and is high enough."""
    assert_core_passes(tmp_path, sys.executable, *NEWEST, *lower_bounds())


@pytest.mark.part("newest")
@pytest.mark.timeout(1800)
def test_the_core_passes_with_the_newest_dependencies(tmp_path: Path) -> None:
    """A user without our lock gets these."""
    assert_core_passes(tmp_path, sys.executable, *NEWEST)


@pytest.mark.part("python")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", OTHERS)
def test_the_core_passes_on_every_other_declared_python(version: str, tmp_path: Path) -> None:
    """With the locked dependencies."""
    assert_core_passes(tmp_path, find_python(version), *LOCKED)
