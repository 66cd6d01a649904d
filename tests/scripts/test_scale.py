"""What the scale and the soak run compute: differences of readings, the rules for growth, and the reports."""

import json
from dataclasses import replace
from typing import Any

import pytest

from scripts.environment.progress import conclude
from scripts.environment.stack import HANDLER_NAMESPACE
from scripts.scale_run.readings import TEMPORAL, Interval, Process, Reading, Requests, frontend_rpcs
from scripts.scale_run.report import curve_tables, placed, scale_report, soak_report
from scripts.scale_run.results import (
    Bound,
    Ending,
    Point,
    Queues,
    Restart,
    Series,
    Table,
    Window,
    curve_faults,
    curve_unjudged,
    renewals_due,
    soak_series,
)

SMALL = Process(memory_mb=90, descriptors=30, threads=10, cpu_s=1.0)
QUIET = Queues(receiver_connections=2, handler_connections=2, deliveries=0, pending=10)
METRICS = """\
service_requests{namespace="payment_prod",operation="ListWorkflowExecutions",service_name="frontend"} 4
service_requests{namespace="payment_prod",operation="RecordActivityTaskHeartbeat",service_name="frontend"} 5
service_requests{namespace="payment_prod",operation="ListWorkflowExecutions",service_name="history"} 100
service_requests{namespace="order_prod",operation="RecordActivityTaskHeartbeat",service_name="frontend"} 70
"""


def reading(at: float, **changes: Any) -> Reading:
    own = {"receiver": SMALL, "order-worker": SMALL}
    made = Reading(
        at=at, processes={TEMPORAL: SMALL, **own}, starts=0, completions=0, calls=0, limited=0, refused=0, rpcs={}
    )
    return replace(made, **changes)


def point(calls: int, **changes: Any) -> Point:
    last = reading(60, starts=calls, calls=0, **changes)
    filling = Interval(first=reading(0), last=reading(10, calls=50))
    return Point(calls=calls, interval=Interval(first=reading(0), last=last), sweep_ms=40.0, sweeps=2, filling=filling)


def test_log_lines_are_counted_as_starts_calls_and_completions() -> None:
    """A repeated start is the same call. A line that reports no request counts nothing."""
    requests = Requests()
    start = (
        b'{"event": "bridge.http_request", "bridge.status": %d, "bridge.message": "start", "bridge.request_id": "%b"}'
    )
    for status, call in ((201, b"r1"), (201, b"r1"), (429, b"r2"), (503, b"r2")):
        requests.add(start % (status, call))
    requests.add(b'{"event": "bridge.serves"}')
    requests.add(b'{"event": "bridge.http_request", "bridge.status": 200, "bridge.message": "completion"}')
    assert (requests.starts, requests.calls, requests.completions) == (4, {"r1", "r2"}, 1)
    assert (requests.limited, requests.refused) == (1, 1)


def test_requests_to_the_server_are_those_of_its_frontend_by_namespace() -> None:
    """The sweep's are the queries and heartbeats of the handler's namespace; those of the caller do not count."""
    counted = frontend_rpcs(METRICS)
    assert counted[HANDLER_NAMESPACE, "ListWorkflowExecutions"] == 4
    interval = Interval(first=reading(0), last=reading(60, rpcs=counted))
    assert interval.sweep_rpcs == 9
    assert interval.rpcs("order-prod") == 70


def test_an_interval_separates_new_calls_from_renewals_and_the_server_from_our_processes() -> None:
    """Every start that is not the first one of its call is a renewal."""
    busy = replace(SMALL, cpu_s=3.0)
    last = reading(30, starts=25, calls=10, completions=7, processes={TEMPORAL: busy, "receiver": busy})
    interval = Interval(first=reading(0, starts=5, calls=5, completions=4), last=last)
    assert (interval.seconds, interval.calls, interval.renewals, interval.completions) == (30, 5, 15, 3)
    assert (interval.own_cpu_s, interval.server_cpu_s) == (2.0, 2.0)


