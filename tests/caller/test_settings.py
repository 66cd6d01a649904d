"""The caller's settings: what refuses to start, named by its place and without a value."""

import copy
from typing import Any

import pytest

from bridge.runtime.settings import load
from bridge.security.keys import new_key
from caller.settings import CallerSettings
from tests.support.helpers import HANDLER
from tests.support.settings_files import (
    BAD_KEY_SETS,
    COMPLETION,
    START,
    Configured,
    Spoil,
    caller_tree,
    drop,
    message_of,
    put,
)


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


def test_a_caller_that_polls_needs_no_receiver(configured: Configured) -> None:
    """No peer can reach it from outside. Therefore it needs no keys for callback tokens or completions."""
    tree = caller_tree()
    for field in ("receiver", "callback_keys", COMPLETION):
        drop(field)(tree)
    put("endpoints/payments/transport", "poll")(tree)
    configured(tree)
    settings = load(CallerSettings)
    assert list(settings.key_sets) == [f"handlers.{HANDLER}.start_keys"]
