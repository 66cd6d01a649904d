"""What the benchmark computes: percentiles, ratios with their spread, request schedules, counts, and the report."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent

from bridge.workflow.call import Renewals
from scripts.benchmark.report import PLOTS, markdown, summary
from scripts.benchmark.results import (
    GOAL_SETTING,
    Batch,
    LongCall,
    Memory,
    Ratio,
    Results,
    Sample,
    frontend_requests,
    http_requests,
    percentile,
    ratios,
    read_sample,
    request_times,
    rows,
    to_json,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def sample(call_ms: float = 50.0) -> Sample:
    return Sample(
        call_ms=call_ms, resume_ms=20.0, caller_events=11, caller_bytes=2000, target_events=5, target_bytes=900
    )


def batch(mode: str, round: int, order_ms: float, **changes: Any) -> Batch:  # noqa: A002 - the field's name
    made = Batch(
        mode=mode,
        setting=GOAL_SETTING,
        round=round,
        target_seconds=0,
        in_flight=1,
        full_calls=0,
        full_seconds=0.0,
        seconds=2.0,
        order_ms=[order_ms] * 4,
        samples=[sample(order_ms / 2)] * 4,
        server_cpu_s=0.2,
        client_cpu_s=0.1,
        service_cpu_s=0.0,
        http_requests=8,
        grpc_requests=40.0,
    )
    return replace(made, **changes)


def results(*batches: Batch, **more: Any) -> Results:
    settings = [{"name": GOAL_SETTING, "flags": ["system.flag=true"]}]
    return Results(server="1.29.1", settings=settings, batches=batches, **more)


def compared(made: Results) -> list[Ratio]:
    return ratios(made, subjects=["bridge"], references=["nexus"])


def find(found: list[Ratio], figure: str) -> Ratio:
    [ratio] = [each for each in found if each.figure == figure]
    return ratio


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_percentile_is_one_of_the_values_and_covers_its_share(values: list[float], share: float) -> None:
    """And no smaller value does."""
    found = percentile(values, share)
    assert found in values
    assert sum(each <= found for each in values) >= share * len(values) - 1e-9
    assert sum(each < found for each in values) < share * len(values) + 1e-9


def test_a_ratio_is_the_median_over_rounds_with_the_lowest_and_the_highest() -> None:
    """Computed within each round: a round that was slow for everybody does not widen it."""
    rounds = [(70, 100), (660, 1000), (80, 100)]
    batches = [
        each
        for number, (ours, theirs) in enumerate(rounds)
        for each in (batch("bridge", number, ours), batch("nexus", number, theirs))
    ]
    ratio = find(compared(results(*batches)), "whole order, p50")
    assert (ratio.value, ratio.low, ratio.high) == (0.7, 0.66, 0.8)
    judged = find(compared(results(*batches)), "the call itself, p50")
    assert (judged.value, judged.goal, judged.met) == (0.7, 0.5, False)


def test_a_round_that_one_of_the_two_missed_is_left_out() -> None:
    """Nothing is compared across rounds."""
    batches = [batch("bridge", 0, 60), batch("bridge", 1, 90), batch("nexus", 1, 100)]
    ratio = find(compared(results(*batches)), "the call itself, p50")
    assert (ratio.low, ratio.high) == (0.9, 0.9)
    assert ratio.met is False


def test_more_calls_per_second_are_better() -> None:
    """Its goal is a least, all others are a most."""
    batches = [
        batch("bridge", 0, 60, in_flight=50, seconds=1.0),
        batch("nexus", 0, 60, in_flight=50, seconds=1.3),
    ]
    ratio = find(compared(results(*batches)), "calls per second, 50 in flight")
    assert ratio.value == pytest.approx(1.3)
    assert ratio.met is True


def test_only_the_default_server_with_eager_dispatch_has_goals() -> None:
    """With another server or setting a ratio is shown, not judged."""
    batches = [batch(mode, 0, 60, setting="raised, eager") for mode in ("bridge", "nexus")]
    found = compared(results(*batches))
    assert found
    assert all(each.goal is None and each.met is None for each in found)


def test_what_the_server_did_for_several_modes_at_once_is_compared_with_nothing() -> None:
    """The costs of the modes cannot be separated."""
    batches = [batch(mode, 0, 60, server_cpu_s=None) for mode in ("bridge", "nexus")]
    figures = {each.figure for each in compared(results(*batches))}
    assert "whole order, p50" in figures
    assert not any("CPU" in figure for figure in figures)
    assert rows(batches)[0].server_cpu_ms is None


def test_longer_targets_are_not_mixed_with_those_that_end_at_once() -> None:
    """Not in the ratios, and not in the rows."""
    batches = [
        each
        for mode, order_ms in (("bridge", 60), ("nexus", 100))
        for each in (batch(mode, 0, order_ms), batch(mode, 0, 1000, target_seconds=1.0))
    ]
    assert find(compared(results(*batches)), "whole order, p50").value == 0.6
    assert [row.target_seconds for row in rows(batches)] == [0, 1.0, 0, 1.0]


def test_a_row_holds_all_rounds_and_costs_per_call() -> None:
    """Latencies over all calls, costs over all calls, throughput as the median of the rounds."""
    [row] = rows([batch("nexus", 0, 100), batch("nexus", 1, 200), batch("nexus", 2, 300, seconds=4.0)])
    assert row.calls == 12
    assert (row.p50_ms, row.p90_ms, row.p99_ms) == (200, 300, 300)
    assert row.call_p50_ms == 100
    assert row.calls_per_s == 2.0
    assert row.server_cpu_ms == pytest.approx(50)
    assert row.client_cpu_ms == pytest.approx(25)
    assert (row.http_requests, row.grpc_requests) == (2, 10)


def test_throughput_is_measured_while_the_planned_number_of_calls_is_in_flight() -> None:
    """A last straggler does not count."""
    assert batch("nexus", 0, 100, full_calls=3, full_seconds=0.5, seconds=9.0).calls_per_s == 6.0
    assert batch("nexus", 0, 100, full_calls=0, full_seconds=0.0, seconds=2.0).calls_per_s == 2.0


@pytest.mark.parametrize(
    ("ends", "seconds"),
    [
        pytest.param(0, [0, 0], id="at once"),
        pytest.param(29, [0, 29], id="within the first lease"),
        pytest.param(60, [0, 30, 60], id="one renewal"),
        pytest.param(3600, [0, 30, 90, 210, 450, 930, 1890, 3600], id="one hour"),
    ],
)
def test_the_requests_of_a_call_follow_its_schedule(ends: float, seconds: list[float]) -> None:
    """The start, a renewal when the lease is over, further ones at doubled distances, and the callback."""
    times = request_times(timedelta(seconds=30), Renewals(), ends=timedelta(seconds=ends))
    assert [each.total_seconds() for each in times] == seconds


def test_a_day_takes_at_most_one_request_an_hour_after_the_first_few() -> None:
    """The distance is capped."""
    times = request_times(timedelta(seconds=30), Renewals(), ends=timedelta(days=1))
    assert len(times) <= 40
    assert max(later - earlier for earlier, later in pairwise(times)) == timedelta(hours=1)


def event(seconds: float, kind: str, *, activity: str | None = None) -> HistoryEvent:
    made = HistoryEvent(event_type=EventType.Value(f"EVENT_TYPE_{kind}"))
    made.event_time.FromDatetime(NOON + timedelta(seconds=seconds))
    if activity is not None:
        made.activity_task_scheduled_event_attributes.activity_type.name = activity
    return made


CALLER_HISTORY = [
    event(0.0, "WORKFLOW_EXECUTION_STARTED"),
    event(0.1, "WORKFLOW_TASK_STARTED"),
    event(0.5, "ACTIVITY_TASK_COMPLETED"),
    event(0.6, "WORKFLOW_TASK_STARTED"),
    event(0.7, "WORKFLOW_EXECUTION_COMPLETED"),
]


def test_a_call_is_timed_from_both_histories() -> None:
    """From the moment that the outcome is certain, when the target's run closes."""
    target = [event(0.2, "ACTIVITY_TASK_SCHEDULED", activity="charge"), event(0.4, "WORKFLOW_EXECUTION_COMPLETED")]
    found = read_sample(CALLER_HISTORY, target)
    assert found.call_ms == pytest.approx(500)
    assert found.resume_ms == pytest.approx(200)
    assert (found.caller_events, found.target_events) == (5, len(target))
    assert found.caller_bytes > 0


