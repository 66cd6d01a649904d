"""The measured values, and what is wrong with them. Pure.

A bound compares a late value with an early one of the same run: the late value may be larger by a share and by an
allowance, because memory is taken in large steps and because other programs use the machine.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import median

from bridge.workflow.call import Renewals
from bridge.workflow.client import DEFAULT_FIRST_LEASE
from scripts.benchmark.results import percentile, request_times
from scripts.scale_run.readings import TEMPORAL, Interval, Process

CACHED = 1000
"""Workflows that a worker keeps by default. Until its cache is full, the memory of a worker grows with every run."""
WORKERS = ("order-worker", "payment-worker")

SWEEP_RPCS = 5.0
"""Highest number of requests of one sweep that found nothing: query, heartbeat, and what the edge of a window adds."""
RECEIVER_CONNECTIONS, HANDLER_CONNECTIONS = 40, 40
"""Highest number of connections to a service: 20 requests in flight from each of the two processes that call it."""
DELIVERIES_PER_CALL = 1.1


@dataclass(frozen=True, kw_only=True)
class Bound:
    """How much a value may grow."""

    share: float
    """Part of the earlier value."""
    allowance: float
    """In the unit of the value."""

    def most(self, early: float) -> float:
        """The highest value that is accepted after *early*."""
        return early * (1 + self.share) + self.allowance


MEMORY_MB = Bound(share=0.1, allowance=20)
DESCRIPTORS = Bound(share=0.1, allowance=50)
THREADS = Bound(share=0.1, allowance=40)
"""The handler service starts up to 32 threads for the functions of its team when it needs them."""
RENEWALS = Bound(share=0.1, allowance=20)
_LATE_S = 10.0
QUEUE = Bound(share=0.1, allowance=50)
P99_MS = Bound(share=0.5, allowance=100)


@dataclass(frozen=True, kw_only=True)
class Queues:
    """What waits at one moment."""

    receiver_connections: int
    """Connections to the receiver. Each carries at most one request at a time."""
    handler_connections: int
    deliveries: int
    """Delivery workflows that run: outcomes that the first attempt could not deliver."""
    pending: int
    """Calling workflows that are open. Each has one pending activity."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One number of calls in flight."""

    calls: int
    interval: Interval = field(repr=False)
    """A time in which nothing but renewals happened."""
    sweep_ms: float | None
    """Time of the latest sweep, from its schedule to its end."""
    sweeps: float
    """Sweeps in the interval, by their schedule."""
    filling: Interval = field(repr=False)
    """The time before, in which the calls since the last point were started."""

    @property
    def minutes(self) -> float:
        """Length of the interval."""
        return self.interval.seconds / 60


@dataclass(frozen=True, kw_only=True)
class Restart:
    """All of our processes were killed at once, and started again."""

    calls: int
    """Calls in flight."""
    ready_s: float
    """From the kill until all processes are ready."""
    served_s: float
    """From the kill until new orders were paid."""
    requests: int
    """HTTP requests until then."""
    before_per_min: float
    """HTTP requests a minute, before."""
    after_per_min: float
    """HTTP requests a minute, in the time after it."""
    renewals: int
    """Renewals from the kill to the end of the time after it."""
    renewals_due: int
    """The most that the schedule of the calls allows in that time."""
    memory_before_mb: Mapping[str, float]
    memory_after_mb: Mapping[str, float]

    def faults(self) -> list[str]:
        """What is wrong."""
        found = [
            f"after the restart {name} has {after:.0f} MB, before {self.memory_before_mb[name]:.0f} MB"
            for name, after in self.memory_after_mb.items()
            if name != TEMPORAL and after > MEMORY_MB.most(self.memory_before_mb[name])
        ]
        # An attempt that the kill interrupted is repeated.
        if self.renewals > (most := RENEWALS.most(self.renewals_due)):
            found.append(f"{self.renewals} renewals after the kill, by the schedule at most {most:.0f}")
        return found


def renewals_due(ages_s: Iterable[float], seconds: float) -> int:
    """The most renewals that calls of these ages make in the next *seconds*, by the default lease and renewals.

    The jitter moves a renewal by up to a tenth of its time. On a busy machine it may also be `_LATE_S` late.
    """
    ages = list(ages_s)
    ends = timedelta(seconds=2 * (max(ages, default=0.0) + seconds) + 60)
    _, *times, _ = request_times(DEFAULT_FIRST_LEASE, Renewals(), ends=ends)
    due = [each.total_seconds() for each in times]
    return sum(0.9 * each <= age + seconds and 1.1 * each + _LATE_S >= age for age in ages for each in due)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """All targets ended."""

    calls: int
    asked_s: float
    """Time in which the targets were released."""
    seconds: float
    """From the first release to the last answer."""
    completions: int
    """Callbacks that the receiver answered."""
    per_s: float
    """Callbacks a second, in the second that had most."""
    own_cpu_ms: float
    """CPU of all of our processes for each call, from its target's release to its answer."""
    server_cpu_ms: float
    queues: Sequence[Queues] = field(repr=False)
    mistakes: Mapping[str, int]
    """Mistakes that the histories show, by kind, as `scripts/chaos` counts them."""

    def peak(self, name: str) -> int:
        """The largest number of a queue."""
        return max((getattr(each, name) for each in self.queues), default=0)

    def faults(self) -> list[str]:
        """What is wrong."""
        found = [f"{count} calls are {name}" for name, count in self.mistakes.items() if count]
        if self.completions > self.calls * DELIVERIES_PER_CALL + 10:
            found.append(f"{self.completions} callbacks for {self.calls} calls")
        for name, most in (
            ("receiver_connections", RECEIVER_CONNECTIONS),
            ("handler_connections", HANDLER_CONNECTIONS),
        ):
            if self.peak(name) > most:
                found.append(f"{self.peak(name)} {name.replace('_', ' ')}, expected at most {most}")
        return found


