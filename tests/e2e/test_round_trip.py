"""One complete call: every hop uses a real server and real sockets."""

from typing import Any

import pytest
from temporalio.api.workflowservice.v1 import RecordActivityTaskHeartbeatRequest
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError, NexusOperationError

from bridge.protocol.payload import MAX_PAYLOAD_BYTES
from examples.payments.order import Order, OrderReceipt
from examples.payments.orders import OrderWorkflow
from tests.support.callers import CallPlan, NothingCaller
from tests.support.helpers import assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import EVENTS_OF_A_CALL, World, events


async def test_an_order_is_paid_by_a_workflow_in_the_other_namespace(world: World) -> None:
    """A call takes two HTTP requests and eleven events in the caller; both histories link to each other."""
    order_id = world.key()
    handle = await world.caller_client.start_workflow(
        OrderWorkflow.run, Order(order_id, 50), id=f"order-{order_id}", task_queue=world.order_queue
    )

    assert await handle.result() == OrderReceipt(order_id, f"p-{order_id}", "paid")

    target = world.handler_client.get_workflow_handle(f"payment-{order_id}")
    assert await target.result() == {"payment_id": f"p-{order_id}", "status": "paid"}
    assert world.service.statuses == [201]
    assert await world.receiver.answered() == [200]
    assert await events(handle) == EVENTS_OF_A_CALL
    described, called = await target.describe(), await handle.describe()
    history = (await handle.fetch_history()).events
    request_id = history[4].activity_task_scheduled_event_attributes.activity_id
    memo = (await described.memo())["bridge"]
    assert memo["caller_namespace"] == "order-prod"
    assert memo["caller_workflow_id"] == handle.id
    assert memo["caller_run_id"] == called.run_id
    assert memo["request_id"] == request_id
    identity = history[6].activity_task_completed_event_attributes.identity
    assert identity == f"payment-prod/payment-{order_id} bridge:{request_id}:{described.run_id}:succeeded"
    started = (await target.fetch_history()).events[0]
    assert started.links[0].workflow_event.workflow_id == handle.id


async def test_a_failure_arrives_with_type_details_and_the_whole_cause_chain(world: World) -> None:
    """The caller catches the target's exception inside native Nexus's error."""
    ask = Ask(key=world.key(), behaviour="fail")
    with pytest.raises(WorkflowFailureError) as raised:
        await (await world.call(ask)).result()

    operation = raised.value.cause
    assert isinstance(operation, NexusOperationError)
    assert operation.message == "nexus operation completed unsuccessfully"
    assert (operation.endpoint, operation.service, operation.operation) == ("payments", "ProbeService", "probe")
    outer = operation.cause
    assert isinstance(outer, ApplicationError)
    assert (outer.message, outer.type, outer.non_retryable) == ("the outer reason", "Outer", False)
    assert list(outer.details) == [{"key": ask.key}, "two"]
    inner = outer.cause
    assert isinstance(inner, ApplicationError)
    assert (inner.message, inner.type, inner.non_retryable, list(inner.details)) == (
        *("the inner reason", "Inner", True),
        [1],
    )
    assert await world.service.answered() + await world.receiver.answered() == [201, 200]


async def test_a_repeated_order_is_answered_with_the_outcome_and_not_run_again(world: World) -> None:
    """A closed run of the same workflow id and caller is never repeated, for any workflow of the caller."""
    ask = Ask(key=world.key(), text="once")
    first = await (await world.call(ask)).result()
    again = await (await world.call(ask)).result()

    assert first == again == Reply("once")
    assert world.service.statuses == [201, 200]
    assert await world.receiver.answered() == [200]


async def test_a_second_call_of_a_running_target_finds_its_outcome(world: World) -> None:
    """A running target is answered with 201, and the second call's renewals find the outcome."""
    ask = Ask(key=world.key(), behaviour="wait")
    plan = CallPlan(first_lease=1, renewal=1)
    first, second = await world.call(ask, plan), await world.call(ask, plan)
    await world.until_attempt(second, 2)
    await (await world.until_started(ask)).signal("say", "both")

    assert await first.result() == await second.result() == Reply("both")


async def test_no_input_and_no_result_cross(world: World) -> None:
    """With None as input and result, the messages have no content type and no body."""
    result = await world.caller_client.execute_workflow(
        NothingCaller.run, id=f"nothing-{world.id}", task_queue=world.order_queue
    )
    assert result == "None"


async def test_a_waiting_call_shows_its_target_and_its_last_failure(world: World) -> None:
    """The summary shows at once, the target's name after a second, the last failure between renewals."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=4, renewal=3600))
    await world.until_started(ask)

    async def target_is_shown() -> None:
        activity = await world.pending(handle)
        assert activity is not None
        assert activity.heartbeat_details.payloads, "no details yet"
        assert b"probe-" + ask.key.encode() in activity.heartbeat_details.payloads[0].data

    await assert_eventually(target_is_shown)
    await world.until_attempt(handle, 3, in_backoff=True)
    activity = await world.pending(handle)
    assert f"still running: payment-prod/probe-{ask.key}" in activity.last_failure.message
    await world.target(ask).signal("say", "done")
    assert await handle.result() == Reply("done")


async def test_only_a_waiting_call_records_its_target(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ends at once saves a request; a stopping worker records the targets of the waiting calls."""
    workflow_service = world.caller_client.workflow_service
    record = workflow_service.record_activity_task_heartbeat
    recorded: list[bytes] = []

    async def spy(request: RecordActivityTaskHeartbeatRequest, **options: Any) -> Any:
        recorded.append(request.details.payloads[0].data)
        return await record(request, **options)

    monkeypatch.setattr(workflow_service, "record_activity_task_heartbeat", spy)
    short, waiting = Ask(key=world.key("short"), text="done"), Ask(key=world.key("waiting"), behaviour="wait")
    handle = await world.call(waiting)
    await world.until_started(waiting)
    assert await (await world.call(short)).result() == Reply("done")
    await world.stop_worker("caller")

    assert [waiting.key.encode() in each for each in recorded] == [True]
    await world.start_worker("caller")
    await world.target(waiting).signal("say", "done")
    assert await handle.result() == Reply("done")


async def test_an_input_over_the_limit_fails_at_once_and_starts_nothing(world: World) -> None:
    """Temporal's limits allow an input that is too large for a payload over HTTP."""
    ask = Ask(key=world.key(), text="x" * (MAX_PAYLOAD_BYTES - 20))
    handle = await world.call(ask)
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()

    assert "over the limit" in str(raised.value.cause.__cause__)
    assert world.service.statuses == []