def test_grpc_requests_are_those_that_the_frontend_took() -> None:
    """Not the server's own, from role to role."""
    text = """\
# TYPE service_requests counter
service_requests{namespace="a",operation="StartWorkflowExecution",service_name="frontend"} 3
service_requests{namespace="a",operation="StartWorkflowExecution",service_name="history"} 3
service_requests{namespace="b",operation="PollWorkflowTaskQueue",service_name="frontend"} 1.5e+01
service_requests_total{service_name="frontend"} 99
"""
    assert frontend_requests(text) == 18


def test_http_requests_are_counted_by_call() -> None:
    """From the access logs; other lines, and lines cut short, count for nothing."""
    lines = [
        {"event": "bridge.http_request", "bridge.request_id": "one"},
        {"event": "bridge.http_request", "bridge.request_id": "one"},
        {"event": "bridge.http_request", "bridge.route": "/payments"},
        {"event": "bridge.completion_delivered", "bridge.request_id": "one"},
    ]
    log = "\n".join(map(json.dumps, lines)) + '\n{"event": "bridge.ht'
    assert http_requests(log.encode()) == {"one": 2, "": 1}


def whole() -> Results:
    return results(
        *(
            batch(mode, number, order_ms + number, in_flight=in_flight)
            for number in range(2)
            for in_flight in (1, 50)
            for mode, order_ms in (("bridge", 40), ("nexus", 100))
        ),
        long_calls=[LongCall(name="one hour", seconds=3600, requests=8, limit=12)],
        memory=[
            Memory(role="receiver", in_flight=10_000, before_bytes=60_000_000, after_bytes=66_000_000),
            Memory(role="orders", in_flight=10_000, before_bytes=60_000_000, after_bytes=160_000_000),
        ],
    )


