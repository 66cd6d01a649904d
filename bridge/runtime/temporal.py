"""Our own namespace as a service sees it: whether it can be reached, how long it keeps closed runs, which are open."""

import dataclasses
from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import Client
from temporalio.service import RPCError

_PROBE_TIMEOUT = timedelta(seconds=2)
_RETENTION_CACHE = timedelta(minutes=10)
_NO_LIMIT = timedelta(days=36_500)
"""Where the namespace names no retention, as on the time-skipping test server."""


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
