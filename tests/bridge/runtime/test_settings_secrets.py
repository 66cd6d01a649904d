"""No message about settings shows a key, also if it stands in the place of a name."""

import copy
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.runtime.settings import SettingsError, load
from bridge.security.keys import new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.helpers import CALLER
from tests.support.settings_files import (
    Configured,
    Tree,
    caller_tree,
    handler_tree,
    message_of,
    secrets_of,
)

ANY_TEXT = st.text(st.characters())


def test_a_key_as_a_name_is_hidden_also_if_it_holds_the_separator_of_names(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One key in a hundred holds two underscores in a row."""
    configured(caller_tree())
    monkeypatch.setenv(f"BRIDGE_{'aB3' * 7}__{'xY4' * 7}", "x")
    message = message_of(CallerSettings)
    assert "aB3" not in message
    assert "xY4" not in message
    assert message.endswith("(from the variable …)")


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


def hexadecimal(_: object = None) -> str:
    return secrets.token_hex(32)


def swap_id(tree: Tree, key: str) -> None:
    tree["callers"][CALLER]["start_keys"] = {"signing": key, "keys": {key: "k1"}}


def signing_is_the_key(tree: Tree, key: str) -> None:
    tree["callers"][CALLER]["start_keys"] = {"signing": key, "keys": {"k1": key}}


def signing_is_another(tree: Tree, key: str) -> None:
    tree["callers"][CALLER]["start_keys"] = {"signing": "k1", "keys": {key: new_key()}}


def key_as_caller(tree: Tree, key: str) -> None:
    tree["callers"] = {key: tree["callers"][CALLER]}


def key_as_caller_with_a_fault(tree: Tree, key: str) -> None:
    tree["callers"][CALLER]["auth"] = "none"
    key_as_caller(tree, key)


def key_as_field(tree: Tree, key: str) -> None:
    tree["callers"][CALLER][key] = "start_keys"


def key_as_operation_and_fault(tree: Tree, key: str) -> None:
    tree["callers"][CALLER].update(operations=[key], auth="none")


@pytest.mark.parametrize("make", [new_key, hexadecimal, lambda: secrets.token_hex(16), lambda: new_key() + "="])
@pytest.mark.parametrize(
    "spoil",
    [
        swap_id,
        signing_is_the_key,
        signing_is_another,
        key_as_caller,
        key_as_caller_with_a_fault,
        key_as_field,
        key_as_operation_and_fault,
    ],
)
def test_a_key_in_the_place_of_a_name_is_not_quoted(
    configured: Configured, spoil: Callable[[Tree, str], None], make: Callable[[], str]
) -> None:
    """The settings may be refused or, where a short name is taken for a name, accepted; the key is in no error."""
    tree, key = handler_tree(), make()
    spoil(tree, key)
    configured(tree)
    if spoil is key_as_caller and len(key) < 40:
        assert key in load(HandlerSettings).callers
        return
    message = message_of(HandlerSettings, tree)
    assert key not in message
    assert f"  callers.{CALLER}" in message or "  callers.…" in message


@pytest.mark.parametrize("make", [hexadecimal, lambda: secrets.token_hex(16)])
def test_a_key_id_is_shorter_than_every_key(configured: Configured, make: Callable[[], str]) -> None:
    """Logs, metrics and messages show ids: a key must not be accepted as one."""
    tree, key = handler_tree(), make()
    tree["callers"][CALLER]["start_keys"] = {"signing": key, "keys": {key: new_key()}}
    configured(tree)
    message = message_of(HandlerSettings, tree)
    assert "start_keys.signing: String should match" in message
    assert key not in message


@pytest.mark.parametrize("side", ["endpoints", "handlers"])
def test_a_key_as_the_name_of_an_endpoint_or_a_handler_is_not_quoted(configured: Configured, side: str) -> None:
    """Also where the error names what is known."""
    tree, key = caller_tree(), new_key()
    tree[side] = {key: next(iter(tree[side].values()))}
    tree["endpoints"] = {name: {**each, "handler": key[:32]} for name, each in tree["endpoints"].items()}
    configured(tree)
    message = message_of(CallerSettings, tree)
    assert key[:32] not in message
