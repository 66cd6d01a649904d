"""The verdict on a chaos run, over histories as a server writes them."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.enums.v1 import EventType
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent

from bridge.workflow.call import START_OPERATION_ACTIVITY
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY
from handler.delivery.workflow import DELIVERY_WORKFLOW
from scripts.chaos_run.calls import Call, CallKind
from scripts.chaos_run.verdict import HarmDone, Run, Verdict, answer_of, judge, recoveries

CALL = Call(workflow_id="order-7-a", order_id="7", kind=CallKind.AT_ONCE, at=0, own_s=0)


def event(kind: str, at: float = 0.0, **attributes: Any) -> HistoryEvent:
    """An event of a type, *at* seconds after noon."""
    made = HistoryEvent(event_type=EventType.Value(f"EVENT_TYPE_{kind.upper()}"))
    made.event_time.CopyFrom(Timestamp(seconds=1_700_000_000, nanos=0))
    made.event_time.FromNanoseconds(made.event_time.ToNanoseconds() + int(at * 1e9))
    # A message that was read from the wire has its attributes set.
    getattr(made, f"{kind}_event_attributes").SetInParent()
    for name, value in attributes.items():
        field, _, inner = name.partition("__")
        target = getattr(made, f"{kind}_event_attributes")
        if inner:
            setattr(getattr(target, field), inner, value)
        elif hasattr(value, "DESCRIPTOR"):
            getattr(target, field).CopyFrom(value)
        else:
            setattr(target, field, value)
    return made


def payloads(*values: Any) -> Payloads:
    return Payloads(payloads=[Payload(data=json.dumps(value).encode()) for value in values])


def started(workflow_type: str) -> HistoryEvent:
    made = event("workflow_execution_started", workflow_type__name=workflow_type)
    memo = made.workflow_execution_started_event_attributes.memo.fields[MEMO_KEY]
    memo.data = json.dumps({"request_id": "r1"}).encode()
    return made


def calling(closing: HistoryEvent | None = None) -> Run:
    receipt = {"order_id": "7", "payment_id": "p-7", "status": "paid"}
    closing = closing or event("workflow_execution_completed", 9, result=payloads(receipt))
    wait = event("activity_task_scheduled", 1, activity_id="r1", activity_type__name=START_OPERATION_ACTIVITY)
    events = [started("OrderWorkflow"), wait, event("activity_task_completed", 8), closing]
    return Run(namespace="order-prod", workflow_id="order-7-a", run_id="1", events=events)


def target() -> Run:
    events = [started("PaymentWorkflow"), event("timer_started", 3), event("workflow_execution_completed", 5)]
    return Run(namespace="payment-prod", workflow_id="payment-7", run_id="2", events=events)


def delivery(closing: HistoryEvent) -> Run:
    events = [started(DELIVERY_WORKFLOW), closing]
    return Run(namespace="payment-prod", workflow_id="bridge-delivery-r1-2", run_id="3", events=events)


def test_a_good_run_leaves_nothing_to_say() -> None:
    """One call, one target, one delivery."""
    delivered = delivery(event("workflow_execution_completed"))
    assert judge([CALL], callers=[calling()], handlers=[target(), delivered]) == Verdict()


def test_an_activity_that_is_scheduled_again_makes_no_second_call() -> None:
    """It ended without an outcome, and the call has one id and one outcome."""
    run = calling()
    stopped = Failure(message="Failed decoding heartbeat details")
    again = [run.events[1], event("activity_task_failed", 2, failure=stopped)]
    run = dataclasses.replace(run, events=[run.events[0], *again, *run.events[1:]])
    assert judge([CALL], callers=[run], handlers=[target()]) == Verdict()


Runs = tuple[list[Run], list[Run]]


def with_events(run: Run, change: Callable[[list[HistoryEvent]], None]) -> Run:
    events = list(copy.deepcopy(run.events))
    change(events)
    return Run(namespace=run.namespace, workflow_id=run.workflow_id, run_id=run.run_id, events=events)


def cut_short(events: list[HistoryEvent]) -> None:
    del events[-1]


def attached(events: list[HistoryEvent]) -> None:
    signal = event("workflow_execution_signaled", signal_name=ATTACH_SIGNAL, input=payloads({"request_id": "r2"}))
    events.insert(1, signal)


OTHER = event("workflow_execution_completed", result=payloads({"order_id": "7", "payment_id": "p-8", "status": "paid"}))


@pytest.mark.parametrize(
    ("runs", "found"),
    [
        pytest.param(([], [target()]), {"lost", "undelivered"}, id="never ran"),
        pytest.param(([calling(event("workflow_execution_timed_out"))], [target()]), {"lost"}, id="no answer"),
        pytest.param(([calling(OTHER)], [target()]), {"wrong"}, id="the answer of another call"),
        pytest.param(([calling()], []), {"wrong"}, id="an answer without a target"),
        pytest.param(([calling(), calling()], [target()]), {"double"}, id="the caller ran twice"),
        pytest.param(([calling()], [target(), target()]), {"double"}, id="the target ran twice"),
        pytest.param(
            ([with_events(calling(), lambda events: events.insert(3, events[2]))], [target()]),
            {"double"},
            id="the call ended twice",
        ),
        pytest.param(([with_events(calling(), cut_short)], [target()]), {"pending"}, id="open"),
        pytest.param(
            ([calling()], [with_events(target(), cut_short)]),
            {"undelivered"},
            id="the target is open",
        ),
        pytest.param(([calling()], [with_events(target(), attached)]), {"undelivered"}, id="a second call left out"),
        pytest.param(
            ([calling()], [target(), delivery(event("workflow_execution_failed"))]),
            {"undelivered"},
            id="a delivery was refused",
        ),
        pytest.param(
            ([calling()], [target(), delivery(event("timer_started"))]), {"undelivered"}, id="still delivering"
        ),
    ],
)
def test_everything_that_is_not_right_is_found(runs: Runs, found: set[str]) -> None:
    """Each under its own name, and under no other."""
    counts = judge([CALL], callers=runs[0], handlers=runs[1]).counts()
    assert {name for name, count in counts.items() if count} == found


def test_a_target_that_must_not_run_is_one_too_many() -> None:
    """A refused payment never starts."""
    refused = Call(workflow_id="order-7-a", order_id="7", kind=CallKind.REFUSED, at=0, own_s=0)
    assert judge([refused], callers=[calling()], handlers=[target()]).double


def failed(*causes: Failure) -> HistoryEvent:
    """A workflow that failed with the first, because of the second, and so on."""
    for outer, inner in zip(causes[-2::-1], causes[:0:-1], strict=True):
        outer.cause.CopyFrom(inner)
    return event("workflow_execution_failed", failure=causes[0])


def application(kind: str, message: str = "", *details: Any) -> Failure:
    failure = Failure(message=message)
    failure.application_failure_info.type = kind
    failure.application_failure_info.details.CopyFrom(payloads(*details))
    return failure


def handler_error() -> Failure:
    failure = Failure(message="handler error (BAD_REQUEST): the amount must be positive")
    failure.nexus_handler_failure_info.type = "BAD_REQUEST"
    failure.cause.CopyFrom(Failure(message="the amount must be positive"))
    return failure


def operation_error() -> Failure:
    failure = Failure(message="nexus operation completed unsuccessfully")
    failure.nexus_operation_execution_failure_info.SetInParent()
    return failure


@pytest.mark.parametrize(
    ("kind", "closing"),
    [
        pytest.param(
            CallKind.DECLINED,
            failed(
                application("OrderNotPaid", "order 7 was not paid: card declined"),
                operation_error(),
                application("CardDeclined", "card declined", {"order_id": "7", "limit": 10_000}),
            ),
            id="declined",
        ),
        pytest.param(
            CallKind.REJECTED,
            failed(
                application("OrderNotPaid", "order 7 was not paid: rejected by the reviewer"),
                operation_error(),
                application("PaymentRejected", "rejected by the reviewer", "p-7"),
            ),
            id="rejected",
        ),
        pytest.param(CallKind.REFUSED, failed(operation_error(), handler_error()), id="refused"),
    ],
)
def test_a_failure_is_an_answer_of_its_own(kind: CallKind, closing: HistoryEvent) -> None:
    """The answer comes from the details that the target set. They name the order."""
    assert answer_of(closing) == Call(workflow_id="", order_id="7", kind=kind, at=0, own_s=0).answer


def test_the_slowest_recovery_shows_where_its_time_went() -> None:
    """The longest silences between events of both sides, and the harm meanwhile."""
    noon = 1_700_000_000
    harms = [HarmDone(name="kill_receiver", began=noon + 1, ended=noon + 2)] * 2
    harms += [HarmDone(name="restart_server", began=noon + 20, ended=noon + 22)]
    [slowest] = recoveries([CALL], callers=[calling()], handlers=[target()], harms=harms)
    assert (slowest.late_s, slowest.recovery_s) == (9, 7)
    assert "3.0 s from payment-prod workflow execution completed to order-prod activity task completed" in slowest.why
    assert slowest.why.endswith("(harm meanwhile: 2 kill_receiver)")
