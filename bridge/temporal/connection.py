"""The connection to Temporal: where it is, and the namespace behind it."""

import asyncio
import dataclasses
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from temporalio.api.workflowservice.v1 import (
    DescribeNamespaceRequest,
    DescribeNamespaceResponse,
)
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.envconfig import ClientConfig, ClientConfigProfile, ClientConfigTLS
from temporalio.service import RPCError, RPCStatusCode

from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import new_runtime
from bridge.runtime.settings import BridgeSettings, SettingsError
from bridge.runtime.user_modules import import_attribute

_PROBE_TIMEOUT = timedelta(seconds=2)
_DESCRIPTION_CACHE = timedelta(minutes=10)
"""Short enough to see a changed retention, and a namespace that was deleted and created again."""
_NO_LIMIT = timedelta(days=36_500)
"""Retention of a namespace that reports no retention, as the time-skipping test server does."""
_REMIND_AFTER_S = 3
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


def keeping_inline(client: Client) -> Client:
    """*client* without external storage: payloads that it writes are stored in history itself."""
    config = client.config(active_config=True)
    config["data_converter"] = dataclasses.replace(client.data_converter, external_storage=None)
    # The plugins have already changed this configuration. A second time they would add their interceptors again.
    return Client(**(config | {"plugins": []}))
