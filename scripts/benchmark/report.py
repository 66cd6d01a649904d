"""The report: Markdown from the results. Pure."""

from collections.abc import Iterable, Mapping, Sequence

from scripts.benchmark.results import FIGURES, GOAL_SETTING, LongCall, Memory, Ratio, Results, Row, rows

PLOTS = {"latency": "bench-latency.svg", "throughput": "bench-throughput.svg", "cpu": "bench-cpu.svg"}
"""Files next to the report."""


_INTRODUCTION = """\
Written by `{command}`; Temporal server {server}, on one machine with all processes of the run. Compare the ratios:
in every round all modes take turns under the same conditions, and a ratio is computed for each round and shown as the
median with the lowest and the highest round. With six rounds these are the 95 % interval of the median. Absolute times
are this machine's."""

_WINNERS = """\
The bridge by its default transport, compared with each other way on the default server. A cell names who needs less
time or CPU, or makes more calls, and by which factor, in the median of the rounds. *No difference*: the rounds disagree
who it is. *About*, and below *wide*: a round differs from the median by more than a tenth, or there was one round only.
Do not rely on such a factor."""

_COMPARED = """\
The order and the payment are those of [examples/payments](../examples/payments); only the call differs. All workers
have the SDK's default options. `bridge` runs one process for each team, `separate` the receiver in one of its own.
`sync-1a` and `poll-1b` are activity wrappers around an HTTP API: one request held until the payment has ended, and a
request every 5 s. `nexus` is native Nexus with the handler as in Temporal's documentation; in `nexus-eager` that
handler also requests eager start, as the bridge's does. `child` needs both workflows in one namespace and cannot be
used between two."""

_NOT_EAGER = """\
With *not eager*, no task is dispatched or started eagerly, and the bridge's handler service and worker are separate
processes."""

_LATENCY = """\
One call at a time (five, where a target takes a minute), in ms. *Order*: from the start of the order workflow to its
result. *Call*: the caller's workflow time around the call. *Resumed*: from the event that makes the outcome certain to
the caller's next workflow task. The first calls of each round are discarded: a default server that was idle
lets a burst of tasks pass at once, and every later hop waits for its poll rate."""

_THROUGHPUT = """\
A target that ends at once. The columns are the numbers of calls in flight; the values are calls per second while that
many are in flight."""

_COST = """\
CPU in ms, of the server (without its use when idle) and of the mode's own processes; the process that starts the
orders is the same for all, and left out. HTTP requests are counted in the services' access logs, gRPC requests by the
server's frontend, long polls and the starter's two requests included. Events and bytes are those of the histories, of
caller + target."""

_LONG = """\
By the schedule in `bridge/workflow/call.py` with the default lease and renewals: the start, the renewals, the
callback. A count is from a real call of the same form, with duration and renewals shortened alike and the first lease
shortened to 2 s."""

_MEMORY = """\
Resident memory in MB of `separate`, with the payments' worker apart too: after a warm-up, and the growth with that
many calls in flight. A worker keeps its 1 000 latest workflows in a cache, also those that wait."""


def markdown(
    results: Results, compared: Sequence[Ratio], *, deployments: Mapping[str, str], command: str, plots: Iterable[str]
) -> str:
    """The whole report; *deployments* by mode, *plots* the names (of `PLOTS`) that were drawn."""
    made = rows(results.batches)
    drawn = set(plots)

    def plot(name: str, title: str) -> list[str]:
        return [f"![{title}]({PLOTS[name]})"] if name in drawn else []

    measured = [
        "## Ratios",
        *(part for setting in dict.fromkeys(row.setting for row in made) for part in _ratios(compared, setting)),
        "## Latency",
        _LATENCY,
        *plot("latency", "distribution of the latencies"),
        _latencies(row for row in made if row.in_flight == 1 or row.target_seconds > 1),
        "## Throughput",
        _THROUGHPUT,
        *plot("throughput", "throughput over concurrency"),
        _throughput([row for row in made if row.target_seconds == 0]),
        "## Cost of a call",
        _COST,
        *plot("cpu", "CPU per call"),
        _costs(made),
    ]
    flags = [[f"**{each['name']}**", ", ".join(map(_code, each["flags"]))] for each in results.settings]
    sections = [
        "# Benchmark",
        _INTRODUCTION.format(command=command, server=results.server),
        "## Who wins where",
        _WINNERS,
        _winners(compared),
        "## Goals",
        _goals(compared),
        "## What is compared",
        _COMPARED,
        _table(["mode", "processes, without the server"], [[_code(name), text] for name, text in deployments.items()]),
        _table(["setting", "flags of the server"], flags),
        _NOT_EAGER,
        *(measured if made else []),
        *_long_calls(results.long_calls),
        *_memory(results.memory),
    ]
    return "\n\n".join(sections) + "\n"


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rules = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *lines))


