"""What is read of a running stack at one moment, and what two such readings say about the time between. Pure."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from scripts.environment.stack import HANDLER_NAMESPACE

TEMPORAL = "temporal"
"""Name of the server's process among those of the stack."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process at one moment."""

    memory_mb: float
    """Resident memory."""
    descriptors: int
    threads: int
    cpu_s: float
    """CPU time since its start."""


@dataclass(kw_only=True)
class Requests:
    """The HTTP requests that the services have logged until now. Grows with every line."""

    starts: int = 0
    """Starts and their repeats, which are the renewals."""
    completions: int = 0
    calls: set[str] = field(default_factory=set)
    """Request ids of the calls that were started."""
    limited: int = 0
    """Requests that were answered 429, by a limit of the caller. They come again later."""
    refused: int = 0
    """Requests that were answered with any other status of 400 or more."""

    def add(self, line: bytes) -> None:
        """Count one line of a log. A line that reports no request counts nothing."""
        if b'"bridge.http_request"' not in line:
            return
        if found := re.search(rb'"bridge\.status": ([45]\d\d)', line):
            self.limited += found[1] == b"429"
            self.refused += found[1] != b"429"
        if b'"bridge.message": "start"' in line:
            self.starts += 1
            if found := re.search(rb'"bridge\.request_id": "([^"]*)"', line):
                self.calls.add(found[1].decode())
        elif b'"bridge.message": "completion"' in line:
            self.completions += 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A stack at one moment: counters since its start, and sizes."""

    at: float
    """Seconds, by a clock that only goes forward."""
    processes: Mapping[str, Process]
    """By name; the server's is `TEMPORAL` if the command started it."""
    starts: int
    completions: int
    calls: int
    """Calls that were started at least once."""
    limited: int
    refused: int
    rpcs: Mapping[tuple[str, str], float]
    """Requests that the server's frontend took, by namespace and operation."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What happened between two readings of the same processes."""

    first: Reading
    last: Reading

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.last.at - self.first.at

    def cpu_s(self, name: str) -> float:
        """CPU time of one process."""
        return self.last.processes[name].cpu_s - self.first.processes[name].cpu_s

    @property
    def own_cpu_s(self) -> float:
        """CPU time of all of our processes."""
        return sum(self.cpu_s(name) for name in self.last.processes if name != TEMPORAL)

    @property
    def server_cpu_s(self) -> float:
        """CPU time of the server, as far as the command started it."""
        return self.cpu_s(TEMPORAL) if TEMPORAL in self.last.processes else 0.0

    @property
    def calls(self) -> int:
        """Calls that began."""
        return self.last.calls - self.first.calls

    @property
    def renewals(self) -> int:
        """Starts of calls that had begun before."""
        return self.last.starts - self.first.starts - self.calls

    @property
    def limited(self) -> int:
        """Requests that were answered 429."""
        return self.last.limited - self.first.limited

    @property
    def completions(self) -> int:
        """Callbacks that the receiver answered."""
        return self.last.completions - self.first.completions

    def rpcs(self, namespace: str, operation: str = "") -> float:
        """Requests to the server in a namespace, of one operation if it is named."""

        def total(reading: Reading) -> float:
            return sum(
                count for (where, what), count in reading.rpcs.items() if where == namespace and operation in {"", what}
            )

        return total(self.last) - total(self.first)

    @property
    def sweep_rpcs(self) -> float:
        """Requests of the sweep: its queries and its heartbeats. Nothing else of the handler's side makes these."""
        return sum(
            self.rpcs(HANDLER_NAMESPACE, operation)
            for operation in ("ListWorkflowExecutions", "RecordActivityTaskHeartbeat")
        )


def frontend_rpcs(metrics: str) -> Counter[tuple[str, str]]:
    """Requests by namespace and operation, from the server's metrics as Prometheus text. Hyphens are restored."""
    counted: Counter[tuple[str, str]] = Counter()
    for labels, value in re.findall(r"^service_requests\{([^}]*)\} (\S+)$", metrics, flags=re.MULTILINE):
        label = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if label.get("service_name") == "frontend":
            # The server writes the namespace "order-prod" as "order_prod".
            counted[label["namespace"].replace("_", "-"), label["operation"]] += float(value)  # type: ignore[assignment]
    return counted
