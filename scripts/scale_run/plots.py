"""The plots of tables, as SVG."""

from pathlib import Path

from matplotlib.figure import Figure

from scripts.benchmark.plots import save
from scripts.scale_run.report import plot_file
from scripts.scale_run.results import Table


def draw(table: Table, folder: Path) -> None:
    """Draw the chosen columns of *table* over its first column."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name in table.drawn:
        axes.plot(table.column(table.columns[0]), table.column(name), marker="o", label=name)
    axes.set(xlabel=table.columns[0], ylabel=table.unit, ylim=(0, None), xlim=(0, None))
    axes.legend(fontsize="small")
    save(figure, folder / plot_file(table))