def _number(value: float | None) -> str:
    """*value* with three digits. Further digits differ from run to run."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(ratio: Ratio) -> str:
    if ratio.low == ratio.high:
        return _number(ratio.value)
    return f"{_number(ratio.value)} ({_number(ratio.low)} to {_number(ratio.high)})"


def _winners(compared: Sequence[Ratio]) -> str:
    """One line for each figure, a column for each way that the bridge is compared with."""
    here = [each for each in compared if (each.mode, each.setting) == ("bridge", GOAL_SETTING)]
    against = [name for name in dict.fromkeys(each.against for each in here) if name != "limit"]
    found = {(each.figure, each.against): _winner(each) for each in here}
    figures = dict.fromkeys(each.figure for each in here if each.against != "limit")
    lines = [[figure, *(found.get((figure, name), "") for name in against)] for figure in figures]
    return _table(["", *(f"bridge or `{name}`" for name in against)], lines)


def _winner(ratio: Ratio) -> str:
    if ratio.low <= 1 <= ratio.high:
        return "no difference"
    is_ours = (ratio.value > 1) == ratio.is_more_better
    factor = max(ratio.value, 1 / ratio.value)
    about = "" if ratio.is_reliable else "about "
    return f"**bridge**, {about}{factor:.2f} x" if is_ours else f"`{ratio.against}`, {about}{factor:.2f} x"


def _goals(compared: Sequence[Ratio]) -> str:
    lines = [
        [
            each.figure,
            f"`{each.mode}`",
            "" if each.against == "limit" else _code(each.against),
            _spread(each),
            f"{'≥' if each.is_more_better else '≤'} {_number(each.goal)}",
            ("met" if each.met else "**missed**") + ("" if each.is_reliable or each.against == "limit" else ", wide"),
        ]
        for each in compared
        if each.goal is not None
    ]
    return _table(["figure", "mode", "as a multiple of", "measured", "goal", ""], lines)


def _ratios(compared: Sequence[Ratio], setting: str) -> list[str]:
    """One table: a line for each figure and mode, a column for each mode it is compared with."""
    here = [each for each in compared if each.setting == setting and each.against != "limit"]
    against = list(dict.fromkeys(each.against for each in here))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for each in here:
        cells.setdefault((each.figure, each.mode), {})[each.against] = _spread(each)
    lines = [
        [figure, f"`{mode}`", *(found.get(name, "") for name in against)] for (figure, mode), found in cells.items()
    ]
    head = ["figure", "mode", *(f"of `{name}`" for name in against)]
    return [f"### {setting[0].upper()}{setting[1:]}", _table(head, lines)] if lines else []


def _latencies(made: Iterable[Row]) -> str:
    head = ["setting", "target", "mode", "calls", "order p50, p90, p99", "call p50, p90, p99", "resumed p50, p90, p99"]
    lines = [
        [
            row.setting,
            f"{row.target_seconds:g} s",
            f"`{row.mode}`",
            str(row.calls),
            _three(row.p50_ms, row.p90_ms, row.p99_ms),
            _three(row.call_p50_ms, row.call_p90_ms, row.call_p99_ms),
            _three(row.resume_p50_ms, row.resume_p90_ms, row.resume_p99_ms),
        ]
        for row in made
    ]
    return _table(head, lines)


def _three(*values: float) -> str:
    return ", ".join(map(_number, values))


def _throughput(made: Sequence[Row]) -> str:
    levels = sorted({row.in_flight for row in made})
    found = {(row.setting, row.mode, row.in_flight): _number(row.calls_per_s) for row in made}
    groups = dict.fromkeys((row.setting, row.mode) for row in made)
    lines = [
        [setting, f"`{mode}`", *(found.get((setting, mode, each), "") for each in levels)] for setting, mode in groups
    ]
    return _table(["setting", "mode", *map(str, levels)], lines)


def _costs(made: Iterable[Row]) -> str:
    head = ["setting", "target", "in flight", "mode", "server CPU", "own CPU", "HTTP", "gRPC", "events", "bytes"]
    lines = [
        [
            row.setting,
            f"{row.target_seconds:g} s",
            str(row.in_flight),
            f"`{row.mode}`",
            _number(row.server_cpu_ms),
            _number(row.client_cpu_ms),
            _number(row.http_requests),
            _number(row.grpc_requests),
            f"{row.caller_events:g} + {row.target_events:g}",
            f"{row.caller_bytes:.0f} + {row.target_bytes:.0f}",
        ]
        for row in made
    ]
    return _table(head, lines)


def _long_calls(calls: Sequence[LongCall]) -> list[str]:
    if not calls:
        return []
    head = ["call", "by the schedule", "goal", "shortened to", "by its schedule", "counted"]
    lines = [
        [
            each.name,
            str(each.requests),
            f"≤ {each.limit}",
            "" if each.shortened_seconds is None else f"{each.shortened_seconds:g} s",
            "" if each.shortened_requests is None else str(each.shortened_requests),
            "" if each.counted_requests is None else str(each.counted_requests),
        ]
        for each in calls
    ]
    return [
        "## HTTP requests of long calls",
        _LONG,
        _table(head, lines),
    ]


def _memory(processes: Sequence[Memory]) -> list[str]:
    if not processes:
        return []
    lines = [
        [each.role, str(each.in_flight), f"{each.before_bytes / 1e6:.1f}", f"{each.growth_mb:+.1f}"]
        for each in processes
    ]
    return [
        "## Memory",
        _MEMORY,
        _table(["process", "in flight", "before", "growth"], lines),
    ]


def summary(compared: Sequence[Ratio]) -> str:
    """The ratios as lines of text, for a terminal."""
    names = {figure.name for figure in FIGURES}
    lines = []
    for each in compared:
        verdict = "" if each.met is None else f"   goal {_number(each.goal)}: {'met' if each.met else 'MISSED'}"
        of = f"x {each.against}" if each.figure in names else ""
        lines.append(f"{each.setting:20} {each.figure:44} {each.mode:19} {_spread(each):24} {of:10}{verdict}".rstrip())
    return "\n".join(lines)