def test_the_limits_are_judged_too() -> None:
    """Requests, and memory of processes without state, are judged. A worker's memory is shown only."""
    made = whole()
    judged = {each.figure: each.met for each in compared(made) if each.against == "limit"}
    assert judged == {
        "HTTP requests, shorter than the first lease": True,
        "HTTP requests, one hour": True,
        "memory of the receiver, growth in MB with 10000 in flight": False,
    }


def test_the_json_has_the_promised_fields() -> None:
    """What other programs read."""
    made = whole()
    text = json.loads(json.dumps(to_json(made, compared(made))))
    assert {"server", "settings", "rows", "ratios"} <= text.keys()
    row = {"mode", "setting", "target_seconds", "in_flight", "calls", "p50_ms", "p90_ms", "p99_ms", "calls_per_s"}
    row |= {"server_cpu_ms", "client_cpu_ms", "http_requests", "caller_events", "target_events"}
    assert all(row <= each.keys() for each in text["rows"])
    ratio = {"figure", "against", "setting", "value", "low", "high", "goal", "met"}
    assert all(ratio <= each.keys() for each in text["ratios"])


def test_the_report_is_whole_tables_and_names_only_plots_that_were_drawn() -> None:
    """Every line of a table has as many cells as its head."""
    made = whole()
    deployments = {"bridge": "order worker", "nexus": "payment worker"}
    text = markdown(made, compared(made), deployments=deployments, command="./scripts/bench", plots=["latency"])
    assert PLOTS["latency"] in text
    assert PLOTS["throughput"] not in text
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    assert "| the call itself, p50 | `bridge` | `nexus` | 0.403 (0.4 to 0.406) | ≤ 0.5 | met |" in text
    assert "**missed**" in text
    assert "| whole order, p50 | **bridge**, 2.48 x |" in text
    assert "| server CPU, 1 in flight | no difference |" in text


def test_who_wins_is_said_only_where_the_rounds_agree() -> None:
    """More calls are better, less time is better, and a wide interval is marked."""
    batches = [
        batch(mode, number, order_ms, in_flight=in_flight, seconds=seconds + number / 100, server_cpu_s=None)
        for number, spread in enumerate((0, 20))
        for mode, order_ms, seconds in (("bridge", 100 + 2 * spread, 2.0), ("nexus", 50 + spread / 4, 1.0))
        for in_flight in (1, 50)
    ]
    made = results(*batches)
    text = markdown(made, compared(made), deployments={}, command="", plots=[])
    assert "| whole order, p50 | `nexus`, about 2.27 x |" in text
    assert "| calls per second, 50 in flight | `nexus`, 2.00 x |" in text


def test_the_summary_says_what_missed_its_goal() -> None:
    """One line for each ratio."""
    found = compared(whole())
    lines = summary(found).splitlines()
    assert len(lines) == len(found)
    assert [("MISSED" in line) for line in lines] == [each.met is False for each in found]
