"""The connection to Temporal, its raw calls, and the meaning of a failed call's status."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import GrpcStatus
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

from bridge.runtime.settings import SettingsError
from bridge.temporal.server import (
    connect,
    connect_config,
    connect_files,
    describe,
    error_type,
    is_final,
    is_missing,
    is_open,
    is_temporary,
    newest_events,
)
from caller import CallerPlugin
from handler import HandlerPlugin
from scripts.environment.server import Server
from tests.support.helpers import CALLER, HANDLER, Keys, caller_settings, handler_settings
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


@pytest.mark.parametrize(
    ("status", "kind", "temporary", "final"),
    [
        ("INVALID_ARGUMENT", "BAD_REQUEST", False, False),
        ("NOT_FOUND", "NOT_FOUND", False, False),
        ("UNIMPLEMENTED", "NOT_IMPLEMENTED", False, False),
        ("RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", True, False),
        ("UNAVAILABLE", "UNAVAILABLE", True, False),
        ("ABORTED", "UNAVAILABLE", True, False),
        ("DEADLINE_EXCEEDED", "UPSTREAM_TIMEOUT", True, False),
        ("CANCELLED", "INTERNAL", True, False),
        ("UNKNOWN", "INTERNAL", True, False),
        ("PERMISSION_DENIED", "INTERNAL", True, False),
        ("UNAUTHENTICATED", "INTERNAL", True, False),
        ("INTERNAL", "INTERNAL", False, False),
        ("DATA_LOSS", "INTERNAL", False, False),
        ("ALREADY_EXISTS", "INTERNAL", False, True),
        ("FAILED_PRECONDITION", "INTERNAL", False, True),
        ("OUT_OF_RANGE", "INTERNAL", False, True),
    ],
)
def test_every_status_of_a_failed_call_has_one_meaning(status: str, kind: str, temporary: bool, final: bool) -> None:
    """The table names what the request gets, whether a later call may succeed, and whether none can."""
    error = RPCError("text", RPCStatusCode[status], b"")
    assert error_type(error).name == kind
    assert (is_temporary(error), is_final(error)) == (temporary, final)


@pytest.mark.parametrize("namespace_exists", [True, False])
def test_a_namespace_that_does_not_exist_is_not_a_missing_run(namespace_exists: bool) -> None:
    """With wrong settings every run is NOT_FOUND. This must not look as if the runs had ended."""
    details = GrpcStatus()
    if not namespace_exists:
        details.details.add().Pack(NamespaceNotFoundFailure(namespace="payments"))
    assert is_missing(RPCError("text", RPCStatusCode.NOT_FOUND, details.SerializeToString())) is namespace_exists


async def test_a_run_is_described_or_missing_and_a_missing_namespace_is_an_error(server: Server) -> None:
    """A run that does not exist is None. If the namespace does not exist, the call fails."""
    client = await Client.connect(server.address, namespace=HANDLER)
    started = await client.start_workflow("Unserved", id="described", task_queue="unserved")
    newest, same = [await describe(client, started.id, run_id) for run_id in ("", started.result_run_id or "")]
    assert newest is not None
    assert same is not None
    execution = same.workflow_execution_info.execution
    assert newest.workflow_execution_info.execution == execution
    page = await newest_events(client, execution, size=1, within=timedelta(seconds=5))
    assert page.history.events[0].event_id == 2
    assert await describe(client, "never started") is None
    elsewhere = await Client.connect(server.address, namespace="no-such-namespace")
    with pytest.raises(RPCError, match="no-such-namespace"):
        await describe(elsewhere, started.id)


async def test_a_namespace_that_does_not_exist_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says so at its start, and how to create it."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "order-pord")
    with pytest.raises(SettingsError, match=r"namespace order-pord does not exist at .*create --namespace order-pord"):
        await connect()


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


@pytest.mark.parametrize(
    ("status", "open_"), [(1, True), *((status, False) for status in range(2, 8)), (8, True), (9, True), (77, True)]
)
def test_a_status_of_a_newer_server_is_not_the_end_of_a_run(status: Any, open_: bool) -> None:
    """If it were, the receiver would answer that no call waits, and the handler would drop the outcome."""
    assert is_open(WorkflowExecutionInfo(status=status)) is open_
