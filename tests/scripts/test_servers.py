"""Which servers `scripts/test` runs the tests on, and which ones a command accepts."""

import argparse

import pytest

from scripts.commands.test import plan
from scripts.environment.temporal_cli import CHOICE_VARIABLE, NEWEST, OLDEST, POSTGRES, add_server_option


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


def test_a_command_that_reads_the_server_as_one_process_refuses_the_one_with_three(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also if the environment names it. Other commands accept it, and this one accepts other servers."""
    strict, other = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_server_option(strict, is_one_process=True)
    add_server_option(other)
    assert other.parse_args(["--server", POSTGRES]).server == POSTGRES
    assert strict.parse_args(["--server", NEWEST]).server == NEWEST
    monkeypatch.setenv(CHOICE_VARIABLE, POSTGRES)
    from_environment = argparse.ArgumentParser()
    add_server_option(from_environment, is_one_process=True)
    for parser, arguments in ((strict, ["--server", POSTGRES]), (from_environment, [])):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(arguments)
        assert ended.value.code == 2
        assert "this command reads the server as one process, and 'postgres' has three" in capsys.readouterr().err
