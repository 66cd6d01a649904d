"""The comparison of two commits: which rounds give which interval."""

import itertools
import random
from statistics import median

import pytest

from scripts.benchmark.against import Comparison, figures, median_interval, table


@pytest.mark.parametrize("count", range(1, 6))
def test_fewer_than_six_rounds_have_no_interval(count: int) -> None:
    """Lowest and highest of five values hold the median with 93.75 % only."""
    assert median_interval([1.0] * count) is None


@pytest.mark.parametrize(
    ("count", "rank"), [pytest.param(6, 0, id="6"), pytest.param(8, 0, id="8"), pytest.param(9, 1, id="9"), (20, 5)]
)
def test_the_interval_is_made_of_the_ranks_of_the_sign_test(count: int, rank: int) -> None:
    """Ranks from published tables of the nonparametric interval of the median."""
    values = [float(each) for each in range(count)]
    random.Random(count).shuffle(values)
    assert median_interval(values) == (float(rank), float(count - 1 - rank))


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    """All 64 ways in which six values can lie below or above the median: 62 of them are covered."""
    covered = 0
    for signs in itertools.product([-1.0, 1.0], repeat=6):
        interval = median_interval(signs)
        assert interval is not None
        covered += interval[0] < 0 < interval[1]
    assert covered == 62


def test_ratios_are_taken_round_by_round() -> None:
    """A slow round of both changes nothing."""
    comparison = Comparison(figure="all CPU per call", in_flight=50, rounds=[0.5, 0.9, 0.7, 0.8, 0.6, 0.7])
    assert comparison.median == median([0.7, 0.7])
    assert comparison.interval == (0.5, 0.9)
    assert "50 in flight  0.70 (0.50 to 0.90)" in table([comparison], "main~1")


def test_the_figures_are_those_of_one_call_and_of_many() -> None:
    """Latency is read with one call in flight, throughput with many."""
    row = {"server_cpu_ms": 30.0, "client_cpu_ms": 40.0, "p50_ms": 100.0, "calls_per_s": 9.0}
    found = figures({"rows": [row | {"in_flight": 1}, row | {"in_flight": 50, "calls_per_s": 70.0}]})
    assert found["all CPU per call", 1] == found["all CPU per call", 50] == 70.0
    assert found["whole order, p50", 1] == 100.0
    assert found["calls per second", 50] == 70.0
    assert ("calls per second", 1) not in found
