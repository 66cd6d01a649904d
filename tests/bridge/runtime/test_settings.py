"""Settings of both sides: where they come from, what refuses to start, and that no message shows a value."""

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.runtime.settings import BridgeSettings, SettingsError, load, require_distinct_keys, require_https
from bridge.security.egress import allowed_destination
from bridge.security.keys import KeySet, new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings, Service
from tests.support.helpers import CALLER, HANDLER, Keys, caller_settings, handler_settings, key_set

SettingsT = TypeVar("SettingsT", bound=BridgeSettings)
Tree = dict[str, Any]
Spoil = Callable[[Tree], None]
ANY_TEXT = st.text(st.characters())


def plain_key_set(*ids: str) -> Tree:
    return {"signing": ids[0], "keys": {key_id: new_key() for key_id in ids}}


def caller_tree() -> Tree:
    return {
        "name": CALLER,
        "receiver": {"url": "https://orders.example/bridge/"},
        "callback_keys": plain_key_set("2027-01", "2027-02"),
        "handlers": {HANDLER: {"start_keys": plain_key_set("k1"), "completion_keys": plain_key_set("k1")}},
        "endpoints": {"payments": {"url": f"https://payments.example/c/{CALLER}", "handler": HANDLER}},
    }


def handler_tree() -> Tree:
    return {
        "name": HANDLER,
        "task_queue": "payments",
        "service": {"url": "https://payments.example"},
        "hash_key": new_key(),
        "callers": {
            CALLER: {
                "start_keys": plain_key_set("k1"),
                "completion_keys": plain_key_set("k1"),
                "operations": ["PaymentService/*", "AuditService/read"],
                "callbacks": [{"url": "https://orders.example/bridge/callbacks"}],
            }
        },
    }


