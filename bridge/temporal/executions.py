"""Raw calls about runs, each made by several packages.

The SDK's client has no form of them that also works with a status of a newer server, with an empty run id, or with a
page size.
"""

from collections.abc import AsyncIterator
from datetime import timedelta

from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    DescribeWorkflowExecutionRequest,
    DescribeWorkflowExecutionResponse,
    GetWorkflowExecutionHistoryReverseRequest,
    GetWorkflowExecutionHistoryReverseResponse,
    ListWorkflowExecutionsRequest,
)
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.temporal.rpc_status import is_missing

_PAGE = 100
_CLOSED = frozenset({0, *range(WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_COMPLETED, 8)})
"""Unspecified, and from completed to timed out. A run of any other status may go on, and its calls may wait."""


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
