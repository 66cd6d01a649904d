"""Settings of both sides: where they come from, and what is refused."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from pydantic import ValidationError

from bridge.runtime.settings import BridgeSettings, load, require_distinct_keys
from bridge.security.egress import UrlEntry, allowed_destination
from bridge.security.keys import KeySet, new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.helpers import CALLER, HANDLER, Keys, caller_settings, handler_settings, key_set
from tests.support.settings_files import (
    START,
    Configured,
    Spoil,
    caller_tree,
    handler_tree,
    message_of,
    put,
    toml,
)

SettingsT = TypeVar("SettingsT", bound=BridgeSettings)


SECRET = new_key()


def test_both_sides_read_their_file(configured: Configured) -> None:
    """The settings of the guide, complete and as small as they get."""
    configured(caller_tree())
    caller = load(CallerSettings)
    assert caller.receiver is not None
    assert caller.callback_keys is not None
    assert caller.receiver.url == "https://orders.example/bridge"
    assert caller.endpoints["payments"].handler == HANDLER
    assert len(caller.callback_keys.raw()) == 2
    configured(handler_tree())
    handler = load(HandlerSettings)
    peer = handler.callers[CALLER]
    assert peer.auth == "signature"
    assert allowed_destination("https://orders.example/bridge/callbacks/id?sig=x", peer.callbacks).networks == ()
    assert peer.may_start("PaymentService", "process")
    assert peer.may_start("AuditService", "read")
    assert not peer.may_start("AuditService", "write")
    assert not peer.may_start("PaymentService2", "process")


def test_both_sides_may_share_a_file(configured: Configured) -> None:
    """What the other side needs is no error at the top."""
    configured(caller_tree() | {name: value for name, value in handler_tree().items() if name != "name"})
    assert load(CallerSettings).name == load(HandlerSettings).name == CALLER


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        pytest.param("missing.toml", "no such file", id="missing"),
        pytest.param("missing/bridge.toml", "no such file", id="missing folder"),
        pytest.param(".", "a folder; name the file in it", id="folder"),
        pytest.param("there.toml/bridge.toml", "cannot be read: Not a directory", id="file as a folder"),
        pytest.param("x" * 300, "cannot be read: File name too long", id="long name"),
    ],
)
def test_a_file_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, cause: str
) -> None:
    """A misspelled path must not mean empty settings."""
    (tmp_path / "there.toml").touch()
    monkeypatch.setenv("BRIDGE_CONFIG", str(tmp_path / path))
    assert message_of(CallerSettings) == f"BRIDGE_CONFIG={tmp_path / path}: {cause}"


@contextlib.contextmanager
def without_privileges() -> Iterator[int]:
    """As a user whom permissions bind, which root is not."""
    user = os.geteuid()
    bound = user or 65534
    os.seteuid(bound)
    try:
        yield bound
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_read_says_who_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret mounted for another user, and a folder that may not be entered: owner and mode are the cure."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bridge.toml")
        path.write_text(toml(caller_tree()))
        monkeypatch.setenv("BRIDGE_CONFIG", str(path))
        Path(folder).chmod(0o755)
        path.chmod(0o600 if os.geteuid() == 0 else 0)
        mode, owner = f"{path.stat().st_mode & 0o777:04o}", path.stat().st_uid
        with without_privileges() as user:
            message = message_of(CallerSettings)
        assert message.startswith(f"BRIDGE_CONFIG={path}: user {user} may not read the file")
        assert f"it belongs to user {owner} and has mode {mode}" in message
        Path(folder).chmod(0o700 if os.geteuid() == 0 else 0)
        with without_privileges() as user:
            assert f"user {user} may not enter its folder" in message_of(CallerSettings)
        Path(folder).chmod(0o700)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(f"name = {SECRET}", id="no quotes"),
        pytest.param(f'hash_key = "{SECRET}', id="open quote"),
        pytest.param(f'hash_key = "{SECRET}"\nhash_key = "{SECRET}"', id="twice"),
        pytest.param(f'[callback_keys.keys]\nk1 = "{SECRET}"\n[callback_keys.keys]', id="table twice"),
        pytest.param(f'# {SECRET}\nname = "\xff"'.encode("latin-1"), id="not UTF-8"),
        pytest.param(b"\x00" + SECRET.encode(), id="NUL"),
        pytest.param("{" + json.dumps({"name": SECRET}), id="JSON"),
    ],
)
def test_a_broken_file_is_named_and_not_quoted(configured: Configured, content: str | bytes) -> None:
    """The line that could not be read may hold a key."""
    path = configured(content)
    message = message_of(CallerSettings)
    assert str(path) in message
    assert "TOML" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("name = order-prod\n", "line 1, column 8: not TOML: Invalid value"),
        ('name = "x"\n\n[receiver]\nurl = "https://x\n', "line 4, column 17: not TOML: Illegal character"),
        ('name = "x"\nname = "y"', "line 2, where the file ends: not TOML: Cannot overwrite a value"),
        ("[a]\nb = 1\n[a]\n", "line 3, column 3: not TOML: Cannot declare … twice"),
        ("a = {key = 1, key = 2}\n", "line 1, column 22: not TOML: Duplicate inline table key …"),
        (b'name = "x"\nurl = "\xff"\n', "line 2: not UTF-8; save the TOML file as UTF-8"),
        ('name = "x"'.encode("utf-16"), "line 1: not UTF-8 but perhaps UTF-16; save the TOML file as UTF-8"),
        ('name = "x"'.encode("utf-16-le"), "not UTF-8 but perhaps UTF-16; save the TOML file as UTF-8"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("a = " + "7" * 5000, "a number has too many digits"),
    ],
)
def test_a_broken_file_is_named_with_place_and_cure(configured: Configured, content: str | bytes, says: str) -> None:
    """Line and column, as an editor counts them."""
    path = configured(content)
    message = message_of(CallerSettings)
    assert message.startswith(f"BRIDGE_CONFIG={path}")
    assert says in message


def test_a_byte_order_mark_is_skipped(configured: Configured) -> None:
    """Editors on Windows write one."""
    configured(b"\xef\xbb\xbf" + toml(caller_tree()).encode())
    assert load(CallerSettings).name == CALLER


def test_whitespace_around_a_key_is_dropped(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that was filled from a file ends with the file's newline."""
    key = new_key()
    configured(handler_tree())
    monkeypatch.setenv("BRIDGE_HASH_KEY", f" {key}\r\n")
    monkeypatch.setenv(f"BRIDGE_CALLERS__{CALLER}__START_KEYS__KEYS__K1", f"{new_key()}\n")
    settings = load(HandlerSettings)
    assert settings.hash_key.get_secret_value() == key
    start_keys = settings.callers[CALLER].start_keys
    assert start_keys is not None
    assert len(start_keys.raw()["k1"]) == 32
    assert start_keys.keys["k1"].get_secret_value().isascii()
    monkeypatch.setenv("BRIDGE_HASH_KEY", key[:20] + "\n" + key[20:])
    assert "hash_key: a key must be base64url text" in message_of(HandlerSettings)


