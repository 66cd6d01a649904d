"""The handler's settings: what refuses to start, named by its place and without a value."""

import copy
from typing import Any

import pytest

from bridge.runtime.settings import load
from bridge.security.keys import new_key
from handler.settings import HandlerSettings, Service
from tests.support.helpers import CALLER
from tests.support.settings_files import BAD_KEY_SETS, SHORT, Configured, Spoil, drop, handler_tree, message_of, put


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
        pytest.param(
            put(f"{PEER}/operations", ["PaymentService/*", "AuditService"]),
            f"callers.{CALLER}.operations.1:",
            id="service without an operation",
        ),
        pytest.param(put(f"{PEER}/operations", ["*"]), f"callers.{CALLER}.operations.0:", id="any operation"),
        pytest.param(put(f"{PEER}/auth", "basic"), f"callers.{CALLER}.auth:", id="unknown auth"),
        pytest.param(put(f"{PEER}/auth", "bearer"), f"callers.{CALLER}:", id="auth bearer without its keys"),
        pytest.param(
            put(f"{PEER}/bearer_keys", {"signing": "k1", "keys": {"k1": new_key()}}),
            f"callers.{CALLER}:",
            id="signature with bearer keys",
        ),
        pytest.param(put(f"{PEER}/networks", ["localhost"]), f"callers.{CALLER}.networks.0:", id="network by name"),
        pytest.param(put("service/held_starts", -1), "service.held_starts:", id="fewer than no held starts"),
        pytest.param(put("abandoned_check_s", 1e300), "abandoned_check_s:", id="no check in finite time"),
        pytest.param(put(f"{PEER}/san", "spiffe://orders"), f"callers.{CALLER}.san needs", id="SAN without a proxy"),
        pytest.param(put(f"{PEER}/auth", "certificate"), f"callers.{CALLER}:", id="certificate without a SAN"),
        pytest.param(put(f"{PEER}/limits", {"burst": 0}), f"callers.{CALLER}.limits.burst:", id="no starts at all"),
        # The server takes a delay of less than a microsecond as none, and then sweeps at the pace of retries.
        pytest.param(put("sweep_interval_s", 1e-7), "sweep_interval_s:", id="no time between sweeps"),
        pytest.param(put(f"{PEER}/auth", "none"), f"callers.{CALLER}:", id="auth none with start keys"),
        pytest.param(
            put(f"{PEER}/callbacks", [{"url": "http://orders.example"}]),
            f"callers.{CALLER}.callbacks.0:",
            id="http callback",
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
        *((host, False) for host in ("0.0.0.0", "::", "8.8.8.8", "2606:4700::1", "payments.example", "100.64.0.1")),
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
