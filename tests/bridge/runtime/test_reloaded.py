"""Files that change while the process runs: mounted secrets, files in place, bad files."""

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from temporalio.common import MetricMeter

from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import Alarm, LiveKeys, Reloaded
from bridge.runtime.settings import SettingsError, load
from bridge.security.keys import KeySource, new_key
from caller.settings import CallerSettings
from tests.support.helpers import HANDLER
from tests.support.mounted import (
    Write,
    by_rename,
    by_rename_with_the_old_times,
    by_symbolic_link,
    in_place,
    in_place_with_the_old_times,
)
from tests.support.settings_files import Configured, caller_tree, plain_key_set, toml

START = f"handlers.{HANDLER}.start_keys"


class CountingMetrics(Metrics):
    """Counts without an exporter."""

    def __init__(self) -> None:
        super().__init__(MetricMeter.noop)
        self.counted: list[tuple[str, str | int]] = []

    def count(self, name: str, **labels: str | int) -> None:
        self.counted.append((name, *labels.values()))  # type: ignore[arg-type] # one label here


class Watch:
    """A value of one file, and a clock."""

    def __init__(self, path: Path) -> None:
        self.now = 0.0
        self.metrics = CountingMetrics()
        self.value = Reloaded(
            path.read_text(),
            make=lambda: self._read(path),
            files=lambda _: [path],
            alarm=Alarm("keys", self.metrics),
            monotonic=lambda: self.now,
        )

    def after(self, seconds: float) -> str:
        self.now += seconds
        return self.value()

    def _read(self, path: Path) -> str:
        text = path.read_text()
        if text == "bad":
            raise ValueError("the text is bad")
        return text


WAYS = [in_place, in_place_with_the_old_times, by_rename, by_rename_with_the_old_times, by_symbolic_link]


@pytest.mark.parametrize("write", WAYS)
def test_a_changed_file_is_taken_within_a_second_however_it_was_written(tmp_path: Path, write: Write) -> None:
    """The next use sees it, at most a second later, also if size and time are those of the old file."""
    path = tmp_path / "key"
    write(path, "one") if write is by_symbolic_link else path.write_text("one")
    watch = Watch(path)
    for text in ("two", "six"):
        write(path, text)
        assert watch.after(1) == text
    assert watch.metrics.counted == []


def test_a_change_before_the_first_look_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A service may connect for a while between the reading of its settings and the first request."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "key"
    path.write_text("one")
    watch = Watch(path)
    watch.value._value = "read before"
    assert watch.after(0.9) == "read before"
    assert watch.after(0.1) == "one"
    assert not caplog.records


def test_files_are_looked_at_once_a_second(tmp_path: Path) -> None:
    """Uses in between cost no call to the file system."""
    path = tmp_path / "key"
    path.write_text("one")
    watch = Watch(path)
    path.write_text("two")
    assert watch.after(0.9) == "one"
    assert watch.after(0.1) == "two"


def test_a_bad_file_keeps_the_old_value_and_raises_one_alarm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line at ERROR for each fault, a count for each look while it lasts, and a good file ends it."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "key"
    path.write_text("one")
    watch = Watch(path)
    for _ in range(3):
        path.write_text("bad")
        assert watch.after(1) == "one"
    path.unlink()
    assert watch.after(1) == "one"
    path.write_text("two")
    assert watch.after(1) == "two"
    events = [(each.levelname, each.getMessage().partition(":")[0]) for each in caplog.records]
    failed, taken = ("ERROR", "bridge.files_not_taken"), ("INFO", "bridge.files_taken")
    assert events == [failed, failed, taken]
    assert "the text is bad" in caplog.records[0].getMessage()
    assert watch.metrics.counted == [("bridge_files_not_taken", "keys")] * 4


def test_a_file_that_becomes_readable_again_is_taken(tmp_path: Path) -> None:
    """While a fault lasts, the value is made again at every look: the cause need not be in the files' states."""
    path = tmp_path / "key"
    path.write_text("one")
    watch = Watch(path)
    faults = [OSError("no permission")]

    def make() -> str:
        if faults:
            raise faults.pop()
        return path.read_text()

    watch.value._make = make
    path.write_text("two")
    assert [watch.after(1), watch.after(1)] == ["one", "two"]


class Files:
    """The caller's settings file with a key file, and its present start keys."""

    def __init__(self, configured: Configured, folder: Path) -> None:
        self.tree = caller_tree()
        self.key_file = folder / "secrets" / "start.toml"
        self.key_file.parent.mkdir()
        self.key_file.write_text(toml(plain_key_set("k1")))
        self.tree["handlers"][HANDLER]["start_keys"] = {"file": "secrets/start.toml"}
        self.path = configured(self.tree)

    def read(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], KeySource]:
        """The sources of the key sets, which look at the files at every use."""
        monkeypatch.setattr("bridge.runtime.reloaded._PACE_S", 0)
        return LiveKeys(load(CallerSettings), Metrics(MetricMeter.noop))


@pytest.fixture
def files(configured: Configured, tmp_path: Path) -> Files:
    return Files(configured, tmp_path)


