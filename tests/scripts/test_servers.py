"""Which servers `scripts/test` runs the tests on."""

import pytest

from scripts.commands.test import plan
from scripts.environment.temporal_cli import NEWEST, OLDEST


def test_all_runs_the_suite_on_the_oldest_and_the_newest_server_and_the_core_between() -> None:
    """No pinned server is left out."""
    assert plan("all", None) == [(OLDEST, "all"), (NEWEST, "suite"), ("1.30.2", "core"), ("1.31.2", "core")]


@pytest.mark.parametrize(
    ("tier", "server", "chosen"),
    [("all", NEWEST, NEWEST), ("suite", None, OLDEST), ("short", None, OLDEST), ("suite", NEWEST, NEWEST)],
)
def test_any_other_run_has_one_server(tier: str, server: str | None, chosen: str) -> None:
    """The one that the user named, or the oldest."""
    assert plan(tier, server) == [(chosen, tier)]
