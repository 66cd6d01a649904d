"""The connection to Temporal, the raw calls that several packages make, and what the status of a failed call means.

A service reads of its own namespace whether it can be reached, its id, and how long it keeps closed runs. The SDK's
client has no form of the other calls that also works with a status of a newer server, with an empty run id, or with a
page size. A module that makes a call of its own checks only a status that has a special meaning for this call.
"""

import asyncio
import dataclasses
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from nexusrpc import HandlerErrorType
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    DescribeNamespaceRequest,
    DescribeNamespaceResponse,
    DescribeWorkflowExecutionRequest,
    DescribeWorkflowExecutionResponse,
    GetWorkflowExecutionHistoryReverseRequest,
    GetWorkflowExecutionHistoryReverseResponse,
    ListWorkflowExecutionsRequest,
)
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.envconfig import ClientConfig, ClientConfigProfile, ClientConfigTLS
from temporalio.service import RPCError, RPCStatusCode

from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import new_runtime
from bridge.runtime.settings import BridgeSettings, SettingsError
from bridge.runtime.user_modules import import_attribute
from bridge.security.redaction import plain

_PROBE_TIMEOUT = timedelta(seconds=2)
_DESCRIPTION_CACHE = timedelta(minutes=10)
"""Short enough to see a changed retention, and a namespace that was deleted and created again."""
_NO_LIMIT = timedelta(days=36_500)
"""Retention of a namespace that reports no retention, as the time-skipping test server does."""
_REMIND_AFTER_S = 3
_PAGE = 100

_ERROR_TYPES: Mapping[RPCStatusCode, HandlerErrorType] = {
    RPCStatusCode.INVALID_ARGUMENT: HandlerErrorType.BAD_REQUEST,
    RPCStatusCode.NOT_FOUND: HandlerErrorType.NOT_FOUND,
    RPCStatusCode.UNIMPLEMENTED: HandlerErrorType.NOT_IMPLEMENTED,
    RPCStatusCode.RESOURCE_EXHAUSTED: HandlerErrorType.RESOURCE_EXHAUSTED,
    RPCStatusCode.ABORTED: HandlerErrorType.UNAVAILABLE,
    RPCStatusCode.UNAVAILABLE: HandlerErrorType.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED: HandlerErrorType.UPSTREAM_TIMEOUT,
}
"""What a failed call means for the request that needed it, as in Temporal's own worker. Other statuses: INTERNAL."""
_TEMPORARY = frozenset(
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.ABORTED, RPCStatusCode.RESOURCE_EXHAUSTED, RPCStatusCode.UNKNOWN}
    | {RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}
    # Refused credentials are a fault of this side, which an operator repairs.
    | {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED}
)
_FINAL = frozenset({RPCStatusCode.ALREADY_EXISTS, RPCStatusCode.FAILED_PRECONDITION, RPCStatusCode.OUT_OF_RANGE})
_CLOSED = frozenset({0, *range(WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_COMPLETED, 8)})
"""Unspecified, and from completed to timed out. A run of any other status may go on, and its calls may wait."""

_log = event_logger(__name__)


async def connect(settings: BridgeSettings | None = None, *, serves_metrics: bool = False) -> Client:
    """Connect with the `TEMPORAL_…` variables: address, namespace, TLS, API key, profiles.

    Args:
        settings: Name a data converter and a namespace; None selects the SDK's default converter.
        serves_metrics: Whether the client's runtime serves metrics, if the settings name an address.

    Raises:
        SettingsError: The data converter cannot be imported, Temporal cannot be reached, the metrics address is in use,
            or the namespace does not exist or is another one than the settings name.
    """
    config = connect_config()
    address = settings.metrics_address if serves_metrics and settings is not None else None
    config["runtime"] = new_runtime(address)
    if settings is not None:
        config.setdefault("namespace", settings.namespace or "default")
        settings.check_namespace(config["namespace"])
        if settings.data_converter is not None:
            config["data_converter"] = import_attribute(settings.data_converter, DataConverter)
    where = config["target_host"]
    _log.info("bridge.connecting", extra={"bridge.temporal": where, "bridge.namespace": config.get("namespace")})
    silence = f"Temporal at {where} has not answered yet; is TEMPORAL_ADDRESS right?"
    reminder = asyncio.get_running_loop().call_later(_REMIND_AFTER_S, _log.warning, silence)
    try:
        client = await Client.connect(**config)
    except (RuntimeError, ValueError) as error:
        message = f"cannot connect to Temporal at {where}: {error}"
        raise SettingsError(message) from None
    finally:
        reminder.cancel()
    try:
        await describe_namespace(client)
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            raise SettingsError(namespace_missing(client)) from None
    return client


