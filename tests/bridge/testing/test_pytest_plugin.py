"""The pytest plugin: a project's tests get its fixtures, and other projects notice nothing of it."""

import subprocess
import sys
import tomllib
from pathlib import Path

from scripts.environment.stack import ROOT

MODULE = "bridge.pytest_plugin"

UNUSED = """
import sys

def test_it() -> None:
    assert not [each for each in ("bridge.testing", "caller", "handler", "aiohttp") if each in sys.modules]
"""

USED = """
import asyncio
import pytest
from tests.support.targets import Ask, ProbeService, Reply

def test_it(fake_endpoints) -> None:
    fake_endpoints.on(ProbeService.probe, service=ProbeService, endpoint="payments").returns(Reply("faked"))
    fake_endpoints._problems.append("unexpected call of ProbeService/shared")
"""


def outcomes(folder: Path, test: str, *, autoload: bool = False) -> str:
    """Run *test* in a project of its own, with the plugin. Without *autoload* no installed plugin is loaded."""
    (folder / "test_it.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", MODULE, "-p", "no:cacheprovider", "--rootdir", str(folder)]
    environment = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": ""}
    environment |= {} if autoload else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    ran = subprocess.run(
        [*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return ran.stdout + ran.stderr


def test_a_run_that_names_the_plugin_may_also_find_it_installed(tmp_path: Path) -> None:
    """As in a checkout in which `pip install .` was run. The test fails if pytest finds two plugins, or none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [(name, module)] = project["project"]["entry-points"]["pytest11"].items()
    assert module == MODULE
    installed = tmp_path / "callback_bridge-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: callback-bridge\nVersion: 1\n")
    (installed / "entry_points.txt").write_text(f"[pytest11]\n{name} = {module}\n")
    report = outcomes(tmp_path, USED, autoload=True)
    assert "1 passed, 1 error" in report, report


def test_a_test_run_that_does_not_use_the_plugin_imports_neither_side(tmp_path: Path) -> None:
    """No server and no HTTP client is imported before a test asks for the kit."""
    assert "1 passed" in outcomes(tmp_path, UNUSED)


def test_an_unexpected_call_fails_the_test_that_uses_the_fixture(tmp_path: Path) -> None:
    """The report names the call, although the body of the test passed."""
    report = outcomes(tmp_path, USED)
    assert "1 passed, 1 error" in report
    assert "AssertionError: unexpected call of ProbeService/shared" in report
