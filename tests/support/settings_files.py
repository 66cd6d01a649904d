"""Files with the settings of both sides, the ways to spoil them, and what a refusal must not show."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.runtime.settings import BridgeSettings, SettingsError, load
from bridge.security.keys import new_key
from tests.support.helpers import CALLER, HANDLER

Tree = dict[str, Any]


Spoil = Callable[[Tree], None]


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
