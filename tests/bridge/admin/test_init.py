"""`callback-bridge init`: settings with fresh keys that both sides accept."""

import json
import os
import re
from pathlib import Path

import pytest

from bridge.runtime.settings import load
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.commands import run


def test_both_sides_accept_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree on names, URLs and the keys that they share; only the owner can read the files."""
    done = run("init", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"written": [str(tmp_path / "caller.toml"), str(tmp_path / "handler.toml")]}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "caller.toml"))
    caller = load(CallerSettings)
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "handler.toml"))
    handler = load(HandlerSettings)
    ours, theirs = handler.callers[caller.name], caller.handlers[handler.name]
    assert ours.start_keys == theirs.start_keys
    assert ours.completion_keys == theirs.completion_keys
    assert caller.receiver is not None
    assert str(ours.callbacks[0].url) == f"{caller.receiver.url}/callbacks"
    assert caller.endpoints["payments"].url == f"{handler.service.url}/c/{caller.name}"


def test_settings_that_exist_are_not_replaced(tmp_path: Path) -> None:
    """Their keys may be in use: neither file is touched."""
    (tmp_path / "handler.toml").write_text("mine")
    done = run("init", str(tmp_path))
    assert done.returncode == 1
    assert "handler.toml exists already" in done.stderr
    assert (tmp_path / "handler.toml").read_text() == "mine"
    assert not (tmp_path / "caller.toml").exists()


def test_no_two_runs_write_the_same_key(tmp_path: Path) -> None:
    """And each side has keys that the other does not know."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert run("init", str(tmp_path / name)).returncode == 0
    files = [tmp_path / name / f"{side}.toml" for name in ("first", "second") for side in ("caller", "handler")]
    seen = [set(re.findall(r'"([\w-]{43})"', path.read_text())) for path in files]
    assert not (seen[0] | seen[1]) & (seen[2] | seen[3])
    assert seen[0] - seen[1]
    assert seen[1] - seen[0]


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--handler", "payment team", "handler: String should match pattern"),
        ("--endpoint", "payments/eu", "endpoint: String should match pattern"),
    ],
)
def test_a_name_that_no_side_could_use_is_refused_by_its_field(
    tmp_path: Path, option: str, value: str, says: str
) -> None:
    """Nothing is written."""
    done = run("init", str(tmp_path), option, value)
    assert done.stderr.startswith(f"callback-bridge: {says}")
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])


def test_a_value_that_is_not_utf_8_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """A terminal with another encoding. A second run would find an empty file that is not replaced."""
    done = run("init", str(tmp_path), "--task-queue", os.fsdecode(b"k\xe4se"))
    assert done.stderr == "callback-bridge: a value is not UTF-8; the terminal and the shell have to use UTF-8\n"
    assert (done.returncode, list(tmp_path.iterdir())) == (1, [])


def test_names_and_ports_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both sides. The default ports are often taken, and a second caller needs another name."""
    names = ("--caller", "shop-prod", "--receiver-port", "9080", "--service-port", "9081")
    assert run("init", str(tmp_path), *names).returncode == 0
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "caller.toml"))
    caller = load(CallerSettings)
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "handler.toml"))
    handler = load(HandlerSettings)
    assert (caller.name, list(handler.callers)) == ("shop-prod", ["shop-prod"])
    assert caller.receiver is not None
    assert (caller.receiver.url, caller.receiver.port) == ("http://127.0.0.1:9080", 9080)
    assert (handler.service.url, handler.service.port) == ("http://127.0.0.1:9081", 9081)
    assert caller.endpoints["payments"].url == "http://127.0.0.1:9081/c/shop-prod"


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    """The reason alone would not say which of the paths of a command is wrong."""
    done = run("init", str(tmp_path / "missing"))
    assert done.stderr == f"callback-bridge: {tmp_path / 'missing' / 'caller.toml'}: No such file or directory\n"
    assert done.returncode == 1


def test_names_may_have_any_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporal allows it for task queues, and Nexus for operations."""
    names = ("--task-queue", "zahlungen-\u00fc-\U0001f600", "--operations", "Zahlung\U0001f600/*")
    done = run("init", str(tmp_path), *names)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / "handler.toml"))
    handler = load(HandlerSettings)
    assert handler.task_queue == names[1]
    assert [each.operations for each in handler.callers.values()] == [(names[3],)]
