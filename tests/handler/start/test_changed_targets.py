"""Calls whose target goes on as another workflow, or whose operation leads elsewhere since a deployment."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import CancelledError
from temporalio.worker import Worker

from bridge.workflow.targets import Targets
from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import assert_eventually
from tests.support.peer import Answered, send, signer, start
from tests.support.targets import Ask, ProbeWorkflow, Reply, SuccessorWorkflow
from tests.support.world import RUNNER, World, running_world

LONG = CallPlan(first_lease=600)


async def ask_again(world: World, ask: Ask, name: str, token: str | None = None) -> Answered:
    """Send the start of the call *name*. With the *token* of an earlier answer it is a renewal."""
    message = start(world, vars(ask), request_id=world.key(name))
    if token is not None:
        message.headers["Nexus-Operation-Token"] = token
    return await send(message, signer(world))


def token_of(answer: Answered) -> str:
    assert answer.status == 201
    return str(json.loads(answer.body)["token"])


async def deploy(world: World, **changes: Any) -> None:
    """Start the service again with a changed target."""
    await world.service.stop()
    world.targets = [replace(each, **changes) for each in Targets([ProbeWorkflow])]
    await world.service.start()


def renamed(ask: Ask) -> str:
    return f"renamed-{ask.key}"


def broken(_: object) -> str:
    raise KeyError


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"workflow_id": renamed}, id="another id"),
        pytest.param({"workflow_id": broken}, id="no id"),
        pytest.param({"workflow_type": "ProbeWorkflowV2"}, id="another workflow"),
        pytest.param({"input_type": int}, id="another input"),
    ],
)
async def test_a_call_outlives_a_deployment_that_changes_its_target(server: Server, changes: dict[str, Any]) -> None:
    """The token of a renewal names the run, and the record of the run names the operation."""
    async with running_world(server, without=("caller", "receiver")) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        token = token_of(await ask_again(world, ask, "call"))
        await deploy(world, **changes)
        assert token_of(await ask_again(world, ask, "call", token)) == token
        await world.target(ask).signal("say", "paid")
        await world.target(ask).result()
        answer = await ask_again(world, ask, "call", token)
        assert (answer.status, json.loads(answer.body)["text"]) == (200, "paid")


async def test_a_renewal_gets_no_outcome_of_the_run_that_the_new_workflow_id_leads_to(server: Server) -> None:
    """After the deployment another call has started that run. A token gives no call the run of another call."""
    async with running_world(server, without=("caller", "receiver")) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        token = token_of(await ask_again(world, ask, "first"))
        await deploy(world, workflow_id=renamed)
        later = token_of(await ask_again(world, ask, "second"))
        other = world.handler_client.get_workflow_handle(renamed(ask))
        await other.signal("say", "of the second")
        await other.result()
        assert token_of(await ask_again(world, ask, "first", token)) == token
        answer = await ask_again(world, ask, "second", later)
        assert (answer.status, json.loads(answer.body)["text"]) == (200, "of the second")
        invented = await ask_again(world, ask, "third", token)
        assert (invented.status, json.loads(invented.body)["text"]) == (200, "of the second"), "as without the token"
        await world.target(ask).terminate()


@pytest_asyncio.fixture(loop_scope="session", name="succeeded")
async def world_with_a_successor(server: Server) -> AsyncIterator[World]:
    """A world whose targets may continue as a workflow that is no target."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(running_world(server, without=("handler",)))
        worker = Worker(
            world.handler_client,
            task_queue=world.payment_queue,
            workflows=[ProbeWorkflow, SuccessorWorkflow],
            plugins=[HandlerPlugin(world.handler_settings)],
            workflow_runner=RUNNER,
        )
        await stack.enter_async_context(worker)
        yield world


async def until_succeeded(world: World, ask: Ask) -> None:
    await world.until_started(ask)

    async def succeeded() -> None:
        assert (await world.target(ask).describe()).workflow_type == "SuccessorWorkflow"

    await assert_eventually(succeeded)


async def test_a_target_that_continues_as_another_workflow_is_the_same_operation(succeeded: World) -> None:
    """Renewals find it, and a further call attaches to it."""
    world = succeeded
    ask = Ask(key=world.key(), behaviour="continue as another")
    token = token_of(await ask_again(world, ask, "first"))
    await until_succeeded(world, ask)
    attached = token_of(await ask_again(world, ask, "second"))
    assert token_of(await ask_again(world, ask, "first", token)) == token
    assert token_of(await ask_again(world, ask, "second", attached)) == attached
    await world.target(ask).signal("say", "to both")
    await world.target(ask).result()
    answers = [await ask_again(world, ask, *each) for each in (("first", token), ("second", attached))]
    assert [(each.status, json.loads(each.body)["text"]) for each in answers] == [(200, "to both")] * 2


async def test_a_target_that_continues_as_another_workflow_is_delivered_without_a_renewal(succeeded: World) -> None:
    """The worker notices the close by the record of the call, which goes on with the run. An attached call gets it."""
    world = succeeded
    ask = Ask(key=world.key(), behaviour="continue as another")
    first = await world.call(ask, LONG)
    await until_succeeded(world, ask)
    second = await world.call(ask, LONG)

    async def attached() -> None:
        assert world.service.statuses == [201, 201]

    await assert_eventually(attached)
    await world.target(ask).signal("say", "delivered")
    assert await first.result() == await second.result() == Reply("delivered")
    assert await world.receiver.answered() == [200, 200]


async def test_a_target_that_continues_as_another_workflow_can_be_canceled(succeeded: World) -> None:
    """The token names the workflow id, and the record names the operation."""
    world = succeeded
    ask = Ask(key=world.key(), behaviour="continue as another")
    handle = await world.call(ask, LONG)
    await until_succeeded(world, ask)
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, CancelledError)
