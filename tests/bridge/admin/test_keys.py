"""The commands that rotate, list and compare keys."""

import json
import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bridge.admin.command import CommandError
from bridge.admin.keys import compared
from bridge.admin.pair import replace_content
from bridge.security.keys import KeySet, new_key
from tests.support.commands import run
from tests.support.settings_files import caller_tree, handler_tree, plain_key_set, secrets_of, toml


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "start.toml"
    path.write_text(toml(plain_key_set("2027-01-31", "k1")) + "\n")
    path.chmod(0o640)
    return path


def test_rotate_adds_a_key_that_does_not_sign_yet(key_file: Path) -> None:
    """The old keys, the signing key and the mode of the file stay. The new key is not printed, the next steps are."""
    before = tomllib.loads(key_file.read_text())
    done = run("keys", "rotate", str(key_file))
    assert (done.returncode, done.stderr) == (0, "")
    after = tomllib.loads(key_file.read_text())
    [added] = set(after["keys"]) - set(before["keys"])
    assert after == {"signing": "2027-01-31", "keys": {**before["keys"], added: after["keys"][added]}}
    KeySet.model_validate(after)
    assert key_file.stat().st_mode & 0o777 == 0o640
    assert list(key_file.parent.iterdir()) == [key_file]
    assert f'3. set signing = "{added}"' in done.stdout
    assert not [key for key in after["keys"].values() if key in done.stdout]


def test_rotate_leaves_the_file_to_the_user_of_the_service(key_file: Path) -> None:
    """An operator may rotate as root. The service would otherwise keep its old keys, and not start any more."""
    owner = os.geteuid() or 65534
    os.chown(key_file, owner, os.getegid() if owner == os.geteuid() else 65534)
    before = key_file.stat()
    assert run("keys", "rotate", str(key_file)).returncode == 0
    after = key_file.stat()
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
def test_rotate_as_a_user_who_may_not_keep_the_owner_leaves_no_file_behind(key_file: Path) -> None:
    """The folder may be shared. The error says who may do it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys.toml")
        path.write_bytes(key_file.read_bytes())
        Path(folder).chmod(0o777)
        os.seteuid(65534)
        try:
            with pytest.raises(CommandError, match="belongs to user 0, group 0: run the command as its owner"):
                replace_content(path, "")
        finally:
            os.seteuid(0)
        assert list(Path(folder).iterdir()) == [path]
        assert path.read_bytes() == key_file.read_bytes()


def test_rotate_follows_a_symbolic_link_and_prints_json(key_file: Path) -> None:
    """The file that is linked to gets the key; the link stays."""
    link = key_file.with_name("link.toml")
    link.symlink_to(key_file.name)
    printed = json.loads(run("keys", "rotate", str(link), "--json").stdout)
    assert link.is_symlink()
    assert printed["added"] in tomllib.loads(key_file.read_text())["keys"]
    assert (printed["signing"], len(printed["steps"])) == ("2027-01-31", 5)


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        pytest.param(toml(caller_tree()), 1, "no key file", id="settings"),
        pytest.param(toml(plain_key_set(*(f"k{number}" for number in range(10)))), 1, "ten keys", id="full"),
        pytest.param("signing = ", 2, "not TOML", id="no TOML"),
        pytest.param(None, 2, "no such file", id="missing"),
    ],
)
def test_rotate_changes_no_other_file(key_file: Path, content: str | None, code: int, says: str) -> None:
    """The error says what the file should be, and quotes nothing of it."""
    key_file.write_text(content) if content is not None else key_file.unlink()
    done = run("keys", "rotate", str(key_file))
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr
    assert content is None or key_file.read_text() == content


@pytest.mark.parametrize("tree", [caller_tree(), handler_tree()], ids=["caller", "handler"])
def test_list_shows_ids_ages_and_fingerprints_of_both_sides(tree: dict[str, Any], tmp_path: Path) -> None:
    """And never a key."""
    path = tmp_path / "bridge.toml"
    path.write_text(toml(tree))
    table, as_json = (run("keys", "list", *option, BRIDGE_CONFIG=str(path)) for option in ((), ("--json",)))
    assert (table.returncode, as_json.returncode, table.stderr) == (0, 0, "")
    reports = json.loads(as_json.stdout)
    assert {each["key_set"].rpartition(".")[2] for each in reports} >= {"start_keys", "completion_keys"}
    assert all(len(each["fingerprint"]) == 16 for each in reports)
    assert not [secret for secret in secrets_of(tree) if secret in table.stdout + as_json.stdout]
    assert "bridge_key_uses_total" in table.stdout
    for each in reports:
        [line] = [line for line in table.stdout.splitlines() if each["fingerprint"] in line]
        assert each["key_set"] in line


def test_list_shows_the_keys_of_a_handler_that_is_set_by_variables() -> None:
    """A container often has no file."""
    variables = {"BRIDGE_CONFIG": ""} | {
        f"BRIDGE_{name.upper()}": each if isinstance(each, str) else json.dumps(each)
        for name, each in handler_tree().items()
    }
    done = run("keys", "list", "--json", cwd=None, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert {each["key_set"].partition(".")[0] for each in json.loads(done.stdout)} == {"callers"}


def test_a_fingerprint_depends_on_the_key_and_not_on_its_id() -> None:
    """The same key has the same fingerprint under another id, and no part of the key is in it."""
    one, other = new_key(), new_key()
    prints = KeySet.model_validate({"signing": "a", "keys": {"a": one, "b": other, "c": one}}).fingerprints()
    assert prints["a"] == prints["c"] != prints["b"]
    assert KeySet.model_validate({"signing": "a", "keys": {"a": one}}).raw()["a"].hex()[:16] != prints["a"]


def test_keys_of_both_sides_are_compared_by_id() -> None:
    """Every key of either side gets one row; a peer that did not answer gets one in all."""
    ours = {"start_keys": {"k1": "a", "k2": "b", "k3": "c"}, "completion_keys": {"k1": "d"}}
    theirs = {"start_keys": {"k1": "a", "k2": "x", "k4": "c"}}
    rows = [(each.key_set, each.key_id, each.result) for each in compared("payments", ours, theirs)]
    assert rows == [
        ("completion_keys", "k1", "only here"),
        ("start_keys", "k1", "same"),
        ("start_keys", "k2", "differs"),
        ("start_keys", "k3", "only here"),
        ("start_keys", "k4", "only there"),
    ]
    [row] = compared("payments", ours, "handler not reached")
    assert (row.peer, row.result) == ("payments", "handler not reached")


def test_list_says_which_key_signs_and_when_each_was_made(tmp_path: Path) -> None:
    """An id that begins with no date says nothing of the age."""
    path = tmp_path / "bridge.toml"
    path.write_text(toml(caller_tree() | {"callback_keys": plain_key_set("2027-01-31", "k1")}))
    rows = json.loads(run("keys", "list", "--json", BRIDGE_CONFIG=str(path)).stdout)
    shown = [each for each in rows if each["key_set"] == "callback_keys"]
    assert [(each["key_id"], each["signs"], (each["made"] or "")[:10]) for each in shown] == [
        ("2027-01-31", True, "2027-01-31"),
        ("k1", False, ""),
    ]


def test_rotate_replaces_the_file_at_once(tmp_path: Path) -> None:
    """A process that reads meanwhile reads the whole old file."""
    path = tmp_path / "keys.toml"
    path.write_text(toml(plain_key_set("k1")))
    content = path.read_text()
    with path.open() as old:
        assert run("keys", "rotate", str(path)).returncode == 0
        assert old.read() == content
