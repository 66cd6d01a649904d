"""The measured values, and the rows, ratios and counts that are computed from them. Pure functions.

Ratios are computed round by round, because in one round the modes take turns under the same conditions. The report has
the median, the lowest and the highest ratio of the rounds.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from statistics import median
from typing import Any

from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from bridge.workflow.call import OperationCall, Renewals
from caller.waiting.renewals import next_delay, renewal_step

_CLOSED = frozenset({EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED, EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call, read from both histories."""

    call_ms: float
    """The call itself: from the workflow task that makes it to the one that goes on with its result."""
    resume_ms: float
    """From the event that makes the target's outcome certain to the caller's next workflow task."""
    caller_events: int
    caller_bytes: int
    target_events: int
    target_bytes: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Calls of one mode, made together in one round."""

    mode: str
    setting: str
    round: int
    target_seconds: float
    in_flight: int
    full_calls: int
    """Calls that had ended when the last call was started. Until then the planned number of calls was in flight."""
    full_seconds: float
    """Time until the last call was started. The time after it does not measure throughput."""
    seconds: float
    order_ms: Sequence[float]
    """Durations of whole orders: from the start of the order workflow to its result, by the clock of its starter."""
    samples: Sequence[Sample] = field(repr=False)
    server_cpu_s: float | None
    """Without the CPU time that the idle server uses. None if other modes ran at the same time."""
    client_cpu_s: float
    service_cpu_s: float
    """The part of it that a bridge's receiver and handler service used; 0 for another mode."""
    http_requests: int
    grpc_requests: float | None

    @property
    def calls(self) -> int:
        """Number of calls."""
        return len(self.order_ms)

    @property
    def calls_per_s(self) -> float:
        """Throughput while the planned number of calls was in flight, or over all time if no call ended before then."""
        return self.full_calls / self.full_seconds if self.full_calls else self.calls / self.seconds


@dataclass(frozen=True, kw_only=True)
class LongCall:
    """How many HTTP requests one long call takes."""

    name: str
    seconds: float
    requests: int
    """By the schedule, with default lease and renewals."""
    limit: int
    shortened_seconds: float | None = None
    shortened_requests: int | None = None
    """By the schedule, shortened."""
    counted_requests: int | None = None
    """Seen in the access logs of a shortened call that was made."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Resident memory of one process, before and with so many calls in flight."""

    role: str
    in_flight: int
    before_bytes: int
    after_bytes: int

    @property
    def growth_mb(self) -> float:
        """Growth in megabytes."""
        return (self.after_bytes - self.before_bytes) / 1_000_000


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of one run."""

    server: str
    settings: Sequence[dict[str, Any]]
    batches: Sequence[Batch]
    long_calls: Sequence[LongCall] = ()
    memory: Sequence[Memory] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """All rounds of one mode under the same conditions. Times in milliseconds; costs per call."""

    mode: str
    setting: str
    target_seconds: float
    in_flight: int
    calls: int
    p50_ms: float
    """Of the whole order, as the next two."""
    p90_ms: float
    p99_ms: float
    call_p50_ms: float
    call_p90_ms: float
    call_p99_ms: float
    resume_p50_ms: float
    resume_p90_ms: float
    resume_p99_ms: float
    calls_per_s: float
    server_cpu_ms: float | None
    client_cpu_ms: float
    http_requests: float
    grpc_requests: float | None
    caller_events: float
    target_events: float
    caller_bytes: float
    target_bytes: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A figure as a multiple of another mode's, or, against "limit", a figure as it is."""

    figure: str
    mode: str
    against: str
    setting: str
    value: float
    low: float
    high: float
    goal: float | None = None
    met: bool | None = None
    is_more_better: bool = False

    @property
    def is_reliable(self) -> bool:
        """Whether several rounds agree to a tenth of the median. Other factors are not claimed."""
        return self.value * 0.9 <= self.low < self.high <= self.value * 1.1


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Something that is compared between modes."""

    name: str
    of: Callable[[Batch], float | None]
    in_flight: int
    is_more_better: bool = False


def _order(batch: Batch) -> float | None:
    return median(batch.order_ms)


def _call(batch: Batch) -> float | None:
    return median(sample.call_ms for sample in batch.samples)


def _server_cpu(batch: Batch) -> float | None:
    return None if batch.server_cpu_s is None else batch.server_cpu_s / batch.calls


def _all_cpu(batch: Batch) -> float | None:
    server = _server_cpu(batch)
    return None if server is None else server + batch.client_cpu_s / batch.calls


ORDER = Figure(name="whole order, p50", of=_order, in_flight=1)
CALL = Figure(name="the call itself, p50", of=_call, in_flight=1)
FIGURES = (
    ORDER,
    CALL,
    Figure(name="server CPU, 1 in flight", of=_server_cpu, in_flight=1),
    Figure(name="server CPU, 50 in flight", of=_server_cpu, in_flight=50),
    Figure(name="all CPU, 1 in flight", of=_all_cpu, in_flight=1),
    Figure(name="all CPU, 50 in flight", of=_all_cpu, in_flight=50),
    Figure(name="CPU of both services, 50 in flight", of=lambda batch: batch.service_cpu_s / batch.calls, in_flight=50),
    *(
        Figure(
            name=f"calls per second, {level} in flight",
            of=lambda batch: batch.calls_per_s,
            in_flight=level,
            is_more_better=True,
        )
        for level in (50, 200)
    ),
)

GOAL_SETTING = "default, eager"
GOALS: dict[tuple[str, str, str], float] = {
    ("the call itself, p50", "bridge", "nexus"): 0.5,
    ("server CPU, 1 in flight", "bridge", "nexus"): 0.7,
    ("server CPU, 50 in flight", "bridge", "nexus"): 0.7,
    ("all CPU, 1 in flight", "bridge", "nexus"): 0.95,
    ("all CPU, 1 in flight", "bridge", "nexus-eager"): 1.1,
    ("all CPU, 50 in flight", "bridge", "nexus"): 0.85,
    ("all CPU, 50 in flight", "bridge", "nexus-eager"): 1.0,
    ("calls per second, 50 in flight", "bridge", "nexus"): 1.2,
    ("calls per second, 50 in flight", "bridge", "nexus-eager"): 1.0,
    ("calls per second, 200 in flight", "bridge", "nexus"): 1.2,
    ("calls per second, 200 in flight", "bridge", "nexus-eager"): 1.0,
}
"""By figure, mode and what it is compared with, on the default server with eager dispatch."""

REQUESTS_GOAL = 2
MEMORY_GOAL_MB = 5.0
STATELESS = ("receiver", "handler")
"""Processes that keep no state of a call."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of *values* that at least *share* (0 to 1) of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def rows(batches: Iterable[Batch]) -> list[Row]:
    """One row for each mode and condition, in the order of their first batches."""
    groups: dict[tuple[str, str, float, int], list[Batch]] = {}
    for batch in batches:
        key = (batch.mode, batch.setting, batch.target_seconds, batch.in_flight)
        groups.setdefault(key, []).append(batch)
    return [_row(group) for group in groups.values()]


