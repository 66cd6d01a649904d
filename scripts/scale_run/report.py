"""The reports of `scripts/scale` and `scripts/soak`: Markdown from the results. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from scripts.environment.stack import CALLER_NAMESPACE, HANDLER_NAMESPACE
from scripts.scale_run.readings import TEMPORAL
from scripts.scale_run.results import DESCRIPTORS, MEMORY_MB, THREADS, Ending, Point, Restart, Series, Table


def plot_file(table: Table) -> str:
    """Name of the plot of *table*, next to the report."""
    return f"scale-{table.name}.svg"


def curve_tables(points: Sequence[Point]) -> list[Table]:
    """The curve as tables: memory, descriptors and threads, and what a minute costs."""
    names = list(points[-1].interval.last.processes)
    own = [name for name in names if name != TEMPORAL]

    def minute(value: float, point: Point) -> float:
        return value / point.minutes

    memory = Table(
        name="memory",
        title="Memory with calls in flight",
        about="Resident memory in MB of each process. A worker keeps its 1 000 latest workflows in a cache.",
        columns=["calls in flight", *names],
        rows=[[point.calls, *(point.interval.last.processes[name].memory_mb for name in names)] for point in points],
        drawn=own,
        unit="MB",
    )
    handles = Table(
        name="descriptors",
        title="Descriptors and threads with calls in flight",
        about="Open descriptors and threads of each of our processes.",
        columns=["calls in flight", *(f"{name}, {kind}" for name in own for kind in ("descriptors", "threads"))],
        rows=[
            [
                point.calls,
                *(
                    value
                    for name in own
                    for value in (
                        point.interval.last.processes[name].descriptors,
                        point.interval.last.processes[name].threads,
                    )
                ),
            ]
            for point in points
        ],
        drawn=[f"{name}, descriptors" for name in own],
        unit="descriptors",
    )
    costs = Table(
        name="minute",
        title="What a minute costs while calls wait",
        about="In a time in which only renewals happen: renewals, those of them that were answered 429, seconds of CPU "
        "of each process, and requests to the server, each for a minute; the time of the latest sweep, from its "
        "schedule to its end, and its requests. The last columns are about the time before, in which the calls were "
        "started: their pace, and CPU for each call, renewals included.",
        columns=[
            "calls in flight",
            "renewals",
            "answered 429",
            *(f"CPU s, {name}" for name in names),
            "gRPC requests",
            "sweep ms",
            "requests of a sweep",
            "calls started a second",
            "own CPU ms of a start",
            "server CPU ms of a start",
        ],
        rows=[
            [
                point.calls,
                minute(point.interval.renewals, point),
                minute(point.interval.limited, point),
                *(minute(point.interval.cpu_s(name), point) for name in names),
                minute(sum(point.interval.rpcs(each) for each in (CALLER_NAMESPACE, HANDLER_NAMESPACE)), point),
                point.sweep_ms or 0.0,
                point.interval.sweep_rpcs / point.sweeps if point.sweeps else 0.0,
                point.filling.calls / point.filling.seconds,
                point.filling.own_cpu_s / point.filling.calls * 1000,
                point.filling.server_cpu_s / point.filling.calls * 1000,
            ]
            for point in points
        ],
        drawn=[f"CPU s, {name}" for name in names],
        unit="seconds of CPU a minute",
    )
    return [memory, handles, costs]


def restart_facts(restart: Restart) -> dict[str, str]:
    """A restart, as rows for people."""
    memory = ", ".join(
        f"{name} {restart.memory_before_mb[name]:.0f} → {after:.0f}" for name, after in restart.memory_after_mb.items()
    )
    return {
        "Calls in flight": f"{restart.calls}",
        "All processes ready": f"{restart.ready_s:.1f} s after the kill",
        "New orders paid": f"{restart.served_s:.1f} s after the kill",
        "HTTP requests until then": f"{restart.requests}",
        "HTTP requests a minute, before → after": f"{restart.before_per_min:.0f} → {restart.after_per_min:.0f}",
        "Renewals until the end of that time": f"{restart.renewals}, by the schedule at most {restart.renewals_due}",
        "Memory in MB, before → after": memory,
    }


def ending_facts(ending: Ending) -> dict[str, str]:
    """The end of all calls, as rows for people."""
    return {
        "Calls": f"{ending.calls}",
        "Targets released": f"within {ending.asked_s:.0f} s",
        "Last answer": f"{ending.seconds:.0f} s after the first release",
        "Callbacks": f"{ending.completions}, at most {ending.per_s:.0f} a second",
        "Connections, at most": f"{ending.peak('receiver_connections')} to the receiver, "
        f"{ending.peak('handler_connections')} to the handler service",
        "CPU for each call": f"own {ending.own_cpu_ms:.0f} ms, server {ending.server_cpu_ms:.0f} ms",
        "Delivery workflows at once, at most": f"{ending.peak('deliveries')}",
        ", ".join(ending.mistakes): ", ".join(str(count) for count in ending.mistakes.values()),
    }


def scale_report(
    *,
    command: str,
    machine: str,
    tables: Sequence[Table],
    restart: Restart | None,
    ending: Ending | None,
    faults: Sequence[str],
    unjudged: Sequence[str],
) -> str:
    """The whole report of `scripts/scale`, which shows the plots of all *tables*."""
    parts = [f"Written by `{command}`; {machine}."]
    for each in tables:
        parts += [f"### {each.title}", each.about, f"![{each.title}]({plot_file(each)})"]
        parts.append(table(each.columns, [[number(value) for value in row] for row in each.rows]))
    if restart is not None:
        parts += ["### A restart of everything", facts_table(restart_facts(restart))]
    if ending is not None:
        parts += ["### The end of all calls", facts_table(ending_facts(ending))]
    parts += ["### Checks", checks(faults, unjudged)]
    return "\n\n".join(parts) + "\n"


def soak_report(
    *,
    command: str,
    machine: str,
    facts: Mapping[str, str],
    series: Sequence[Series],
    faults: Sequence[str],
    unjudged: Sequence[str],
) -> str:
    """The whole report of `scripts/soak`."""
    rows = [
        [each.name, number(each.early), number(each.late), number(each.bound.most(each.early)), _verdict(each)]
        for each in series
    ]
    return (
        "\n\n".join(
            [
                f"Written by `{command}`; {machine}.",
                facts_table(facts),
                table(["value", "first third", "last third", "at most", ""], rows),
                checks(faults, unjudged),
            ]
        )
        + "\n"
    )


def placed(page: str, name: str, report: str) -> str:
    """*page* with *report* between the two marks of *name*, or at its end if *page* has no such marks."""
    begin, end = f"<!-- begin of {name} -->", f"<!-- end of {name} -->"
    before, has_begin, rest = page.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        before, after = f"{page}\n" if page else "", "\n"
    return f"{before}{begin}\n\n{report}\n{end}{after}"


def _verdict(series: Series) -> str:
    return "flat" if series.is_flat else "**grows**"


def checks(faults: Sequence[str], unjudged: Sequence[str]) -> str:
    """What a run found wrong, as a list, and what it did not judge."""
    found = "\n".join(f"- {fault}" for fault in faults) if faults else "All checks passed."
    return "\n\n".join([found, *(f"Not judged: {each}." for each in unjudged)])


def facts_table(facts: Mapping[str, str]) -> str:
    """A table of two columns."""
    return table(["", ""], [[name, value] for name, value in facts.items()])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head = [columns, ["---"] * len(columns)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def number(value: float) -> str:
    """Three figures: 12345 stays, 12.3456 is 12.3."""
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


BOUNDS = (
    f"memory {MEMORY_MB.share:.0%} and {MEMORY_MB.allowance:.0f} MB, "
    f"descriptors {DESCRIPTORS.share:.0%} and {DESCRIPTORS.allowance:.0f}, "
    f"threads {THREADS.share:.0%} and {THREADS.allowance:.0f}"
)
"""The bounds of both commands, for their help."""
