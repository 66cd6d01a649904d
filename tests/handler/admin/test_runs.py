"""The facts of a run that `runs list` and `show` print."""

from typing import Any

import pytest
from temporalio.api.common.v1 import Memo
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client

from handler.delivery.records import CallMemo, packed_reply
from handler.reports.deliveries import Deliveries
from handler.reports.runs import report_of
from scripts.environment.server import Server
from tests.support.helpers import HANDLER

_RUNNING = WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING


@pytest.mark.parametrize(("status", "state"), [(1, "running"), (7, "timed out"), (8, "paused"), (9, "status 9")])
async def test_a_run_of_any_status_is_shown(server: Server, status: Any, state: str) -> None:
    """Newer servers have more statuses."""
    client = await Client.connect(server.address, namespace=HANDLER)
    assert (await report_of(client, None, WorkflowExecutionInfo(status=status))).state == state


FOREIGN = CallMemo(
    caller="",
    request_id="",
    input_hash="",
    service="",
    operation="",
    reply=packed_reply(operation_token="", callback_url=None),
    deadline_ms=10**20,
)


@pytest.mark.parametrize("value", [None, 7, {"caller": "half a call"}, FOREIGN])
async def test_a_run_with_a_foreign_memo_under_our_name_is_shown_without_a_call(server: Server, value: object) -> None:
    """Every client of the namespace may write such a memo. The command still lists the other runs."""
    client = await Client.connect(server.address, namespace=HANDLER)
    [payload] = await client.data_converter.encode([value])
    report = await report_of(client, None, WorkflowExecutionInfo(memo=Memo(fields={"bridge": payload})))
    assert report.caller is None
    assert report.state == "status 0"


@pytest.mark.parametrize("value", [None, 7, {}, {"deadline_ms": "soon"}, {"deadline_ms": 10**20}])
async def test_a_delivery_with_a_foreign_memo_is_listed_without_its_call(server: Server, value: object) -> None:
    """As a run with such a memo is."""
    client = await Client.connect(server.address, namespace=HANDLER)
    [payload] = await client.data_converter.encode([value])
    info = WorkflowExecutionInfo(status=_RUNNING, memo=Memo(fields={"bridge": payload}))
    facts = await Deliveries(client=client)._facts(info)
    assert (facts["state"].value, "caller" in facts) == ("running", False)