def namespace_missing(client: Client) -> str:
    """Say that the namespace of *client* does not exist, and what to do."""
    where = client.service_client.config.target_host
    return (
        f"namespace {client.namespace} does not exist at {where}: correct TEMPORAL_NAMESPACE or TEMPORAL_ADDRESS, or "
        f"create it: temporal operator namespace create --namespace {client.namespace}"
    )


async def describe_namespace(client: Client) -> DescribeNamespaceResponse:
    """Describe the namespace of *client*.

    Raises:
        temporalio.service.RPCError: Temporal did not describe it within two seconds.
    """
    request = DescribeNamespaceRequest(namespace=client.namespace)
    return await client.workflow_service.describe_namespace(request, timeout=_PROBE_TIMEOUT)


class Namespace:
    """The namespace of *client*, as Temporal describes it."""

    def __init__(self, client: Client, *, clock: Callable[[], datetime]) -> None:
        self._client = client
        self._clock = clock
        self._described: tuple[DescribeNamespaceResponse, datetime] | None = None

    async def is_reachable(self) -> bool:
        """Whether Temporal answers, the namespace exists, and our credentials are accepted."""
        try:
            await describe_namespace(self._client)
        except RPCError:
            return False
        return True

    async def id(self) -> str:
        """The namespace's id, cached for ten minutes. Namespaces of one name on two clusters have different ids.

        Raises:
            temporalio.service.RPCError: Temporal did not describe the namespace.
        """
        return (await self._cached()).namespace_info.id

    async def retention(self) -> timedelta:
        """How long a closed run can be looked up, cached for ten minutes.

        Raises:
            temporalio.service.RPCError: Temporal did not describe the namespace.
        """
        return (await self._cached()).config.workflow_execution_retention_ttl.ToTimedelta() or _NO_LIMIT

    async def _cached(self) -> DescribeNamespaceResponse:
        now = self._clock()
        if self._described is None or now - self._described[1] > _DESCRIPTION_CACHE:
            self._described = await describe_namespace(self._client), now
        return self._described[0]


def connect_config() -> dict[str, Any]:
    """The arguments of `Client.connect` from the `TEMPORAL_…` variables: address, TLS, API key, profiles.

    Raises:
        SettingsError: The configuration cannot be used. The text quotes no line of Temporal's configuration file.
    """
    try:
        return {
            "target_host": "localhost:7233",
            **ClientConfig.load_client_connect_config(override_env_vars=_variables()),
        }
    except OSError as error:
        message = (
            f"the connection to Temporal: {error.filename or 'a file'}: {error.strerror}; see the TEMPORAL_… variables"
        )
        raise SettingsError(message) from None
    except (RuntimeError, ValueError) as error:
        # The error quotes lines and values of a malformed file. Both may hold an API key.
        lines = [line for line in str(error).splitlines() if line and not re.match(r"\s*\d*\s*\|", line)]
        text = " ".join(lines)
        if "TOML" in text:
            text = re.sub(r"\"[^\"]*\"|`[^`]*`", "…", text)
        message = f"the connection to Temporal: {text}; see TEMPORAL_PROFILE and TEMPORAL_CONFIG_FILE"
        raise SettingsError(message) from None


def _variables() -> dict[str, str]:
    """The `TEMPORAL_…` variables that are set. A template sets a variable that has no value to an empty text."""
    return {name: value for name, value in os.environ.items() if name.startswith("TEMPORAL_") and value}