def test_keys_in_a_key_file_and_in_the_settings_file_change_without_a_restart(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key file ends with a newline or not, and stands next to the settings file if its path is not absolute."""
    keys = files.read(monkeypatch)
    start, callback = keys(START), keys("callback_keys")
    assert list(start().keys) == ["k1"]
    files.key_file.write_text(toml(plain_key_set("k2", "k1")) + "\n\n")
    assert (start().signing, list(start().keys)) == ("k2", ["k2", "k1"])
    files.tree["callback_keys"] = plain_key_set("new")
    files.path.write_text(toml(files.tree))
    assert (callback().signing, start().signing) == ("new", "k2")


def test_settings_stay_with_the_file_that_they_were_read_from(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process of both sides, as in a test of a team, names one file after the other."""
    keys = files.read(monkeypatch)
    elsewhere = tmp_path / "handler" / "handler.toml"
    elsewhere.parent.mkdir()
    elsewhere.write_text("name = 7\n")
    monkeypatch.setenv("BRIDGE_CONFIG", str(elsewhere))
    assert keys(START)().signing == "k1"
    files.key_file.write_text(toml(plain_key_set("k2")))
    files.path.write_text(toml(files.tree | {"callback_keys": plain_key_set("new")}))
    assert (keys(START)().signing, keys("callback_keys")().signing) == ("k2", "new")


def test_keys_that_move_from_the_settings_file_to_a_key_file_are_followed_there(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files to look at are those that the present settings name."""
    callback = files.read(monkeypatch)("callback_keys")
    moved = files.path.with_name("callback.toml")
    moved.write_text(toml(plain_key_set("moved")))
    files.path.write_text(toml(files.tree | {"callback_keys": {"file": str(moved)}}))
    assert callback().signing == "moved"
    moved.write_text(toml(plain_key_set("again")))
    assert callback().signing == "again"


def test_a_key_that_was_rotated_out_does_not_return_with_the_removal_of_its_peer(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last keys stay until a restart, not those with which the process began."""
    start = files.read(monkeypatch)(START)
    assert list(start().keys) == ["k1"]
    files.key_file.write_text(toml(plain_key_set("k2")))
    assert list(start().keys) == ["k2"]
    tree = files.tree["handlers"]
    tree["renamed"] = tree.pop(HANDLER)
    for endpoint in files.tree["endpoints"].values():
        endpoint["handler"] = "renamed"
    files.path.write_text(toml(files.tree))
    assert list(start().keys) == ["k2"]


def test_settings_from_a_pipe_are_read_once(files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell gives decrypted settings as a pipe. A second reading would wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files.tree["handlers"][HANDLER]["start_keys"] = {"file": str(files.key_file)}
    writer = threading.Thread(target=pipe.write_text, args=[toml(files.tree)], daemon=True)
    writer.start()
    monkeypatch.setenv("BRIDGE_CONFIG", str(pipe))
    keys = files.read(monkeypatch)
    writer.join()
    assert keys(START)().signing == "k1"
    files.key_file.write_text(toml(plain_key_set("k2")))
    assert keys(START)().signing == "k2"
    files.key_file.unlink()
    os.mkfifo(files.key_file)
    files.path.write_text(toml(files.tree))
    monkeypatch.setenv("BRIDGE_CONFIG", str(files.path))
    with pytest.raises(SettingsError, match=f"{START}: file: a pipe can be read only once"):
        load(CallerSettings)


def test_a_relative_path_stays_where_it_was_when_the_process_changes_its_folder(
    files: Files, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The settings file and the key files are found again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BRIDGE_CONFIG", files.path.name)
    start = files.read(monkeypatch)(START)
    monkeypatch.chdir("/")
    files.key_file.write_text(toml(plain_key_set("k2")))
    assert start().signing == "k2"
    files.key_file.write_text(toml(plain_key_set("k3")))
    assert start().signing == "k3"


def test_only_keys_change_without_a_restart(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that is no longer in the settings keeps its keys, and a bad setting keeps all keys."""
    start = files.read(monkeypatch)(START)
    files.tree["handlers"]["other"] = files.tree["handlers"].pop(HANDLER)
    files.tree["endpoints"]["payments"]["handler"] = "other"
    files.path.write_text(toml(files.tree))
    assert start().signing == "k1"
    files.path.write_text("name = 7\n")
    assert start().signing == "k1"


BAD = [
    pytest.param("", "signing", id="empty"),
    pytest.param('signing = "k1"\nkeys = { k1 = "short" }', "base64url", id="short key"),
    pytest.param('signing = "k2"\nkeys = { k1 = "KEY" }', "no key 'k2'", id="unknown signing id"),
    pytest.param('signing = "k1"\nkeys = { k1 = "KEY', "line 2", id="cut off"),
]


@pytest.mark.parametrize(("text", "named"), BAD)
def test_a_bad_key_file_is_named_and_not_quoted(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str, named: str
) -> None:
    """At run time the old keys stay; at start the process refuses. Both name the field."""
    start, key = files.read(monkeypatch)(START), new_key()
    files.key_file.write_text(text.replace("KEY", key))
    before = start().raw()
    with pytest.raises(SettingsError) as raised:
        load(CallerSettings)
    for message in (str(raised.value), caplog.text):
        assert START in message
        assert named in message
        assert key not in message
    files.key_file.write_text(toml(plain_key_set("k3")))
    assert start().raw() != before


def test_a_key_file_with_inline_keys_or_a_missing_one_is_refused(files: Files) -> None:
    """The error says which of the two to remove, or which file is missing."""
    peer = files.tree["handlers"][HANDLER]
    peer["start_keys"]["signing"] = "k1"
    files.path.write_text(toml(files.tree))
    with pytest.raises(SettingsError, match=f"{START}: file: the key file has `signing` and `keys`"):
        load(CallerSettings)
    files.key_file.unlink()
    peer["start_keys"].pop("signing")
    files.path.write_text(toml(files.tree))
    with pytest.raises(SettingsError, match=rf"{START}: key file .*start.toml: no such file"):
        load(CallerSettings)
