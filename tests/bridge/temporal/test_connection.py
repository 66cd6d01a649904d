"""The connection to Temporal: where it is, and the namespace behind it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from temporalio.worker import Worker

from bridge.admin.command import connected
from bridge.runtime.settings import SettingsError
from bridge.temporal.connection import connect, connect_config, connect_files
from caller import CallerPlugin
from caller.settings import CallerSettings
from handler import HandlerPlugin
from scripts.environment.server import Server
from tests.support.helpers import CALLER, HANDLER, Keys, caller_settings, handler_settings
from tests.support.settings_files import caller_tree
from tests.support.targets import ProbeWorkflow

SECRET = "sk-4111-1111-1111-1111"


@pytest.fixture(autouse=True)
def _no_connection_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TEMPORAL_ADDRESS", "TEMPORAL_NAMESPACE", "TEMPORAL_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(tmp_path / "temporal.toml"))


def _written(content: str | bytes) -> Callable[[Path], object]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda path: path.write_bytes(raw)


@pytest.mark.parametrize(
    ("variables", "write", "says"),
    [
        pytest.param({"TEMPORAL_PROFILE": "prod"}, _written(""), "Profile 'prod' not found", id="unknown profile"),
        pytest.param({"TEMPORAL_PROFILE": "prod"}, None, "Profile 'prod' not found", id="profile without a file"),
        pytest.param(
            {},
            _written(f"[profile.default]\napi_key = {SECRET}"),
            "TOML parse error at line 2, column 11",
            id="no TOML",
        ),
        pytest.param({}, _written(f'[profile.default]\ntls = "{SECRET}"'), "line 2, column 7", id="wrong type"),
        pytest.param({}, _written("[profile.default]".encode("utf-16")), "invalid utf-8", id="UTF-16"),
        pytest.param({}, Path.mkdir, "directory", id="folder"),
        pytest.param(
            {"TEMPORAL_TLS_CLIENT_CERT_PATH": "/no/cert.pem", "TEMPORAL_TLS_CLIENT_KEY_PATH": "/no/key.pem"},
            None,
            "/no/cert.pem: No such file or directory",
            id="missing certificate",
        ),
        pytest.param(
            {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": "/no/ca.pem"}, None, "/no/ca.pem: No such file", id="missing CA"
        ),
        pytest.param({"TEMPORAL_ADDRESS": "localhost:70000"}, None, "at localhost:70000: invalid target", id="port"),
        pytest.param({"TEMPORAL_ADDRESS": "local host:7233"}, None, "at local host:7233: invalid target", id="host"),
        pytest.param(
            {"TEMPORAL_ADDRESS": "localhost:1", "TEMPORAL_TLS_CLIENT_CERT_DATA": SECRET},
            None,
            "Must have both client cert and private key",
            id="certificate without its key",
        ),
        pytest.param(
            {
                "TEMPORAL_ADDRESS": "localhost:1",
                "TEMPORAL_TLS_CLIENT_CERT_DATA": SECRET,
                "TEMPORAL_TLS_CLIENT_KEY_DATA": SECRET,
            },
            None,
            "cannot connect to Temporal at localhost:1",
            id="no certificate",
        ),
    ],
)
async def test_a_connection_that_cannot_be_made_is_named(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    write: Callable[[Path], object] | None,
    says: str,
) -> None:
    """Never a traceback for a user's mistake."""
    if write is not None:
        write(tmp_path / "temporal.toml")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        await connect()
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_profile_is_read_as_temporal_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of it is changed on the way."""
    (tmp_path / "temporal.toml").write_text('[profile.prod]\naddress = "h:7"\nnamespace = "order-prod"\n')
    monkeypatch.setenv("TEMPORAL_PROFILE", "prod")
    assert connect_config() == {"target_host": "h:7", "namespace": "order-prod"}


@pytest.mark.parametrize("name", ["ADDRESS", "NAMESPACE", "API_KEY", "TLS", "TLS_CLIENT_CERT_PATH", "PROFILE"])
def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Templates write `TEMPORAL_API_KEY=${API_KEY:-}`. It turned TLS on. The profile's address and namespace hold."""
    (tmp_path / "temporal.toml").write_text('[profile.default]\naddress = "h:7"\nnamespace = "order-prod"\n')
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(tmp_path / "temporal.toml"))
    monkeypatch.setenv(f"TEMPORAL_{name}", "")
    assert connect_config() == {"target_host": "h:7", "namespace": "order-prod"}
    assert connect_files() == [tmp_path / "temporal.toml"]


async def test_a_namespace_that_does_not_exist_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says so at its start, and how to create it."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "order-pord")
    with pytest.raises(SettingsError, match=r"namespace order-pord does not exist at .*create --namespace order-pord"):
        await connect()


async def test_a_command_takes_the_namespace_of_settings_without_a_file(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container all settings may be variables. A list of the default namespace would show nothing."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    for name in ("TEMPORAL_NAMESPACE", "BRIDGE_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({**caller_tree(), "namespace": CALLER}).items():
        monkeypatch.setenv(f"BRIDGE_{name}".upper(), value if isinstance(value, str) else json.dumps(value))
    async with connected(CallerSettings) as (client, settings):
        assert client.namespace == CALLER
        assert settings is not None


async def test_the_namespace_of_the_settings_is_the_one_that_is_connected(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the default. A different one is refused, also by the plugins of both workers."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.delenv("TEMPORAL_NAMESPACE", raising=False)
    receiver, service = "http://127.0.0.1:1", "http://127.0.0.1:2"
    settings = caller_settings(Keys(), receiver_url=receiver, endpoint_url=service, namespace=CALLER)
    assert (await connect(settings)).namespace == CALLER
    monkeypatch.setenv("TEMPORAL_NAMESPACE", HANDLER)
    refusal = f"connected to namespace {HANDLER}, but `namespace` in the settings is {CALLER}"
    with pytest.raises(SettingsError, match=refusal):
        await connect(settings)
    client = await connect()
    own = handler_settings(Keys(), receiver_url=receiver, service_url=service, namespace=CALLER)
    for plugin in (CallerPlugin(settings), HandlerPlugin(own)):
        with pytest.raises(SettingsError, match=refusal):
            Worker(client, task_queue="any", workflows=[ProbeWorkflow], plugins=[plugin])
