"""Compare this checkout with another commit of the repository: the same measurement of both, in paired rounds.

Each commit runs its own `scripts/bench` in its own worktree and virtual environment, on a server of its own. In every
round both run one after the other, and the order changes from round to round, so that a disturbance affects both. The
ratios of each round are compared.
"""

import asyncio
import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from scripts.environment.progress import say
from scripts.environment.stack import ROOT
from scripts.environment.temporal_cli import CHOICE_VARIABLE, chosen

ROUNDS = 6
"""The smallest number of rounds that gives a 95 % interval for the median."""

_MEASUREMENT = ("--quick", "--rounds", "3", "--modes", "default", "--parts", "latency,throughput", "--json")
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One figure of this checkout, divided by that of the other commit. Below 1 is less."""

    figure: str
    in_flight: int
    """Calls at the same time."""
    rounds: Sequence[float]
    """The ratio of each round."""

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return median(self.rounds)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the median, None with too few rounds for one."""
        return median_interval(self.rounds)


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest pair of order statistics that holds the median with at least 95 % confidence.

    It assumes nothing about the distribution: a value is below the median with probability one half. Returns None for
    fewer than six values, of which not even the lowest and the highest reach that confidence.
    """
    ordered, count = sorted(values), len(values)
    found = None
    below = 0.0
    for rank in range(count // 2):
        below += comb(count, rank) / 2**count
        if 1 - 2 * below < _CONFIDENCE:
            break
        found = ordered[rank], ordered[count - 1 - rank]
    return found


def figures(report: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """What is compared, by name and calls in flight, from the JSON line of one run."""
    found: dict[tuple[str, int], float] = {}
    for row in report["rows"]:
        in_flight = row["in_flight"]
        found["all CPU per call", in_flight] = row["server_cpu_ms"] + row["client_cpu_ms"]
        found["server CPU per call", in_flight] = row["server_cpu_ms"]
        found["our CPU per call", in_flight] = row["client_cpu_ms"]
        if in_flight == 1:
            found["whole order, p50", in_flight] = row["p50_ms"]
        else:
            found["calls per second", in_flight] = row["calls_per_s"]
    return found


async def compare(reference: str, *, rounds: int) -> list[Comparison]:
    """Measure this checkout and commit *reference* in *rounds* paired rounds.

    Raises:
        RuntimeError: There is no such commit, or one of the runs failed.
    """
    with _worktree(reference) as folder:
        # The first run installs packages, which must not be measured.
        await asyncio.gather(_bench(ROOT, "--help"), _bench(folder, "--help"))
        pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            order = [ROOT, folder] if number % 2 == 0 else [folder, ROOT]
            reports = {where: json.loads((await _bench(where, *_MEASUREMENT)).splitlines()[-1]) for where in order}
            pairs.append((reports[ROOT], reports[folder]))
    measured = [(figures(ours), figures(theirs)) for ours, theirs in pairs]
    return [
        Comparison(
            figure=name, in_flight=level, rounds=[ours[name, level] / theirs[name, level] for ours, theirs in measured]
        )
        for name, level in measured[0][0]
    ]


def table(comparisons: Sequence[Comparison], reference: str) -> str:
    """The comparisons for a person."""
    lines = [f"this checkout / {reference}: median of the rounds (95 % interval)"]
    for each in comparisons:
        interval = each.interval
        shown = "needs six rounds" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
        lines.append(f"  {each.figure:<22} {each.in_flight:>4} in flight  {each.median:.2f} ({shown})")
    return "\n".join(lines)


def to_json(comparisons: Sequence[Comparison], reference: str) -> dict[str, Any]:
    """The comparisons for a machine."""
    rows = [asdict(each) | {"median": each.median, "interval": each.interval} for each in comparisons]
    return {"against": reference, "comparisons": rows}


@contextlib.contextmanager
def _worktree(reference: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="callback-bridge-against-") as parent:
        folder = Path(parent) / "reference"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run(
            [*git, "add", "--quiet", "--detach", str(folder), reference], capture_output=True, text=True, check=False
        )
        if added.returncode != 0:
            message = f"--against {reference}: {added.stderr.strip()}"
            raise RuntimeError(message)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=False)


async def _bench(root: Path, *arguments: str) -> str:
    """Run the benchmark of the checkout at *root*. Returns its standard output; its progress is shown as it comes."""
    process = await asyncio.create_subprocess_exec(
        *("env", "-u", "PYTHONPATH", f"{CHOICE_VARIABLE}={chosen()}", str(root / "scripts" / "bench"), *arguments),
        # Older commits find their modules by the working folder.
        cwd=root,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    if process.returncode != 0:
        message = f"the benchmark of {root} ended with code {process.returncode}"
        raise RuntimeError(message)
    return output.decode()