@pytest.mark.parametrize("network", ["10.1.2.3/8", "10.0.0.0/33", "intranet", 10])
def test_a_network_that_cannot_be_used_is_refused_with_the_form(configured: Configured, network: object) -> None:
    """One text at every place, and no number is an address."""
    tree = handler_tree()
    tree["service"]["proxies"] = [network]
    tree["callers"][CALLER]["networks"] = [network]
    tree["callers"][CALLER]["callbacks"][0]["networks"] = [network]
    configured(tree)
    places = ("service.proxies", f"callers.{CALLER}.networks", f"callers.{CALLER}.callbacks.0.networks")
    message = message_of(HandlerSettings)
    for place in places:
        assert f"  {place}.0: needs the form 10.1.0.0/16 or fd00::/8; all bits after the prefix are 0" in message
    assert len(message.splitlines()) == 1 + len(places)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (put("task_queu", "q"), "task_queu: unknown name; known: callback_keys, "),
        (put("endpoint", {}), "endpoint: unknown name; did you mean endpoints?"),
        (put("receiver/prot", 1), "receiver.prot: unknown name; did you mean port?"),
        (put("receiver/xyz", 1), "receiver.xyz: unknown name; known: allow_insecure, host, port, url"),
        (put("endpoints/payments/ulr", 1), "endpoints.payments.ulr: unknown name; did you mean url?"),
        (put(f"{START}/sining", "k1"), f"handlers.{HANDLER}.start_keys.sining: unknown name; did you mean signing?"),
        pytest.param(
            put(f"{START}/{SECRET}", "k1"),
            f"handlers.{HANDLER}.start_keys.…: unknown name; known: file, keys, signing",
            id="a key as a name",
        ),
        pytest.param(put(SECRET, "k1"), "…: unknown name; known: ", id="a key as a name at the top"),
    ],
)
def test_an_unknown_name_of_the_file_is_refused_at_every_level(configured: Configured, spoil: Spoil, says: str) -> None:
    """The nearest name is suggested. A name that may be a key in a wrong place is not shown."""
    tree = caller_tree()
    spoil(tree)
    path = configured(tree)
    message = message_of(CallerSettings, tree)
    assert message.startswith(f"bad settings in {path}:\n  {says}")
    assert SECRET not in message