@dataclass(frozen=True, kw_only=True)
class Table:
    """How some values grow with one number, the first column."""

    name: str
    """Names the part of the command and the file of the plot."""
    title: str
    about: str
    """What was done and what the columns mean, for the report."""
    columns: Sequence[str]
    rows: Sequence[Sequence[float]]
    drawn: Sequence[str]
    """Columns of the plot, all in one unit."""
    unit: str
    bounds: Mapping[str, Bound] = field(default_factory=dict)
    """By column: how much the last row may be above the first."""

    def column(self, name: str) -> list[float]:
        """The values of a column."""
        return [row[self.columns.index(name)] for row in self.rows]

    def faults(self) -> list[str]:
        """Columns that grew more than they may."""
        found = []
        for name, bound in self.bounds.items():
            first, *_, last = values if len(values := self.column(name)) > 1 else values * 2
            if last > bound.most(first):
                found.append(f"{self.name}: {name} grew from {first:.1f} to {last:.1f}")
        return found


def curve_unjudged(points: Sequence[Point]) -> list[str]:
    """What the points are too few, or have too few calls, to judge."""
    if len(_compared(points, WORKERS[0])) > 1:
        return []
    return [f"memory, descriptors and threads of the workers, because fewer than two points have {CACHED} calls"]


def _compared(points: Sequence[Point], name: str) -> list[Point]:
    """The points that judge the process *name*: a worker from the point on at which its cache is full."""
    return [point for point in points if name not in WORKERS or point.calls >= CACHED]


def curve_faults(points: Sequence[Point]) -> list[str]:
    """What grew with the number of calls in flight, and what was refused."""
    found = []
    for name in points[-1].interval.last.processes:
        if name == TEMPORAL:
            continue
        compared = _compared(points, name)
        if len(compared) > 1:
            early, late = (each.interval.last.processes[name] for each in (compared[0], compared[-1]))
            found += growth(name, early, late)
    for point in points:
        if point.sweeps >= 1 and point.interval.sweep_rpcs / point.sweeps > SWEEP_RPCS:
            found.append(
                f"{point.interval.sweep_rpcs:.0f} requests of {point.sweeps:.1f} sweeps at {point.calls} calls"
            )
    if points[-1].interval.last.refused:
        found.append(f"{points[-1].interval.last.refused} requests were refused")
    return found


def growth(name: str, early: Process, late: Process) -> list[str]:
    """What of one process grew more than it may."""
    kinds = (
        ("MB", early.memory_mb, late.memory_mb, MEMORY_MB),
        ("descriptors", early.descriptors, late.descriptors, DESCRIPTORS),
        ("threads", early.threads, late.threads, THREADS),
    )
    return [
        f"{name} grew from {before:.0f} to {after:.0f} {unit}"
        for unit, before, after, bound in kinds
        if after > bound.most(before)
    ]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One value of a soak run over its windows, the warm-up left out."""

    name: str
    values: Sequence[float]
    bound: Bound

    @property
    def early(self) -> float:
        """Median of the first third."""
        return median(self.values[: max(1, len(self.values) // 3)])

    @property
    def late(self) -> float:
        """Median of the last third."""
        return median(self.values[-max(1, len(self.values) // 3) :])

    @property
    def is_flat(self) -> bool:
        """The rule: the median of the last third is within the bound of the median of the first third."""
        return self.late <= self.bound.most(self.early)


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a soak run."""

    processes: Mapping[str, Process]
    """At its end."""
    queues: Queues
    """At its end."""
    orders: int
    """Orders that ended in it."""
    p99_ms: float
    """Time that all but the slowest percent of them took at most, without the time that a payment settles."""


def percentile_99(values: Sequence[float]) -> float:
    """The smallest of *values* that covers 99 %; 0 without values."""
    return percentile(values, 0.99) if values else 0.0


def soak_series(windows: Sequence[Window], *, is_cache_full: bool) -> list[Series]:
    """Every value over the windows, without the first sixth. Without full caches, the workers' memory is left out."""
    kept = windows[len(windows) // 6 :]

    def series(name: str, bound: Bound, values: Iterable[float]) -> Series:
        return Series(name=name, values=list(values), bound=bound)

    found = []
    # The dev server keeps every history in memory, and is left out.
    for name in kept[0].processes.keys() - {TEMPORAL}:
        read = [each.processes[name] for each in kept]
        if is_cache_full or name not in WORKERS:
            found.append(series(f"{name}, MB", MEMORY_MB, (each.memory_mb for each in read)))
        found += [
            series(f"{name}, descriptors", DESCRIPTORS, (each.descriptors for each in read)),
            series(f"{name}, threads", THREADS, (each.threads for each in read)),
        ]
    queues = [each.queues for each in kept]
    return [
        *sorted(found, key=lambda each: each.name),
        series("connections to the receiver", QUEUE, (each.receiver_connections for each in queues)),
        series("connections to the handler service", QUEUE, (each.handler_connections for each in queues)),
        series("open delivery workflows", QUEUE, (each.deliveries for each in queues)),
        series("pending calls", QUEUE, (each.pending for each in queues)),
        series("p99 of an order, ms", P99_MS, (each.p99_ms for each in kept)),
    ]