def _row(batches: Sequence[Batch]) -> Row:
    first, calls = batches[0], sum(batch.calls for batch in batches)
    orders = [each for batch in batches for each in batch.order_ms]
    samples = [each for batch in batches for each in batch.samples]

    def per_call(values: Iterable[float | None], scale: float = 1.0) -> float | None:
        known = [each for each in values if each is not None]
        return sum(known) * scale / calls if len(known) == len(batches) else None

    return Row(
        mode=first.mode,
        setting=first.setting,
        target_seconds=first.target_seconds,
        in_flight=first.in_flight,
        calls=calls,
        **{f"p{share}_ms": percentile(orders, share / 100) for share in (50, 90, 99)},
        **{f"call_p{share}_ms": percentile([s.call_ms for s in samples], share / 100) for share in (50, 90, 99)},
        **{f"resume_p{share}_ms": percentile([s.resume_ms for s in samples], share / 100) for share in (50, 90, 99)},
        calls_per_s=median(batch.calls_per_s for batch in batches),
        server_cpu_ms=per_call((batch.server_cpu_s for batch in batches), 1000),
        client_cpu_ms=sum(batch.client_cpu_s for batch in batches) * 1000 / calls,
        http_requests=sum(batch.http_requests for batch in batches) / calls,
        grpc_requests=per_call(batch.grpc_requests for batch in batches),
        caller_events=median(s.caller_events for s in samples),
        target_events=median(s.target_events for s in samples),
        caller_bytes=median(s.caller_bytes for s in samples),
        target_bytes=median(s.target_bytes for s in samples),
    )


def ratios(results: Results, *, subjects: Sequence[str], references: Sequence[str]) -> list[Ratio]:
    """Every figure of every subject against every reference, then the counts and sizes that have a limit."""
    found = []
    settings = dict.fromkeys(batch.setting for batch in results.batches)
    for setting in settings:
        for figure in FIGURES:
            for mode in subjects:
                for against in (each for each in references if each != mode):
                    ratio = _ratio(results.batches, figure, mode, against, setting)
                    if ratio is not None:
                        found.append(ratio)
    return [*found, *_limits(results)]


