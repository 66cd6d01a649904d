"""Short runs of the scale and the soak command by the user's commands, with all that they start."""

import json
import subprocess
from pathlib import Path

import pytest

from scripts.environment.stack import ROOT

pytestmark = pytest.mark.usefixtures("no_named_server")

SCALE, SOAK = (str(ROOT / "scripts" / name) for name in ("scale", "soak"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)


@pytest.mark.part("scale", short=True)
@pytest.mark.timeout(600)
def test_calls_in_flight_survive_a_restart_of_everything_and_all_end(tmp_path: Path) -> None:
    """The curve has five points. After the kill every call is answered once, as the histories show."""
    done = run(SCALE, "--quick", "--parts", "calls", "--json", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["calls in flight"] for row in report["tables"]["memory"]] == [10, 20, 40, 80, 160]
    assert all(row["receiver"] > 0 for row in report["tables"]["memory"])
    assert report["restart"]["served_s"] >= report["restart"]["ready_s"] > 0
    assert report["ending"]["mistakes"] == dict.fromkeys(("lost", "wrong", "double", "pending", "undelivered"), 0)
    assert report["ending"]["completions"] >= report["ending"]["calls"] == 160
    text = (tmp_path / "scale.md").read_text()
    assert "All checks passed." in text
    assert {path.name for path in tmp_path.glob("*.svg")} == {
        f"scale-{name}.svg" for name in ("memory", "descriptors", "minute")
    }


@pytest.mark.part("scale")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["attached", "age", "history", "closed"])
def test_each_part_measures_its_sizes(part: str) -> None:
    """Two sizes each, on a server of its own. Only times may differ on a busy machine; what is counted may not grow."""
    done = run(SCALE, "--quick", "--parts", part, "--json")
    assert done.returncode in {0, 1}, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    rows, faults = report["tables"][part], report["faults"]
    assert len(rows) == 2
    first, last = (next(iter(row.values())) for row in rows)
    assert first < last
    assert all(row["own CPU ms"] > 0 for row in rows)
    assert [fault for fault in faults if " ms " not in fault] == []
    assert done.returncode == (1 if faults else 0)


@pytest.mark.part("soak")
@pytest.mark.timeout(600)
def test_a_short_soak_run_pays_every_order_and_judges_every_value(tmp_path: Path) -> None:
    """The verdict of so short a run may differ; a full run needs half an hour."""
    done = run(SOAK, "--quick", "--json", "--output", str(tmp_path))
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["paid"] == report["orders"] > 0, done.stderr
    assert {"receiver, MB", "handler, threads", "pending calls", "p99 of an order, ms"} <= set(report["values"])
    assert done.returncode == (1 if report["faults"] else 0)
    assert "| receiver, MB |" in (tmp_path / "scale.md").read_text()


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([SCALE, "--parts", "calls,moon"], id="an unknown part"),
        pytest.param([SCALE, "--calls", "1"], id="too few calls"),
        pytest.param([SOAK, "--minutes", "0"], id="no time"),
    ],
)
@pytest.mark.part("scale")
@pytest.mark.timeout(600)
def test_a_run_that_makes_no_sense_is_refused(command: list[str]) -> None:
    """The arguments are checked before anything is started."""
    done = run(*command)
    assert done.returncode == 2
    assert f"usage: scripts/{Path(command[0]).name}" in done.stderr