def test_each_side_knows_the_names_of_the_other() -> None:
    """They may share a file and an environment. A name that a side gets later has to be added for the other side."""
    caller, handler = CallerSettings.model_fields.keys(), HandlerSettings.model_fields.keys()
    assert CallerSettings.other_side == handler - caller
    assert HandlerSettings.other_side == caller - handler


def test_every_missing_field_is_named_at_once() -> None:
    """One message names all errors, so that a user can repair the settings in one step."""
    message = message_of(CallerSettings)
    for field in ("name", "handlers", "endpoints"):
        assert f"  {field}: Field required" in message
    assert "BRIDGE_CONFIG" in message
    for field in ("name", "task_queue", "service", "hash_key", "callers"):
        assert f"  {field}: Field required" in message_of(HandlerSettings)


def test_a_missing_file_and_the_file_of_the_other_side_are_recognized(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line says which side's file the process needs, and the command that writes both."""
    remedy = "BRIDGE_CONFIG must name the settings file of the handler's side; `callback-bridge init` writes both"
    configured(caller_tree())
    assert message_of(HandlerSettings).splitlines()[-1] == f"  {remedy}"
    configured({**caller_tree(), "name": ""})
    assert "BRIDGE_CONFIG" not in message_of(CallerSettings)
    monkeypatch.delenv("BRIDGE_CONFIG")
    assert message_of(HandlerSettings).splitlines()[-1] == f"  {remedy}"
    assert "the caller's side" in message_of(CallerSettings)


@pytest.mark.parametrize("side", ["receiver", "endpoint", "service", "callback"])
def test_plain_http_is_accepted_with_the_flag_in_its_entry(configured: Configured, side: str) -> None:
    """For development it is said once, at the entry that it is meant for."""
    insecure = {"url": "http://127.0.0.1:8080", "allow_insecure": True}
    caller, handler = caller_tree(), handler_tree()
    match side:
        case "receiver":
            caller["receiver"] = insecure
        case "endpoint":
            caller["endpoints"]["payments"] |= insecure
        case "service":
            handler["service"] = insecure
        case _:
            handler["callers"][CALLER]["callbacks"] = [insecure]
    configured(caller)
    load(CallerSettings)
    configured(handler)
    load(HandlerSettings)


@pytest.mark.parametrize("text", ["http://h", "", "httpss://h", "HTTPS://h", "ftp://h"])
def test_only_https_is_safe_without_the_flag(text: str) -> None:
    """Anything that does not begin with https needs to be meant. The flag allows plain http, and no other scheme."""
    with pytest.raises(ValidationError, match="needs "):
        UrlEntry(url=text)
    with contextlib.nullcontext() if text == "http://h" else pytest.raises(ValidationError):
        UrlEntry(url=text, allow_insecure=True)
    UrlEntry(url="https://h")


def test_keys_are_distinct_between_key_sets_and_not_within_one() -> None:
    """Under two ids of one key set a key is for one purpose still."""
    key, other = new_key(), key_set()
    same = KeySet.model_validate({"signing": "a", "keys": {"a": key, "b": key}})
    require_distinct_keys({"one": same, "two": other})
    with pytest.raises(ValueError, match=r"^one and three share a key") as caught:
        require_distinct_keys({"one": same, "two": other, "three": key_set(key)})
    assert key not in str(caught.value)


def test_settings_made_in_code_hold_to_the_same_rules() -> None:
    """The settings that tests and plugins make are checked as those from a file."""
    keys = Keys()
    assert caller_settings(keys, receiver_url="http://127.0.0.1:1", endpoint_url="http://127.0.0.1:2").name == CALLER
    settings = handler_settings(keys, receiver_url="http://127.0.0.1:1", service_url="http://127.0.0.1:2")
    assert settings.name == HANDLER
    keys.completion = keys.start
    with pytest.raises(ValueError, match="share a key"):
        caller_settings(keys, receiver_url="http://127.0.0.1:1", endpoint_url="http://127.0.0.1:2")


def test_settings_made_in_code_are_read_again_without_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with settings of its own is disturbed by no file and no variable."""
    made = caller_settings(Keys(), receiver_url="http://127.0.0.1:1", endpoint_url="http://127.0.0.1:2")
    monkeypatch.setenv("BRIDGE_CONFIG", "/no/such/file.toml")
    monkeypatch.setenv("BRIDGE_NAMESPACE", "elsewhere")
    assert made.read_again() == made