def _ratio(batches: Sequence[Batch], figure: Figure, mode: str, against: str, setting: str) -> Ratio | None:
    def by_round(name: str) -> dict[int, float]:
        return {
            batch.round: value
            for batch in batches
            if (batch.mode, batch.setting, batch.target_seconds) == (name, setting, 0)
            and batch.in_flight == figure.in_flight
            and (value := figure.of(batch))
        }

    ours, theirs = by_round(mode), by_round(against)
    values = [ours[each] / theirs[each] for each in sorted(ours.keys() & theirs.keys())]
    if not values:
        return None
    value = median(values)
    goal = GOALS.get((figure.name, mode, against)) if setting == GOAL_SETTING else None
    met = None if goal is None else (value >= goal if figure.is_more_better else value <= goal)
    return Ratio(
        figure=figure.name,
        mode=mode,
        against=against,
        setting=setting,
        value=value,
        low=min(values),
        high=max(values),
        goal=goal,
        met=met,
        is_more_better=figure.is_more_better,
    )


def _limits(results: Results) -> list[Ratio]:
    def limit(figure: str, values: Sequence[float], goal: float, setting: str = GOAL_SETTING) -> Ratio:
        value = median(values)
        return Ratio(
            figure=figure,
            mode="bridge",
            against="limit",
            setting=setting,
            value=value,
            low=min(values),
            high=max(values),
            goal=goal,
            met=value <= goal,
        )

    short = [
        batch.http_requests / batch.calls
        for batch in results.batches
        if batch.mode == "bridge" and batch.target_seconds <= 1 and batch.setting == GOAL_SETTING
    ]
    found = [limit("HTTP requests, shorter than the first lease", short, REQUESTS_GOAL)] if short else []
    found += [limit(f"HTTP requests, {each.name}", [each.requests], each.limit) for each in results.long_calls]
    found += [
        limit(
            f"memory of the {each.role}, growth in MB with {each.in_flight} in flight", [each.growth_mb], MEMORY_GOAL_MB
        )
        for each in results.memory
        if each.role in STATELESS
    ]
    return found


def to_json(results: Results, compared: Sequence[Ratio]) -> dict[str, Any]:
    """The last line of `--json`."""
    return {
        "server": results.server,
        "settings": list(results.settings),
        "rows": [_rounded(asdict(row)) for row in rows(results.batches)],
        "ratios": [_rounded(asdict(each)) for each in compared],
        "long_calls": [asdict(each) for each in results.long_calls],
        "memory": [asdict(each) for each in results.memory],
    }


def _rounded(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}


def _milliseconds(earlier: HistoryEvent, later: HistoryEvent) -> float:
    return (later.event_time.ToNanoseconds() - earlier.event_time.ToNanoseconds()) / 1_000_000


def read_sample(caller: Sequence[HistoryEvent], target: Sequence[HistoryEvent]) -> Sample:
    """The facts of one call, from the histories of both runs."""
    tasks = [each for each in caller if each.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED]
    outcomes = [each for each in target if each.event_type in _CLOSED]
    return Sample(
        call_ms=_milliseconds(tasks[0], tasks[-1]),
        resume_ms=_milliseconds(outcomes[0], tasks[-1]),
        caller_events=len(caller),
        caller_bytes=sum(each.ByteSize() for each in caller),
        target_events=len(target),
        target_bytes=sum(each.ByteSize() for each in target),
    )


def frontend_requests(metrics: str) -> float:
    """How many gRPC requests the server's frontend has taken, long polls included, by its Prometheus text."""
    values = re.findall(r'^service_requests\{[^}]*service_name="frontend"[^}]*\} (\S+)$', metrics, flags=re.MULTILINE)
    return sum(map(float, values))


def http_requests(log: bytes) -> Counter[str]:
    """Requests in a service's log, by the call's request id ('' where none is logged)."""
    counted: Counter[str] = Counter()
    for line in log.splitlines():
        if b'"bridge.http_request"' in line:
            found = re.search(rb'"bridge\.request_id": "([^"]*)"', line)
            counted[found[1].decode() if found else ""] += 1
    return counted


def request_times(first_lease: timedelta, renewals: Renewals, *, ends: timedelta) -> list[timedelta]:
    """When the HTTP requests of a call are made whose target ends at *ends*: the start, renewals, and the callback.

    As `caller.waiting.waiting_activity` paces itself, without jitter and without the time that requests take.
    """
    call = OperationCall(
        endpoint="payments",
        service="PaymentService",
        operation="process",
        scheduled_time_ms=0,
        schedule_to_close_ms=30 * 86_400_000,
        first_lease_ms=int(first_lease.total_seconds() * 1000),
        renewal_initial_ms=int(renewals.initial.total_seconds() * 1000),
        renewal_maximum_ms=int(renewals.maximum.total_seconds() * 1000),
        renewal_coefficient=renewals.coefficient,
    )
    times = [timedelta(0)]
    due: timedelta | None = timedelta(milliseconds=call.first_lease_ms)
    while due is not None and due < ends:
        times.append(due)
        now = call.scheduled_time + due
        delay = next_delay(renewal_step(call, now=now, jitter=0), now=now, deadline=call.deadline)
        due = None if delay is None else due + delay
    return [*times, ends]
