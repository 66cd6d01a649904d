"""The connection to Temporal, and our own namespace as a service sees it.

A service asks whether the namespace can be reached, how long it keeps closed runs, and which are open.
"""

import asyncio
import dataclasses
import logging
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.envconfig import ClientConfig
from temporalio.service import RPCError

from bridge.runtime.settings import SettingsError
from bridge.runtime.user_modules import import_attribute

_PROBE_TIMEOUT = timedelta(seconds=2)
_RETENTION_CACHE = timedelta(minutes=10)
_NO_LIMIT = timedelta(days=36_500)
"""Where the namespace names no retention, as on the time-skipping test server."""
_REMIND_AFTER_S = 3

_log = logging.getLogger(__name__)


async def connect(data_converter: str | None) -> Client:
    """Connect as the environment says (`TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE`, TLS, API key, profiles).

    Raises:
        SettingsError: The data converter cannot be imported, or Temporal cannot be reached.
    """
    config = connect_config()
    config.setdefault("target_host", "localhost:7233")
    if data_converter is not None:
        config["data_converter"] = import_attribute(data_converter, DataConverter)
    where = config["target_host"]
    _log.info("bridge.connecting", extra={"bridge.temporal": where, "bridge.namespace": config.get("namespace")})
    silence = f"Temporal at {where} has not answered yet; is TEMPORAL_ADDRESS right?"
    reminder = asyncio.get_running_loop().call_later(_REMIND_AFTER_S, _log.warning, silence)
    try:
        return await Client.connect(**config)
    except (RuntimeError, ValueError) as error:
        message = f"cannot connect to Temporal at {where}: {error}"
        raise SettingsError(message) from None
    finally:
        reminder.cancel()


class Namespace:
    """Asks Temporal about the namespace of *client*."""

    def __init__(self, client: Client, *, clock: Callable[[], datetime]) -> None:
        self._client = client
        self._clock = clock
        self._retention: tuple[timedelta, datetime] | None = None

    async def is_reachable(self) -> bool:
        """Whether Temporal answers, knows the namespace, and takes our credentials."""
        try:
            await self._describe()
        except RPCError:
            return False
        return True

    async def retention(self) -> timedelta:
        """How long a closed run can be looked up, at most ten minutes old.

        Raises:
            temporalio.service.RPCError: Temporal did not say.
        """
        now = self._clock()
        if self._retention is None or now - self._retention[1] > _RETENTION_CACHE:
            self._retention = await self._describe(), now
        return self._retention[0]

    async def _describe(self) -> timedelta:
        described = await self._client.workflow_service.describe_namespace(
            DescribeNamespaceRequest(namespace=self._client.namespace), timeout=_PROBE_TIMEOUT
        )
        return described.config.workflow_execution_retention_ttl.ToTimedelta() or _NO_LIMIT


def connect_config() -> dict[str, Any]:
    """How to connect, as the environment says: `TEMPORAL_ADDRESS`, TLS, API key, profiles.

    Raises:
        SettingsError: It cannot be used. No line of Temporal's configuration file is quoted.
    """
    try:
        return {**ClientConfig.load_client_connect_config()}
    except OSError as error:
        message = (
            f"the connection to Temporal: {error.filename or 'a file'}: {error.strerror}; see the TEMPORAL_… variables"
        )
        raise SettingsError(message) from None
    except (RuntimeError, ValueError) as error:
        # The excerpt of a broken file may hold an API key, and so may a value in the text.
        lines = [line for line in str(error).splitlines() if line and not re.match(r"\s*\d*\s*\|", line)]
        text = " ".join(lines)
        if "TOML" in text:
            text = re.sub(r"\"[^\"]*\"|`[^`]*`", "…", text)
        message = f"the connection to Temporal: {text}; see TEMPORAL_PROFILE and TEMPORAL_CONFIG_FILE"
        raise SettingsError(message) from None


def is_open(info: WorkflowExecutionInfo) -> bool:
    """Whether a run has not closed. A paused one, which newer servers know, goes on one day."""
    return info.status in {
        WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
        WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_PAUSED,
    }


def keeping_inline(client: Client) -> Client:
    """*client* without external storage: what it writes stands in history itself."""
    config = client.config(active_config=True)
    config["data_converter"] = dataclasses.replace(client.data_converter, external_storage=None)
    # Its plugins and interceptors have been applied already.
    return Client(**(config | {"plugins": []}))