def grown(name: str, **changes: Any) -> dict[str, Process]:
    return {**reading(0).processes, name: replace(SMALL, **changes)}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        pytest.param("receiver", {"memory_mb": 118}, [], id="memory within the bound"),
        pytest.param("receiver", {"memory_mb": 130}, ["receiver grew from 90 to 130 MB"], id="memory"),
        pytest.param("receiver", {"descriptors": 90}, ["receiver grew from 30 to 90 descriptors"], id="descriptors"),
        pytest.param("receiver", {"threads": 60}, ["receiver grew from 10 to 60 threads"], id="threads"),
        pytest.param(TEMPORAL, {"memory_mb": 9000}, [], id="the server keeps histories"),
        pytest.param("order-worker", {"memory_mb": 300}, [], id="a worker fills its cache"),
    ],
)
def test_what_grows_with_the_calls_in_flight_is_a_fault(
    name: str, changes: dict[str, Any], expected: list[str]
) -> None:
    """Of our own processes only. A worker is compared after its cache is full."""
    assert curve_faults([point(100), point(2000, processes=grown(name, **changes))]) == expected


def test_a_worker_that_grows_after_its_cache_is_full_is_a_fault() -> None:
    points = [point(1000), point(2000, processes=grown("order-worker", memory_mb=300))]
    assert curve_faults(points) == ["order-worker grew from 90 to 300 MB"]


def test_a_sweep_that_asks_more_and_a_refused_request_are_faults() -> None:
    """Two sweeps with 14 requests, and three answers 503. An answer 429 only says that a renewal has to come later."""
    rpcs = {(HANDLER_NAMESPACE, "ListWorkflowExecutions"): 14.0}
    assert curve_faults([point(2000, rpcs=rpcs)]) == ["14 requests of 2.0 sweeps at 2000 calls"]
    assert curve_faults([point(2000, limited=9, refused=3)]) == ["3 requests were refused"]


RESTART = Restart(
    calls=2000,
    ready_s=4,
    served_s=5,
    requests=20,
    before_per_min=500,
    after_per_min=600,
    renewals=500,
    renewals_due=480,
    memory_before_mb={TEMPORAL: 500, "receiver": 90},
    memory_after_mb={TEMPORAL: 700, "receiver": 90},
)


def test_a_restart_may_not_bring_all_calls_at_once_or_more_memory() -> None:
    """What was due meanwhile comes, and not a request of every call."""
    assert RESTART.faults() == []
    assert replace(RESTART, renewals=2500).faults() == ["2500 renewals after the kill, by the schedule at most 548"]
    grows = replace(RESTART, memory_after_mb={"receiver": 200})
    assert grows.faults() == ["after the restart receiver has 200 MB, before 90 MB"]


@pytest.mark.parametrize(
    ("age", "seconds", "due"),
    [
        pytest.param(5, 10, 0, id="inside the first lease"),
        pytest.param(5, 30, 1, id="the end of the first lease"),
        pytest.param(35, 60, 2, id="the lease may be late, and the first renewal comes"),
        pytest.param(120, 60, 0, id="between the first and the second renewal"),
        pytest.param(850, 1, 1, id="a tenth early"),
    ],
)
def test_the_renewals_that_are_due_follow_from_the_ages_of_the_calls(age: float, seconds: float, due: int) -> None:
    """The lease is 30 s, then a minute, doubled to an hour: at 30, 90, 210, 450 s …"""
    assert renewals_due([age], seconds) == due
    assert renewals_due([age] * 3, seconds) == 3 * due


ENDING = Ending(
    calls=100,
    asked_s=2,
    seconds=9,
    completions=101,
    per_s=20,
    own_cpu_ms=20,
    server_cpu_ms=22,
    queues=[QUIET],
    mistakes={"lost": 0, "double": 0},
)


def test_the_end_is_judged_by_its_mistakes_its_callbacks_and_its_connections() -> None:
    assert ENDING.faults() == []
    crowd = replace(QUIET, receiver_connections=300)
    wrong = replace(ENDING, completions=250, queues=[QUIET, crowd], mistakes={"lost": 2, "double": 0})
    assert wrong.faults() == [
        "2 calls are lost",
        "250 callbacks for 100 calls",
        "300 receiver connections, expected at most 40",
    ]


def grows(*values: float) -> Table:
    return Table(
        name="age",
        title="Age",
        about="Calls renew.",
        columns=["renewals", "ms"],
        rows=[[float(number), value] for number, value in enumerate(values)],
        drawn=["ms"],
        unit="ms",
        bounds={"ms": Bound(share=1.0, allowance=5)},
    )


def test_a_table_is_judged_by_its_last_row_against_its_first() -> None:
    """What lies between is shown, and not judged: one busy moment is no growth."""
    assert grows(10, 90, 25).faults() == []
    assert grows(10, 12, 26).faults() == ["age: ms grew from 10.0 to 26.0"]
    assert grows(10).faults() == []