def connect_files() -> list[Path]:
    """The files of `connect_config`: the one that TEMPORAL_CONFIG_FILE names, and those of certificates and keys."""
    profile, own = ClientConfigProfile.load(override_env_vars=_variables()), os.environ.get("TEMPORAL_CONFIG_FILE")
    tls = profile.tls or ClientConfigTLS()
    sources = (tls.server_root_ca_cert, tls.client_cert, tls.client_private_key)
    return [*([Path(own)] if own else []), *(each for each in sources if isinstance(each, Path))]


def refusal(error: RPCError) -> str:
    """Say what Temporal answered instead of doing what was asked for."""
    return f"Temporal answered {error.status.name}: {plain(error.message)}"


def error_type(error: RPCError) -> HandlerErrorType:
    """What *error* means for the request that needed the call."""
    return _ERROR_TYPES.get(error.status, HandlerErrorType.INTERNAL)


def is_temporary(error: RPCError) -> bool:
    """Whether the same call may succeed later: Temporal did not answer, is busy, or refused our credentials."""
    return error.status in _TEMPORARY


def is_final(error: RPCError) -> bool:
    """Whether the same call always fails, although its arguments are valid."""
    return error.status in _FINAL


def is_missing(error: RPCError) -> bool:
    """Whether the run or activity does not exist. False if the namespace does not exist: the settings are wrong."""
    namespace_missing = any(detail.Is(NamespaceNotFoundFailure.DESCRIPTOR) for detail in error.grpc_status.details)
    return error.status is RPCStatusCode.NOT_FOUND and not namespace_missing


async def describe(
    client: Client, workflow_id: str, run_id: str = "", *, within: timedelta | None = None
) -> DescribeWorkflowExecutionResponse | None:
    """Describe a run, open or closed; None if it does not exist. Without *run_id*: the newest run of *workflow_id*.

    Raises:
        temporalio.service.RPCError: Temporal did not describe the run *within* the limit. Without a limit the SDK's
            client retries for some seconds.
    """
    try:
        return await describe_existing(client, workflow_id, run_id, within=within)
    except RPCError as error:
        if is_missing(error):
            return None
        raise


async def describe_existing(
    client: Client, workflow_id: str, run_id: str = "", *, within: timedelta | None = None
) -> DescribeWorkflowExecutionResponse:
    """Describe a run as `describe` does, but raise NOT_FOUND if it does not exist."""
    execution = WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
    request = DescribeWorkflowExecutionRequest(namespace=client.namespace, execution=execution)
    service = client.workflow_service
    return await service.describe_workflow_execution(request, retry=within is None, timeout=within)


async def newest_events(
    client: Client, execution: WorkflowExecution, *, size: int, token: bytes = b"", within: timedelta | None = None
) -> GetWorkflowExecutionHistoryReverseResponse:
    """Return *size* events of a run at most, the newest first, after the page that named *token*.

    Temporal answers at once, also if the run is open. *within* is as for `describe`.
    """
    request = GetWorkflowExecutionHistoryReverseRequest(
        namespace=client.namespace, execution=execution, maximum_page_size=size, next_page_token=token
    )
    service = client.workflow_service
    return await service.get_workflow_execution_history_reverse(request, retry=within is None, timeout=within)


def is_open(info: WorkflowExecutionInfo) -> bool:
    """Whether a run has not closed. A run with a status that this release does not know, such as paused, is open."""
    return info.status not in _CLOSED


async def list_runs(client: Client, query: str) -> AsyncIterator[WorkflowExecutionInfo]:
    """Yield the runs that the visibility query *query* finds, newest first.

    A raw call, because the SDK's method fails on a status that it does not know.
    """
    request = ListWorkflowExecutionsRequest(namespace=client.namespace, query=query, page_size=_PAGE)
    while True:
        page = await client.workflow_service.list_workflow_executions(request, retry=True)
        for row in page.executions:
            yield row
        if not page.next_page_token:
            return
        request.next_page_token = page.next_page_token


def keeping_inline(client: Client) -> Client:
    """*client* without external storage: payloads that it writes are stored in history itself."""
    config = client.config(active_config=True)
    config["data_converter"] = dataclasses.replace(client.data_converter, external_storage=None)
    # The plugins have already changed this configuration. A second time they would add their interceptors again.
    return Client(**(config | {"plugins": []}))
