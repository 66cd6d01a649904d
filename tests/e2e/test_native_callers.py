"""The owner of a native Nexus operation is set by the calling server, and no workflow can forge it."""

import pytest
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.enums.v1 import PendingNexusOperationState
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import NexusOperationError
from temporalio.worker import Worker

from scripts.environment.server import Server
from tests.support.helpers import CALLER, assert_eventually
from tests.support.native import NativeCaller, NativePlan
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

FORGED = {
    "Nexus-Link": f"<temporal:///namespaces/{CALLER}/workflows/order/0190a1b2-0000-7000-8000-000000000001/history"
    "?eventID=1&eventType=WorkflowExecutionStarted&referenceType=EventReference>"
    '; type="temporal.api.common.v1.Link.WorkflowEvent"'
}


@pytest.fixture(scope="session")
def server(own_server: Server) -> Server:
    """Its callback template is known. Before 1.31 the template names the calling namespace."""
    return own_server


def served_natively(world: World) -> None:
    world.handler_options = {"nexus": True}


@pytest.mark.parametrize("has_ended", [True, False])
async def test_a_forged_link_opens_no_other_namespaces_operation(server: Server, *, has_ended: bool) -> None:
    """The forger gets neither the outcome nor the token that could cancel the operation."""
    async with running_world(server, without=("service", "receiver"), prepare=served_natively) as world:
        await world.create_nexus_endpoint()
        ask = Ask(world.key(), "wait")
        owner = await world.call(ask, world.plan("nexus"))
        target = await world.until_started(ask)
        if has_ended:
            await target.signal("say", "to its owner")
            await owner.result()
        queue = f"forgers-{world.id}"
        async with Worker(world.handler_client, task_queue=queue, workflows=[NativeCaller]):
            plan = NativePlan(endpoint=world.nexus_endpoint, deadline=10, headers=FORGED)
            forger = await world.handler_client.start_workflow(
                NativeCaller.run, args=[ask, plan], id=f"forger-{ask.key}", task_queue=queue
            )
            with pytest.raises(WorkflowFailureError) as raised:
                await forger.result()
        error = raised.value.cause
        assert isinstance(error, NexusOperationError)
        assert isinstance(error.cause, HandlerError)
        assert error.cause.type is HandlerErrorType.BAD_REQUEST
        assert "taken" in str(error.cause)
        assert "NEXUS_OPERATION_STARTED" not in await events(forger)
        if not has_ended:
            await target.signal("say", "to its owner")
        assert await owner.result() == Reply("to its owner")


async def test_more_calls_than_the_server_delivers_to_still_end(server: Server) -> None:
    """The server of the tests delivers to 32 calls of a run. The others learn why they wait, and ask again."""
    async with running_world(server, without=("service", "receiver"), prepare=served_natively) as world:
        await world.create_nexus_endpoint()
        ask = Ask(world.key(), "wait")
        # The operation lets other callers attach, because newer servers do not name the calling namespace.
        plan = world.plan("nexus", operation="shared")
        calls = [await world.call(ask, plan) for _ in range(34)]
        target = world.handler_client.get_workflow_handle(f"shared-{ask.key}")

        async def the_others_wait() -> None:
            pending = [
                operation
                for each in calls
                for operation in (await each.describe()).raw_description.pending_nexus_operations
            ]
            started = PendingNexusOperationState.PENDING_NEXUS_OPERATION_STATE_STARTED
            refusals = [each.last_attempt_failure for each in pending if each.state != started]
            assert len(pending) - len(refusals) == 32
            assert ["no further call may wait for the run" in str(each) for each in refusals] == [True, True]

        await assert_eventually(the_others_wait, within=60)
        await target.signal("say", "to all")
        for each in calls:
            assert await each.result() == Reply("to all")
