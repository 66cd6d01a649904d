"""Settings from variables: which field a variable means, what it overrides, and how a bad one is named."""

import json

import pytest

from bridge.runtime.settings import load
from bridge.security.keys import new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from tests.support.helpers import CALLER, HANDLER
from tests.support.settings_files import (
    Configured,
    caller_tree,
    handler_tree,
    message_of,
    plain_key_set,
)

SECRET = new_key()


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
    "service",
    ["BRIDGE", "BRIDGE_SERVICE", "BRIDGE_RECEIVER", "BRIDGE_HANDLERS", "BRIDGE_NAME", "BRIDGE_CONFIG", "BRIDGE__EU"],
)
def test_the_service_links_of_kubernetes_are_not_settings(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """A Service named `bridge` puts `BRIDGE_SERVICE_HOST` and the like into every pod of its namespace.

    No setting may be unknown because of them, and none may be set by them.
    """
    tree = handler_tree()
    configured(tree)
    before = load(HandlerSettings)
    for name, value in SERVICE_LINKS.items():
        monkeypatch.setenv(f"{service}_{name}", value)
    assert load(HandlerSettings) == before
    configured(caller_tree())
    assert load(CallerSettings).receiver is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "localhost", "::"])
def test_a_variable_for_the_host_with_one_underscore_too_few_is_no_service_link(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """No Service has such an address. The service would listen somewhere else than its user believes."""
    configured(handler_tree())
    monkeypatch.setenv("BRIDGE_SERVICE_HOST", host)
    assert "service_host: unknown name; did you mean BRIDGE_SERVICE__HOST?" in message_of(HandlerSettings)


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_variable_counts_as_not_set(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, empty: str
) -> None:
    """A template writes a variable that has no value so. An empty host would listen on every interface."""
    configured(handler_tree())
    before = load(HandlerSettings)
    names = ("NAMESPACE", "SERVICE__HOST", "SERVICE__PORT", "CONSOLE", "METRICS_ADDRESS", "DATA_CONVERTER", "SWEEP")
    for name in (*names, f"CALLERS__{CALLER}__PROXY", "HASH_KEY"):
        monkeypatch.setenv(f"BRIDGE_{name}", empty)
    assert load(HandlerSettings) == before
    for field in ("namespace", "service"):
        configured(handler_tree() | {field: "" if field == "namespace" else {"url": "https://h", "host": ""}})
        assert "String should have at least 1 character" in message_of(HandlerSettings)


def test_whitespace_around_the_value_of_a_variable_is_dropped(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that was read from a file ends with a newline. No worker polls the task queue `q` with a newline."""
    configured(handler_tree())
    monkeypatch.setenv("BRIDGE_TASK_QUEUE", "q\n")
    monkeypatch.setenv("BRIDGE_SERVICE__URL", " https://payments.example\n")
    monkeypatch.setenv("BRIDGE_SERVICE__PROXIES", '\n ["10.0.0.0/8"]\n')
    settings = load(HandlerSettings)
    assert (settings.task_queue, settings.service.url) == ("q", "https://payments.example")
    assert [str(each) for each in settings.service.proxies] == ["10.0.0.0/8"]


def test_a_table_comes_before_its_parts_in_any_case(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted as bytes, lower case would come last, and the table would replace the part."""
    configured(caller_tree())
    monkeypatch.setenv("bridge_receiver", '{"port": 1, "host": "127.0.0.2"}')
    monkeypatch.setenv("BRIDGE_RECEIVER__PORT", "2")
    receiver = load(CallerSettings).receiver
    assert receiver is not None
    assert (receiver.port, receiver.host) == (2, "127.0.0.2")


def test_two_spellings_of_one_variable_are_refused(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them would win silently."""
    configured(caller_tree())
    monkeypatch.setenv("BRIDGE_NAME", "one")
    monkeypatch.setenv("Bridge_Name", "another")
    message = message_of(CallerSettings)
    assert "BRIDGE_NAME" in message
    assert "Bridge_Name" in message
    assert message.endswith("set the same field; remove one of the two")


def test_an_underscore_also_stands_for_a_dot(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shells do not allow a dot in a name. A second entry would be made, and the file would be blamed."""
    tree = caller_tree()
    tree["endpoints"] = {"payments.eu": tree["endpoints"]["payments"]}
    configured(tree)
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS_EU__WAIT_S", "7")
    assert {name: each.wait_s for name, each in load(CallerSettings).endpoints.items()} == {"payments.eu": 7}


def test_an_entry_that_only_a_variable_makes_is_not_blamed_on_the_file(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo in the name of an entry makes an incomplete one."""
    configured(caller_tree())
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENST__WAIT_S", "7")
    part = "(a part is from BRIDGE_ENDPOINTS__PAYMENST__WAIT_S)"
    assert f"  endpoints.paymenst.url: Field required {part}" in message_of(CallerSettings)


def test_a_broken_variable_is_named_and_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table in a variable is JSON; what is not says which field it was meant for, and is no matter of TOML."""
    monkeypatch.setenv("BRIDGE_CALLBACK_KEYS", '{"signing": "k1", "keys": {"k1": "' + SECRET)
    message = message_of(CallerSettings)
    assert "callback_keys" in message
    assert "TOML" not in message
    assert SECRET not in message


def test_of_several_variables_the_one_that_is_not_json_is_named(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list looks like a text to those who write it: `10.0.0.0/8`."""
    configured(caller_tree())
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__WAIT_S", "7")
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__NETWORKS", "10.0.0.0/8")
    message = message_of(CallerSettings)
    assert message.endswith("has to be JSON (from the variable BRIDGE_ENDPOINTS__PAYMENTS__NETWORKS)")
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__NETWORKS", SECRET)
    assert SECRET not in message_of(CallerSettings)


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("BRIDGE_NAMEE=x", "namee: unknown name; did you mean BRIDGE_NAME?"),
        ("BRIDGE_NAME__X=x", "name__x: unknown name; did you mean BRIDGE_NAME?"),
        ("BRIDGE_CONFG=x", "confg: unknown name; did you mean BRIDGE_CONFIG?"),
        ("BRIDGE_RECEIVER_PORT=80", "receiver_port: unknown name; did you mean BRIDGE_RECEIVER__PORT?"),
        ("BRIDGE_RECEIVER__PROT=80", "receiver.prot: unknown name; did you mean BRIDGE_RECEIVER__PORT?"),
        ("BRIDGE_RECEIVER__PORT=secret-pw", "receiver.port: Input should be a valid integer"),
        ("BRIDGE_ENDPOINTS__PAYMENTS__HANDLER=x", "settings: endpoints.payments.handler: no handler 'x'"),
        ("bridge_xyz=x", "xyz: unknown name; known: callback_keys, "),
        ("BRIDGE_=x", "settings: unknown name; known: callback_keys, "),
        ("bridge_config=x", "config: unknown name; did you mean BRIDGE_CONFIG?"),
        ("BRIDGE_RECEIVER=x", "receiver: has to be a table; a list or a table in a variable has to be JSON"),
        pytest.param(f"BRIDGE_{SECRET}=x", "…: unknown name; known: ", id="a key as a name"),
    ],
)
def test_a_bad_variable_is_refused_by_its_name(
    configured: Configured, monkeypatch: pytest.MonkeyPatch, variable: str, says: str
) -> None:
    """The error names the variable and not the file, and never the value."""
    configured(caller_tree())
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    message = message_of(CallerSettings)
    assert message.startswith(f"bad settings in the environment:\n  {says}")
    assert "secret-pw" not in message
    assert SECRET not in message
    assert message.endswith(f"(from the variable {'…' if SECRET in name else name})")


def test_a_rule_for_an_entry_names_the_variable_that_sets_a_part_of_it(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file or the variable may be at fault."""
    path = configured(caller_tree())
    monkeypatch.setenv("BRIDGE_ENDPOINTS__PAYMENTS__URL", "http://secret-pw")
    message = message_of(CallerSettings)
    assert message.startswith(f"bad settings in {path}:\n  endpoints.payments: needs https")
    assert message.endswith("(a part is from BRIDGE_ENDPOINTS__PAYMENTS__URL)")


def test_two_errors_name_a_source_each(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the line of a variable names one."""
    tree = caller_tree() | {"nam": "x"}
    path = configured(tree)
    monkeypatch.setenv("BRIDGE_RECEIVER__PROT", "1")
    head, *lines = message_of(CallerSettings, tree).splitlines()
    assert head == f"bad settings in {path}:"
    assert sorted(lines) == [
        "  nam: unknown name; did you mean name?",
        "  receiver.prot: unknown name; did you mean BRIDGE_RECEIVER__PORT? (from the variable BRIDGE_RECEIVER__PROT)",
    ]


KEY_SETS = ("start_keys", "completion_keys")


def test_the_names_in_a_json_table_are_exact(configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the file: two callers must not become one with the rights of both."""
    tree = handler_tree()
    peer = tree["callers"][CALLER]
    configured(tree)
    more = {
        name: peer
        | {"operations": [operation], "start_keys": plain_key_set("k1"), "completion_keys": plain_key_set("k1")}
        for name, operation in (("order.eu", "A/*"), ("order-eu", "B/*"))
    }
    monkeypatch.setenv("BRIDGE_CALLERS", json.dumps(more))
    callers = load(HandlerSettings).callers
    assert {name: each.operations for name, each in callers.items() if name != CALLER} == {
        "order.eu": ("A/*",),
        "order-eu": ("B/*",),
    }


def test_two_variables_that_mean_one_field_of_the_file_are_refused(
    configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has a dash, and the other an underscore in its place."""
    configured(caller_tree())
    for name, value in ((HANDLER.upper(), "off"), (HANDLER.upper().replace("-", "_"), "link")):
        monkeypatch.setenv(f"BRIDGE_HANDLERS__{name}__TRACE", value)
    assert "set the same field; remove one of the two" in message_of(CallerSettings)