@pytest.mark.parametrize(
    ("values", "is_flat"),
    [
        pytest.param([100, 101, 99, 100, 102, 100], True, id="noise"),
        pytest.param([100, 100, 900, 900, 100, 100], True, id="a peak in the middle"),
        pytest.param([100, 900, 100, 100, 100, 900, 100, 100, 100], True, id="one peak in each third"),
        pytest.param([100, 110, 120, 130, 140, 150], False, id="a slope"),
        pytest.param([150, 140, 130, 120, 110, 100], True, id="what falls"),
        pytest.param([100], True, id="one window"),
    ],
)
def test_a_value_is_flat_if_its_last_third_is_like_its_first(values: list[float], is_flat: bool) -> None:
    """By medians, so that one window decides nothing."""
    assert Series(name="MB", values=values, bound=Bound(share=0.1, allowance=5)).is_flat is is_flat


def window(memory_mb: float) -> Window:
    processes = {name: replace(SMALL, memory_mb=memory_mb) for name in (TEMPORAL, "receiver", "order-worker")}
    return Window(processes=processes, queues=QUIET, orders=50, p99_ms=100)


def test_the_warm_up_of_a_soak_run_is_left_out_and_a_worker_is_judged_with_a_full_cache() -> None:
    """The first of six windows does not count, and the server does not."""
    windows = [window(20), *(window(100) for _ in range(5))]
    assert all(each.is_flat for each in soak_series(windows, is_cache_full=True))
    rising = [window(20), *(window(100 + 40 * number) for number in range(5))]
    found = [each.name for each in soak_series(rising, is_cache_full=True) if not each.is_flat]
    assert found == ["order-worker, MB", "receiver, MB"]
    found = [each.name for each in soak_series(rising, is_cache_full=False) if not each.is_flat]
    assert found == ["receiver, MB"]


def test_the_reports_show_every_value_and_every_fault() -> None:
    """Tables of the curve have a row for each point. A value that grows is marked."""
    report = scale_report(
        command="./scripts/scale",
        machine="2 cores",
        tables=[*curve_tables([point(100), point(2000)]), grows(10, 26)],
        restart=RESTART,
        ending=ENDING,
        faults=grows(10, 26).faults(),
        unjudged=[],
    )
    assert "| 2000 | 90 | 90 | 90 |" in report
    assert "![Age](scale-age.svg)" in report
    assert "(scale-memory.svg)" in report
    assert "| HTTP requests a minute, before → after | 500 → 600 |" in report
    assert "| lost, double | 0, 0 |" in report
    assert "- age: ms grew from 10.0 to 26.0" in report
    series = [Series(name="receiver, MB", values=[90, 95, 300], bound=Bound(share=0.1, allowance=20))]
    soak = soak_report(
        command="./scripts/soak",
        machine="2 cores",
        facts={"Orders": "7"},
        series=series,
        faults=[],
        unjudged=["memory, because of X"],
    )
    assert "| receiver, MB | 90 | 300 | 119 | **grows** |" in soak
    assert soak.endswith("All checks passed.\n\nNot judged: memory, because of X.\n")


def test_a_curve_that_stops_before_two_full_caches_says_that_it_judges_no_worker() -> None:
    """The services are judged all the same."""
    reason = "memory, descriptors and threads of the workers, because fewer than two points have 1000 calls"
    assert curve_unjudged([point(160), point(320)]) == [reason]
    assert curve_unjudged([point(500), point(1000)]) == [reason]
    assert curve_unjudged([point(1000), point(2000)]) == []


@pytest.mark.parametrize(
    ("faults", "last", "code"),
    [([], "all checks passed", 0), (["a grew", "b grew"], "2 checks failed", 1)],
    ids=["passed", "failed"],
)
def test_a_run_ends_with_its_faults_its_figures_and_an_exit_code(
    faults: list[str], last: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures go to standard output, and only if they are asked for."""
    assert conclude(faults, ["c"], {"faults": faults}) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"faults": faults}
    assert err.splitlines() == ["not judged c", *(f"NOT right  {fault}" for fault in faults), last]
    assert conclude(faults, [], None) == code
    assert capsys.readouterr().out == ""


def test_a_report_replaces_the_last_one_of_its_name_in_the_page() -> None:
    """What people wrote around it stays, and so does the other report."""
    page = placed(placed("# Scale\n\nBy hand.\n", "scale", "old"), "soak", "flat")
    again = placed(page, "scale", "new")
    assert again == page.replace("old", "new")
    assert again.startswith("# Scale\n\nBy hand.\n")
    assert placed(again, "soak", "flat") == again
