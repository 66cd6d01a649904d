"""Repeated, foreign and old starts: one run for each call, and nothing about the runs of others."""

import json

import pytest

from tests.support.helpers import assert_eventually
from tests.support.peer import (
    Answered,
    Message,
    assert_nothing_started,
    send,
    signer,
    start,
)
from tests.support.targets import Ask
from tests.support.world import World


async def test_the_same_start_twice_is_one_run_with_one_token(quiet: World) -> None:
    """An equal repeat gets the same answer, by the request id alone."""
    key, request_id = quiet.key(), quiet.key("request")
    first = await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    second = await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    assert (first.status, second.status) == (201, 201)
    assert json.loads(first.body) == json.loads(second.body)
    assert first.headers["Nexus-Link"] == second.headers["Nexus-Link"]
    assert json.loads(first.body)["state"] == "running"


async def test_the_same_request_id_with_another_input_is_refused(quiet: World) -> None:
    """The status is 400, because Temporal's server 1.29 would retry a 409."""
    key, request_id = quiet.key(), quiet.key("request")
    await send(start(quiet, {"key": key}, request_id=request_id), signer(quiet))
    answer = await send(start(quiet, {"key": key, "text": "other"}, request_id=request_id), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    assert "another input" in answer.message


async def test_a_run_of_another_caller_is_neither_used_nor_revealed(quiet: World) -> None:
    """A run that no call started holds the workflow id."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "ProbeWorkflow", Ask(key=key), id=f"probe-{key}", task_queue=quiet.payment_queue
    )
    answer = await send(start(quiet, {"key": key}), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")
    assert answer.message == "the workflow id that this input leads to is taken"


async def test_a_start_older_than_retention_never_starts_a_run(quiet: World) -> None:
    """The earlier run may be past retention. The error says that the outcome is unknown, and has the bridge's mark."""
    key = quiet.key()
    message = start(quiet, {"key": key})
    message.headers["Bridge-Scheduled-Time"] = "2020-01-01T00:00:00Z"
    answer = await send(message, signer(quiet))
    assert answer.status == 404
    assert json.loads(answer.body)["metadata"]["bridge"] == "outcome-unknown"
    await assert_nothing_started(quiet, key)

    started = await send(start(quiet, {"key": key}, request_id="r"), signer(quiet))
    message = start(quiet, {"key": key}, request_id="r")
    message.headers["Bridge-Scheduled-Time"] = "2020-01-01T00:00:00Z"
    assert (await send(message, signer(quiet))).body == started.body


EVENT = "eventID=1&eventType=WorkflowExecutionStarted&referenceType=EventReference"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Workflow", "workflows/w/r"),
        ("NexusOperation", "nexus-operations/o/r/details"),
        ("NexusOperation", "nexus-operations/o//details"),
        ("Activity", "activities/a/r/details"),
        ("Callback", "workflows/w/r/callbacks/q"),
        ("WorkflowEvent", f"workflows/{'w' * 5000}/r/history?{EVENT}"),
        ("WorkflowEvent", "workflows/w/r/history?referenceType=EventReference"),
    ],
)
async def test_a_link_that_our_server_does_not_know_costs_no_start(quiet: World, kind: str, path: str) -> None:
    """Newer servers and SDKs link to more than workflows. No decision depends on a link."""
    message = start(quiet, {"key": quiet.key()})
    message.headers["Nexus-Link"] = f'<temporal:///namespaces/n/{path}>; type="temporal.api.common.v1.Link.{kind}"'
    assert (await send(message, signer(quiet))).status == 201


async def test_a_start_without_a_callback_runs_and_a_repeat_gets_its_outcome(world: World) -> None:
    """The callback is optional. A repeated start is answered with the outcome."""
    message = start(world, {"key": world.key(), "text": "asked for"}, request_id=world.id)
    message.url = message.url.partition("?")[0]
    assert (await send(message, signer(world))).status == 201

    async def ended() -> Answered:
        again = Message(message.url, message.headers.copy(), message.body)
        answer = await send(again, signer(world))
        assert answer.status == 200
        return answer

    answer = await assert_eventually(ended)
    assert json.loads(answer.body)["text"] == "asked for"
    assert answer.headers["Nexus-Operation-State"] == "succeeded"
    assert world.receiver.requests == []


async def test_another_operations_run_under_the_same_id_is_not_the_answer(quiet: World) -> None:
    """Two operations may lead to one workflow id, but a refund must not get the result of a payment."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "AnotherWorkflow", Ask(key=key), id=f"shared-{key}", task_queue=quiet.payment_queue
    )
    answer = await send(start(quiet, {"key": key}, operation="shared"), signer(quiet))
    assert (answer.status, answer.type) == (400, "BAD_REQUEST")


async def test_an_old_start_does_not_reveal_whether_a_run_holds_the_id(quiet: World) -> None:
    """The answer to a start that is too old to start a run must not reveal whether the id is held."""
    key = quiet.key()
    await quiet.handler_client.start_workflow(
        "ProbeWorkflow", Ask(key=key), id=f"probe-{key}", task_queue=quiet.payment_queue
    )
    answers = []
    for each in (key, quiet.key()):
        message = start(quiet, {"key": each})
        message.headers["Bridge-Scheduled-Time"] = "2001-01-01T00:00:00Z"
        answers.append(await send(message, signer(quiet)))
    assert (answers[0].status, answers[0].body) == (answers[1].status, answers[1].body)
    assert answers[0].status == 404
