"""The report's plots, as SVG."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.benchmark.report import PLOTS
from scripts.benchmark.results import GOAL_SETTING, Results, Row, rows

_SLOW = "poll-1b"
"""Answers after its first question, five seconds later: on a common scale the others would be one line."""


def draw(results: Results, folder: Path) -> list[str]:
    """Draw what the results have data for; returns the names (of `PLOTS`) of what was drawn."""
    made = [row for row in rows(results.batches) if row.setting == GOAL_SETTING and row.target_seconds == 0]
    drawn = []
    for name, draws in (("latency", _latency), ("throughput", _throughput), ("cpu", _cpu)):
        figure = Figure(figsize=(9, 4), layout="constrained")
        if draws(figure, results, made):
            save(figure, folder / PLOTS[name])
            drawn.append(name)
    return drawn


def save(figure: Figure, path: Path) -> None:
    """Write *figure* as SVG. The same figure gives the same file, and its text stays text."""
    with mpl.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _latency(figure: Figure, results: Results, made: Sequence[Row]) -> bool:
    modes = [row.mode for row in made if row.in_flight == 1 and row.mode != _SLOW]
    if not modes:
        return False
    left, right = figure.subplots(1, 2)
    for mode in modes:
        batches = [
            batch
            for batch in results.batches
            if (batch.mode, batch.setting, batch.target_seconds, batch.in_flight) == (mode, GOAL_SETTING, 0, 1)
        ]
        _distribution(left, mode, [each for batch in batches for each in batch.order_ms])
        _distribution(right, mode, [sample.call_ms for batch in batches for sample in batch.samples])
    left.set(title="whole order", xlabel="ms", ylabel="share of calls", xlim=(0, None))
    right.set(title="the call itself", xlabel="ms", xlim=(0, None))
    right.legend(fontsize="small")
    return True


def _distribution(axes: Axes, label: str, values: Sequence[float]) -> None:
    axes.ecdf(values, label=label)


def _throughput(figure: Figure, results: Results, made: Sequence[Row]) -> bool:
    levels = sorted({row.in_flight for row in made})
    if len(levels) < 2:
        return False
    axes = figure.subplots()
    for mode in dict.fromkeys(row.mode for row in made):
        mine = sorted((row for row in made if row.mode == mode), key=lambda row: row.in_flight)
        spread = [
            [batch.calls_per_s for batch in results.batches if _is_of(row, batch.mode, batch.setting, batch.in_flight)]
            for row in mine
        ]
        middle = [row.calls_per_s for row in mine]
        low = [max(0, value - min(each)) for value, each in zip(middle, spread, strict=True)]
        high = [max(0, max(each) - value) for value, each in zip(middle, spread, strict=True)]
        axes.errorbar([row.in_flight for row in mine], middle, yerr=[low, high], label=mode, marker="o", capsize=3)
    axes.set(xscale="log", xlabel="calls in flight", ylabel="calls per second", ylim=(0, None))
    axes.set_xticks(levels, [str(level) for level in levels])
    axes.legend(fontsize="small")
    return True


def _is_of(row: Row, mode: str, setting: str, in_flight: int) -> bool:
    return (row.mode, row.setting, row.in_flight) == (mode, setting, in_flight)


def _cpu(figure: Figure, results: Results, made: Sequence[Row]) -> bool:
    del results
    levels = [level for level in (1, 50) if any(row.in_flight == level for row in made)]
    if not levels:
        return False
    for axes, level in zip(figure.subplots(1, len(levels), squeeze=False, sharey=True)[0], levels, strict=True):
        mine = [row for row in made if row.in_flight == level and row.mode != _SLOW]
        names = [row.mode for row in mine]
        server = [row.server_cpu_ms or 0.0 for row in mine]
        axes.barh(names, server, label="server")
        axes.barh(names, [row.client_cpu_ms for row in mine], left=server, label="own processes")
        axes.set(title=f"CPU per call, {level} in flight", xlabel="ms")
        axes.invert_yaxis()
        axes.legend(fontsize="small")
    return True
