"""docs/compatibility.md names the versions and names that the repository has."""

import re
import tomllib
from datetime import UTC, datetime

import pytest

from bridge.http.peer_check import first_problem
from bridge.protocol.echo import PROTOCOL_VERSION, Echo
from scripts.environment import temporal_cli
from scripts.environment.stack import ROOT
from tests.e2e.test_npm_peers import PACKAGES

PAGE = (ROOT / "docs" / "compatibility.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_pinned_server_has_a_row() -> None:
    """In the order of the versions."""
    assert re.findall(r"^\| (\d+\.\d+\.\d+) \|", PAGE, flags=re.MULTILINE) == temporal_cli.versions()


@pytest.mark.parametrize("package", ["temporalio", "nexus-rpc"])
def test_the_versions_of_the_suite_are_the_locked_ones(package: str) -> None:
    locked = (ROOT / "scripts" / "requirements" / "run.txt").read_text()
    [version] = re.findall(rf"^{package}(?:\[\w+\])?==(\S+)", locked, flags=re.MULTILINE)
    assert f"{package} {version}" in PAGE


@pytest.mark.parametrize("package", PACKAGES)
def test_the_versions_of_the_npm_peers_are_those_that_run(package: str) -> None:
    name, _, version = package.partition("@")
    assert f"{name} {version}" in PAGE


def test_the_version_of_the_protocol_and_the_sentence_about_another_one_are_the_present_ones() -> None:
    assert f"It is {PROTOCOL_VERSION}." in PAGE
    rung, sentence = first_problem(Echo(version=2), now=datetime.now(UTC))
    assert rung == "version"
    assert f"`{sentence}`" in PAGE


def test_every_name_that_the_wheel_installs_is_on_the_page() -> None:
    """The packages, the command and the pytest plugin."""
    packages = [each.rstrip("*") for each in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]]
    plugins = PROJECT["project"]["entry-points"]["pytest11"]
    for name in (*packages, *PROJECT["project"]["scripts"], *plugins, *plugins.values()):
        assert f"`{name}`" in PAGE, name
