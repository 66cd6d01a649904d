"""Who may cancel a run."""

import dataclasses

import pytest

from bridge.protocol.link import WorkflowRef
from bridge.workflow.targets import Targets
from handler.delivery.records import CallMemo, packed_reply
from handler.start.runs import Run
from handler.start.same_call import may_cancel
from tests.support.targets import ProbeWorkflow, SharedWorkflow

[PROBE], [SHARED] = list(Targets([ProbeWorkflow])), list(Targets([SharedWorkflow]))

REPLY = packed_reply(operation_token="t", callback_url=None)


def run_of(caller: str | None) -> Run:
    """A run of the probe that the call `request-1` of *caller* started; None: it was started by hand."""
    memo = None
    if caller is not None:
        fields = {each.name: "" for each in dataclasses.fields(CallMemo) if each.default is dataclasses.MISSING}
        memo = CallMemo(**{**fields, "caller": caller, "request_id": "request-1", "reply": REPLY})  # type: ignore[arg-type]
    ref = WorkflowRef(namespace="payments", workflow_id="payment-7", run_id="run")
    return Run(
        ref=ref,
        workflow_type=PROBE.workflow_type,
        is_open=True,
        memo=memo,
        is_recorded=memo is not None,
        served=frozenset(),
        progress=None,
        start_time_ms=0,
        first_run_id="run",
        events=1,
        history_bytes=1,
    )


@pytest.mark.parametrize(
    ("caller", "owner", "request_id", "may"),
    [
        pytest.param("orders", "orders", "request-1", True, id="its call"),
        pytest.param("orders", "orders", "request-2", True, id="another call of the same caller, attached"),
        pytest.param("orders", "other", "request-1", False, id="the call of another caller"),
        pytest.param("orders", "nexus:orders", "request-1", False, id="a native call"),
        pytest.param("orders", None, "request-1", False, id="a run that no call started"),
        pytest.param(None, "nexus:orders", "request-1", True, id="native: its call"),
        pytest.param(None, "nexus:", "request-1", True, id="native: its call, from a namespace that is not named"),
        pytest.param(None, "nexus:orders", "request-2", False, id="native: a guessed request id"),
        pytest.param(None, "orders", "request-1", False, id="native: a call over HTTP"),
        pytest.param(None, None, "request-1", False, id="native: a run that no call started"),
    ],
)
def test_a_run_is_canceled_by_its_caller(caller: str | None, owner: str | None, request_id: str, *, may: bool) -> None:
    """The run's memo decides. Temporal does not name a native caller; the request id is its proof."""
    assert may_cancel(caller, PROBE, request_id, run_of(owner)) is may
    assert not may_cancel(caller, SHARED, request_id, run_of(owner))
