"""Raw calls about runs."""

from datetime import timedelta
from typing import Any

import pytest
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.temporal.executions import describe, is_open, newest_events
from scripts.environment.server import Server
from tests.support.helpers import HANDLER


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


@pytest.mark.parametrize(
    ("status", "open_"), [(1, True), *((status, False) for status in range(2, 8)), (8, True), (9, True), (77, True)]
)
def test_a_status_of_a_newer_server_is_not_the_end_of_a_run(status: Any, open_: bool) -> None:
    """If it were, the receiver would answer that no call waits, and the handler would drop the outcome."""
    assert is_open(WorkflowExecutionInfo(status=status)) is open_