def toml(tree: Tree) -> str:
    """A TOML file of one inline table per field."""

    def value(node: Any) -> str:
        if isinstance(node, dict):
            return "{" + ", ".join(f"{json.dumps(key)} = {value(each)}" for key, each in node.items()) + "}"
        if isinstance(node, list):
            return "[" + ", ".join(map(value, node)) + "]"
        return json.dumps(node)

    return "\n".join(f"{key} = {value(node)}" for key, node in tree.items())


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BRIDGE_CONFIG", "BRIDGE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Tree | str | bytes], Path]:
    """Name a file of these settings in BRIDGE_CONFIG."""

    def write(content: Tree | str | bytes) -> Path:
        path = tmp_path / "bridge.toml"
        text = toml(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("BRIDGE_CONFIG", str(path))
        return path

    return write


Configured = Callable[[Tree | str | bytes], Path]


def secrets_of(tree: Any) -> set[str]:
    """All that must never be printed: the keys, wherever they stand in the tree."""
    if isinstance(tree, dict):
        own = {str(value) for value in tree.get("keys", {}).values()} if isinstance(tree.get("keys"), dict) else set()
        own |= {tree["hash_key"]} if isinstance(tree.get("hash_key"), str) else set()
        return own.union(*(secrets_of(value) for value in tree.values()))
    return set()


def message_of(model: type[BridgeSettings], tree: Tree | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load(model)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    text = str(caught.value)
    assert not [secret for secret in secrets_of(tree) if len(secret) > 3 and secret in text]
    assert "input_value" not in text
    return text


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


def test_the_environment_goes_over_the_file(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable replaces one field, at any depth, and leaves its neighbours; an argument goes over both."""
    tree = caller_tree()
    configured(tree)
    key = new_key()
    monkeypatch.setenv("BRIDGE_NAME", "from-environment")
    monkeypatch.setenv("BRIDGE_RECEIVER__PORT", "9999")
    monkeypatch.setenv("BRIDGE_CALLBACK_KEYS__KEYS__2027-01", key)
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__NETWORKS", '["10.0.0.0/8"]')
    settings = load(CallerSettings)
    assert settings.name == "from-environment"
    assert settings.receiver is not None
    assert settings.callback_keys is not None
    assert (settings.receiver.port, settings.receiver.url) == (9999, "https://orders.example/bridge")
    assert settings.callback_keys.keys["2027-01"].get_secret_value() == key
    assert settings.callback_keys.keys["2027-02"].get_secret_value() == tree["callback_keys"]["keys"]["2027-02"]
    assert [str(network) for network in settings.endpoints["payments"].networks] == ["10.0.0.0/8"]
    assert load(CallerSettings, name="argument").name == "argument"


def test_the_environment_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container needs no file."""
    for name, value in caller_tree().items():
        monkeypatch.setenv(f"BRIDGE_{name.upper()}", value if isinstance(value, str) else json.dumps(value))
    assert load(CallerSettings).name == CALLER


def test_both_sides_may_share_a_file(configured: Configured) -> None:
    """What the other side needs is no error at the top."""
    configured(caller_tree() | {name: value for name, value in handler_tree().items() if name != "name"})
    assert load(CallerSettings).name == load(HandlerSettings).name == CALLER


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        pytest.param("missing.toml", "no such file", id="missing"),
        pytest.param("missing/bridge.toml", "no such file", id="missing folder"),
        pytest.param(".", "a folder; name the TOML file in it", id="folder"),
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


SECRET = new_key()


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


def test_a_variable_overrides_the_entry_of_the_file_in_any_case(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of variables do not distinguish cases, and a shell does not allow a `-` in them."""
    tree = caller_tree()
    tree["endpoints"] = {"Payments-EU": tree["endpoints"]["payments"]}
    configured(tree)
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS_EU__URL", "https://elsewhere.example/c/order-prod")
    monkeypatch.setenv(f"BRIDGE_HANDLERS__{HANDLER.upper().replace('-', '_')}__ANSWERS", "unsigned")
    settings = load(CallerSettings)
    assert list(settings.endpoints) == ["Payments-EU"]
    assert list(settings.handlers) == [HANDLER]
    assert settings.handlers[HANDLER].answers == "unsigned"
    assert settings.endpoints["Payments-EU"].url == "https://elsewhere.example/c/order-prod"


def test_a_variable_that_could_mean_two_entries_is_refused_by_its_name(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is guessed; the exact name always means its own entry."""
    tree = caller_tree()
    endpoint = tree["endpoints"]["payments"]
    tree["endpoints"] = {"Payments": endpoint, "PAYMENTS": endpoint}
    configured(tree)
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__WAIT_S", "7")
    assert "BRIDGE_…__PAYMENTS could mean Payments or PAYMENTS" in message_of(CallerSettings)
    tree["endpoints"]["payments"] = endpoint
    configured(tree)
    assert {name: each.wait_s for name, each in load(CallerSettings).endpoints.items()} == {
        "Payments": 5,
        "PAYMENTS": 5,
        "payments": 7,
    }


SERVICE_LINKS = {
    "SERVICE_HOST": "10.96.0.7",
    "SERVICE_PORT": "8080",
    "SERVICE_PORT_HTTP": "8080",
    "PORT": "tcp://10.96.0.7:8080",
    "PORT_8080_TCP": "tcp://10.96.0.7:8080",
    "PORT_8080_TCP_PROTO": "tcp",
    "PORT_8080_TCP_PORT": "8080",
    "PORT_8080_TCP_ADDR": "10.96.0.7",
}


@pytest.mark.parametrize(
    "service", ["BRIDGE", "BRIDGE_SERVICE", "BRIDGE_RECEIVER", "BRIDGE_HANDLERS", "BRIDGE_NAME", "BRIDGE_CONFIG"]
)
def test_the_service_links_of_kubernetes_are_not_settings(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """A Service named `bridge` puts `BRIDGE_SERVICE_HOST` and the like into every pod of its namespace."""
    tree = handler_tree()
    configured(tree)
    before = load(HandlerSettings)
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    assert load(HandlerSettings) == before
    configured(caller_tree())
    assert load(CallerSettings).receiver is not None


def test_a_broken_variable_is_named_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in a variable is JSON; what is not says which field it was meant for, and is no matter of TOML."""
    monkeypatch.setenv("BRIDGE_CALLBACK_KEYS", '{"signing": "k1", "keys": {"k1": "' + SECRET)
    message = message_of(CallerSettings)
    assert "callback_keys" in message
    assert "TOML" not in message
    assert SECRET not in message


def test_every_missing_field_is_named_at_once() -> None:
    """One message names all errors, so that a user can repair the settings in one step."""
    message = message_of(CallerSettings)
    for field in ("name", "handlers", "endpoints"):
        assert f"  {field}: Field required" in message
    assert "BRIDGE_CONFIG" in message
    for field in ("name", "task_queue", "service", "hash_key", "callers"):
        assert f"  {field}: Field required" in message_of(HandlerSettings)


def put(path: str, value: Any) -> Spoil:
    """Set the field at *path*; functions get the tree to copy from."""

    def spoil(tree: Tree) -> None:
        *parents, last = path.split("/")
        node = tree
        for each in parents:
            node = node[each]
        node[last] = value(tree) if callable(value) else value

    return spoil


def drop(path: str) -> Spoil:
    def spoil(tree: Tree) -> None:
        *parents, last = path.split("/")
        node = tree
        for each in parents:
            node = node[each]
        del node[last]

    return spoil


START, COMPLETION = f"handlers/{HANDLER}/start_keys", f"handlers/{HANDLER}/completion_keys"
SHORT = new_key()[:20]

BAD_KEY_SETS = [
    ("short key", {"signing": "k1", "keys": {"k1": SHORT}}, ".keys"),
    ("no base64", {"signing": "k1", "keys": {"k1": "correct horse battery staple correct horse"}}, ".keys"),
    ("empty key", {"signing": "k1", "keys": {"k1": ""}}, ".keys"),
    ("key a number", {"signing": "k1", "keys": {"k1": 12345678901234567890}}, ".keys.k1"),
    ("empty key set", {"signing": "k1", "keys": {}}, ".keys"),
    ("signing id not in the key set", plain_key_set("k1") | {"signing": "k2"}, ": signing"),
    ("no signing id", {"keys": {"k1": new_key()}}, ".signing"),
    ("no keys", {"signing": "k1"}, ".keys"),
    ("bad id", {"signing": "k_1", "keys": {"k_1": new_key()}}, ".signing"),
    ("eleven keys", plain_key_set(*(f"k{number}" for number in range(11))), ".keys"),
    ("one field too many", plain_key_set("k1") | {"algorithm": "none"}, ".algorithm"),
    ("a list", [new_key()], ""),
]


@pytest.mark.parametrize("where", ["callback_keys", START, COMPLETION])
@pytest.mark.parametrize(("value", "named"), [pytest.param(*each[1:], id=each[0]) for each in BAD_KEY_SETS])
def test_a_bad_key_set_of_the_caller_is_named_by_its_place(
    configured: Configured, where: str, value: Any, named: str
) -> None:
    """Which key set, which field and, where there is one, which key id; never the key."""
    tree = caller_tree()
    put(where, value)(tree)
    configured(tree)
    assert where.replace("/", ".") + named in message_of(CallerSettings, tree)


@pytest.mark.parametrize("where", [f"callers/{CALLER}/start_keys", f"callers/{CALLER}/completion_keys"])
@pytest.mark.parametrize(("value", "named"), [pytest.param(*each[1:], id=each[0]) for each in BAD_KEY_SETS])
def test_a_bad_key_set_of_the_handler_is_named_by_its_place(
    configured: Configured, where: str, value: Any, named: str
) -> None:
    """The same on the other side."""
    tree = handler_tree()
    put(where, value)(tree)
    configured(tree)
    assert where.replace("/", ".") + named in message_of(HandlerSettings, tree)


def test_a_key_written_in_the_place_of_its_id_is_not_quoted(configured: Configured) -> None:
    """The one who swapped the two sees which key set it was, and the log no key."""
    key = "A_" + new_key()
    tree = caller_tree()
    tree["callback_keys"] = {"signing": "k1", "keys": {key: "k1"}}
    configured(tree)
    message = message_of(CallerSettings, tree)
    assert "callback_keys.keys" in message
    assert key not in message
    tree["callback_keys"] = {"signing": key, "keys": {"k1": key}}
    configured(tree)
    message = message_of(CallerSettings, tree)
    assert "callback_keys.signing" in message
    assert key not in message


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(put("name", ""), "name:", id="empty name"),
        pytest.param(put("name", "a/b"), "name:", id="name that is no segment"),
        pytest.param(put("name", ".."), "name:", id="name of dots"),
        pytest.param(put("name", "a\n"), "name:", id="name with a newline"),
        pytest.param(put("receiver/url", "http://orders.example"), "receiver:", id="http receiver"),
        pytest.param(put("receiver/url", "orders.example"), "receiver.url:", id="receiver without a scheme"),
        pytest.param(
            put("receiver/url", "https://u:pw-7f3@orders.example"), "receiver.url:", id="receiver with a user"
        ),
        pytest.param(put("receiver/url", "https://orders.example/?"), "receiver.url:", id="receiver with a query"),
        pytest.param(put("receiver/port", 65536), "receiver.port:", id="port out of range"),
        pytest.param(drop("receiver"), "settings: endpoints.payments.transport:", id="callbacks without a receiver"),
        pytest.param(drop("callback_keys"), "settings: receiver and callback_keys", id="receiver without its keys"),
        pytest.param(drop(COMPLETION), f"settings: {COMPLETION.replace('/', '.')}: missing", id="no completion keys"),
        pytest.param(
            put("endpoints/payments/transport", "nexus"), "endpoints.payments.transport:", id="nexus by setting"
        ),
        pytest.param(put("endpoints/payments/wait_s", 0), "endpoints.payments.wait_s:", id="no wait"),
        pytest.param(put("receiver/hots", "127.0.0.1"), "receiver.hots:", id="misspelled field"),
        pytest.param(put("handlers", {}), "handlers:", id="no handlers"),
        pytest.param(put("handlers/bad name", {}), "handlers.bad name", id="handler of a bad name"),
        pytest.param(drop(COMPLETION), f"handlers.{HANDLER}.completion_keys:", id="no completion keys"),
        pytest.param(put(f"handlers/{HANDLER}/auth", "none"), f"handlers.{HANDLER}.auth:", id="auth of a handler"),
        pytest.param(put("endpoints", {}), "endpoints:", id="no endpoints"),
        pytest.param(
            put("endpoints/payments/url", "http://payments.example"), "endpoints.payments:", id="http endpoint"
        ),
        pytest.param(
            put("endpoints/payments/url", "https://:pw-7f3@h"), "endpoints.payments.url:", id="endpoint with a password"
        ),
        pytest.param(
            put("endpoints/payments/url", "https://h/#"), "endpoints.payments.url:", id="endpoint with a fragment"
        ),
        pytest.param(
            put("endpoints/payments/url", "https://h:x"), "endpoints.payments.url:", id="endpoint of a bad port"
        ),
        pytest.param(put("endpoints/payments/handler", "other"), "endpoints.payments.handler:", id="unknown handler"),
        pytest.param(
            put("endpoints/payments/networks", ["10.0.0.1/8"]), "endpoints.payments.networks.0:", id="no network"
        ),
        pytest.param(
            put(START, lambda tree: tree["callback_keys"]), "callback_keys and", id="callback keys as start keys"
        ),
        pytest.param(
            put(COMPLETION, lambda tree: tree["handlers"][HANDLER]["start_keys"]),
            f"handlers.{HANDLER}.start_keys and handlers.{HANDLER}.completion_keys",
            id="one key set in two directions",
        ),
        pytest.param(
            put("handlers/second", lambda tree: copy.deepcopy(tree["handlers"][HANDLER])),
            f"handlers.{HANDLER}.start_keys and handlers.second.start_keys",
            id="one key set for two handlers",
        ),
        pytest.param(
            put(
                COMPLETION + "/keys/k2",
                lambda tree: tree["callback_keys"]["keys"]["2027-02"] + "=",
            ),
            f"callback_keys and handlers.{HANDLER}.completion_keys",
            id="one key in two key sets, spelled otherwise",
        ),
    ],
)
def test_bad_settings_of_the_caller_are_named(configured: Configured, spoil: Spoil, named: str) -> None:
    """A weak or inconsistent configuration refuses to start, and says where it is."""
    tree = caller_tree()
    spoil(tree)
    path = configured(tree)
    message = message_of(CallerSettings, tree)
    assert message.startswith(f"bad settings in {path}:\n  ")
    assert f"{named}" in message
    assert "pw-7f3" not in message


PEER = f"callers/{CALLER}"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        pytest.param(put("task_queue", ""), "task_queue:", id="no task queue"),
        pytest.param(put("service/url", "http://payments.example"), "service:", id="http service"),
        pytest.param(put("hash_key", SHORT), "hash_key:", id="short hash key"),
        pytest.param(put("hash_key", ""), "hash_key:", id="empty hash key"),
        pytest.param(put("callers", {}), "callers:", id="no callers"),
        pytest.param(put("callers/a b", {}), "callers.a b", id="caller of a bad name"),
        pytest.param(drop(f"{PEER}/start_keys"), f"callers.{CALLER}:", id="signature without start keys"),
        pytest.param(drop(f"{PEER}/completion_keys"), f"callers.{CALLER}:", id="signature without completion keys"),
        pytest.param(drop(f"{PEER}/operations"), f"callers.{CALLER}.operations:", id="no operations"),
        pytest.param(put(f"{PEER}/auth", "basic"), f"callers.{CALLER}.auth:", id="unknown auth"),
        pytest.param(put(f"{PEER}/auth", "bearer"), f"callers.{CALLER}:", id="auth bearer without its keys"),
        pytest.param(
            put(f"{PEER}/bearer_keys", {"signing": "k1", "keys": {"k1": new_key()}}),
            f"callers.{CALLER}:",
            id="signature with bearer keys",
        ),
        pytest.param(put(f"{PEER}/networks", ["localhost"]), f"callers.{CALLER}.networks.0:", id="network by name"),
        pytest.param(put("service/held_starts", -1), "service.held_starts:", id="fewer than no held starts"),
        pytest.param(put(f"{PEER}/auth", "none"), f"callers.{CALLER}:", id="auth none with start keys"),
        pytest.param(
            put(f"{PEER}/callbacks", [{"url": "http://orders.example"}]), f"callers.{CALLER}:", id="http callback"
        ),
        pytest.param(
            put(f"{PEER}/callbacks", [{"url": "https://orders.example?x"}]),
            f"callers.{CALLER}.callbacks.0.url:",
            id="callback with a query",
        ),
        pytest.param(
            put(f"{PEER}/callbacks", [{"url": "https://h", "network": ["10.0.0.0/8"]}]),
            f"callers.{CALLER}.callbacks.0.network:",
            id="misspelled network",
        ),
        pytest.param(
            put(f"{PEER}/completion_keys", lambda tree: tree["callers"][CALLER]["start_keys"]),
            f"callers.{CALLER}.start_keys and callers.{CALLER}.completion_keys",
            id="one key set in two directions",
        ),
        pytest.param(
            put("callers/second", lambda tree: copy.deepcopy(tree["callers"][CALLER])),
            f"callers.{CALLER}.start_keys and callers.second.start_keys",
            id="one key set for two callers",
        ),
        pytest.param(
            put("hash_key", lambda tree: tree["callers"][CALLER]["start_keys"]["keys"]["k1"]),
            f"hash_key and callers.{CALLER}.start_keys",
            id="hash key in a key set",
        ),
    ],
)
def test_bad_settings_of_the_handler_are_named(configured: Configured, spoil: Spoil, named: str) -> None:
    """The same on the other side, where an open start endpoint would run anybody's workflows."""
    tree = handler_tree()
    spoil(tree)
    path = configured(tree)
    message = message_of(HandlerSettings, tree)
    assert message.startswith(f"bad settings in {path}:\n  ")
    assert named in message


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *(
            (host, True)
            for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "10.1.2.3", "192.168.0.1", "fd00::1")
        ),
        *((host, False) for host in ("0.0.0.0", "::", "", "8.8.8.8", "2606:4700::1", "payments.example", "100.64.0.1")),
    ],
)
def test_auth_none_is_refused_on_a_public_listener(configured: Configured, host: str, *, private: bool) -> None:
    """Without authentication only a network may be trusted, and only a private one."""
    tree = handler_tree()
    tree["service"]["host"] = host
    tree["callers"][CALLER] = {"auth": "none", "operations": ["PaymentService/process"]}
    configured(tree)
    assert Service(url="https://h", host=host).is_private is private
    if private:
        assert load(HandlerSettings).callers[CALLER].auth == "none"
    else:
        assert f"callers.{CALLER}.auth" in message_of(HandlerSettings, tree)


def test_without_callbacks_a_caller_gets_none(configured: Configured) -> None:
    """A missing allow list denies all."""
    tree = handler_tree()
    del tree["callers"][CALLER]["callbacks"]
    configured(tree)
    assert load(HandlerSettings).callers[CALLER].callbacks == ()


def test_a_caller_that_polls_needs_no_receiver(configured: Configured) -> None:
    """No peer can reach it from outside. Therefore it needs no keys for callback tokens or completions."""
    tree = caller_tree()
    for field in ("receiver", "callback_keys", COMPLETION):
        drop(field)(tree)
    put("endpoints/payments/transport", "poll")(tree)
    configured(tree)
    settings = load(CallerSettings)
    with pytest.raises(ValueError, match="no receiver"):
        settings.callback_tokens("order-prod")


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
    """Anything that does not begin with https needs to be meant."""
    with pytest.raises(ValueError, match="needs https"):
        require_https(text, allow_insecure=False)
    require_https(text, allow_insecure=True)
    require_https("https://h", allow_insecure=False)


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


def test_settings_show_no_key(configured: Configured) -> None:
    """Printing or dumping the settings shows no key."""
    for tree, model in ((caller_tree(), CallerSettings), (handler_tree(), HandlerSettings)):
        configured(tree)
        settings = load(model)
        shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
        assert secrets_of(tree)
        assert not [secret for secret in secrets_of(tree) if secret in shown]


JUNK: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
CALLER_TREE, HANDLER_TREE = caller_tree(), handler_tree()


def spoiled(data: st.DataObject, tree: Tree) -> Tree:
    """The tree with junk in the place of one of its nodes."""
    spoilt = copy.deepcopy(tree)
    node: Any = spoilt
    while True:
        at = data.draw(st.sampled_from(list(node)))
        if not isinstance(node[at], dict) or data.draw(st.booleans()):
            node[at] = data.draw(JUNK)
            return spoilt
        node = node[at]


@settings(deadline=None)
@given(st.data())
def test_arbitrary_settings_are_taken_or_refused_in_one_way_only(data: st.DataObject) -> None:
    """Any value of a field is valid, or raises a SettingsError that shows no key."""
    for tree, model in ((CALLER_TREE, CallerSettings), (HANDLER_TREE, HandlerSettings)):
        try:
            load(model, **spoiled(data, tree))
        except SettingsError as error:
            text = str(error)
            assert not [secret for secret in secrets_of(tree) if secret in text]
