"""The example as containers: a run by the user's command, where a container engine runs or can be started."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from scripts.commands.containers import KILLED, plan_harm
from scripts.environment.container_engine import obstacle
from scripts.environment.go_programs import build_program, find_go
from scripts.environment.program_cache import cached
from scripts.environment.stack import ROOT
from tests.conftest import MAY_SKIP
from tests.support.kustomize import Resource, render

COMMAND = str(ROOT / "scripts" / "containers")
BY_MODULE = (sys.executable, "-m", "scripts.commands.containers")
KUSTOMIZE = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"


@pytest.fixture(name="engine")
def possible_engine() -> None:
    """Skips the test where no engine runs and none can be started."""
    answers = subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0
    reason = None if answers else obstacle()
    if reason is not None:
        pytest.skip(f"no container engine: {reason}")


@pytest.mark.part("containers")
@pytest.mark.usefixtures("engine")
@pytest.mark.timeout(3600)
def test_no_order_is_lost_while_every_container_is_restarted_and_three_are_killed() -> None:
    """200 orders, by the histories. The first run also builds the stand-ins, which takes minutes."""
    done = subprocess.run([COMMAND, "--seed", "1", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    nothing = dict.fromkeys(("lost", "wrong", "double", "pending", "undelivered"), 0)
    assert {name: report[name] for name in nothing} == nothing
    assert (report["orders"], report["killed"], report["untouched"]) == (200, 3, [])
    assert report["containers"] == len(lasting() | {"schema", "namespaces"})


@pytest.mark.part("containers")
@pytest.mark.usefixtures("engine")
@pytest.mark.timeout(3600)
def test_an_interrupted_run_takes_everything_down() -> None:
    """After Ctrl-C while the containers come up, neither a container nor an engine of the run is left."""
    with subprocess.Popen([COMMAND], stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stderr is not None
        said = ""
        while "bringing the containers up" not in said:
            line = run.stderr.readline()
            assert line, said
            said += line
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
        assert run.wait() == 130, rest
    assert "taking the containers down" in rest
    if "container engine: our own" in said:
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not [each for each in commands if b"bridge-engine-" in each]
    else:
        left = ["docker", "ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=callback-bridge-run"]
        assert subprocess.run(left, capture_output=True, check=True).stdout == b""


@pytest.mark.part("containers")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("side", ["caller", "handler"])
def test_kustomize_builds_what_the_tests_of_the_manifests_check(side: str) -> None:
    """The real program is the oracle of `tests/support/kustomize.py`."""
    if find_go() is None:
        pytest.skip("Go is not installed, which builds kustomize")
    folder = cached("kustomize-5.7.1", lambda into: build_program(KUSTOMIZE, ".", into / "kustomize"))
    overlay = ROOT / "deploy" / "kubernetes" / side
    built = subprocess.run([folder / "kustomize", "build", overlay], capture_output=True, text=True, check=True)

    def key(resource: Resource) -> tuple[str, str]:
        return resource["kind"], resource["metadata"]["name"]

    assert sorted(yaml.safe_load_all(built.stdout), key=key) == sorted(render(overlay), key=key)


def lasting() -> set[str]:
    """The services that run until they are stopped, without Temporal's UI, which has no stand-in."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    return {name for name, each in services.items() if each["restart"] == "unless-stopped"} - {"ui"}


def test_every_container_is_restarted_once_and_the_chosen_ones_are_killed() -> None:
    """The seed decides the order; all of it happens while orders are sent."""
    services = lasting()
    assert set(KILLED) == {"receiver-1", "handler-1", "postgres"} <= services
    harms = plan_harm(7, services, seconds=100)
    assert Counter(harm.service for harm in harms if not harm.is_kill) == Counter(services)
    assert Counter(harm.service for harm in harms if harm.is_kill) == Counter(KILLED)
    times = [harm.at for harm in harms]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 100
    assert plan_harm(7, services, seconds=100) == harms != plan_harm(8, services, seconds=100)


def test_without_an_engine_the_command_says_what_is_missing() -> None:
    """One line, and nothing is started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(BY_MODULE, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(MAY_SKIP)
    assert "docker" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_makes_no_sense_is_refused() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["--orders", "0"]
    done = subprocess.run(
        [*BY_MODULE, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "usage: scripts/containers" in done.stderr
