"""The facts of a run that `runs list` and `show` print."""

from typing import Any

import pytest
from temporalio.api.common.v1 import Memo
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client

from handler.delivery.run_report import report_of
from scripts.environment.server import Server
from tests.support.helpers import HANDLER


@pytest.mark.parametrize(("status", "state"), [(1, "running"), (7, "timed out"), (8, "paused"), (9, "status 9")])
async def test_a_run_of_any_status_is_shown(server: Server, status: Any, state: str) -> None:
    """Newer servers have more statuses."""
    client = await Client.connect(server.address, namespace=HANDLER)
    assert (await report_of(client, None, WorkflowExecutionInfo(status=status))).state == state


@pytest.mark.parametrize("value", [None, 7, {"caller": "half a call"}])
async def test_a_run_with_a_foreign_memo_under_our_name_is_shown_without_a_call(server: Server, value: object) -> None:
    """Every client of the namespace may write such a memo. The command still lists the other runs."""
    client = await Client.connect(server.address, namespace=HANDLER)
    [payload] = await client.data_converter.encode([value])
    report = await report_of(client, None, WorkflowExecutionInfo(memo=Memo(fields={"bridge": payload})))
    assert report.caller is None
    assert report.state == "status 0"
