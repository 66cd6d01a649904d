"""A team replaces the client of a running worker, as when its certificate changes."""

from typing import Any

from temporalio.client import WorkflowHandle

from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import cause_of
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import Ask
from tests.support.world import running_world


async def test_a_replaced_client_is_used_from_then_on(server: Server) -> None:
    """Certificates change on a running worker: outcomes and cancels use the new client only."""
    async with running_world(server) as world:
        ask = Ask(world.key(), "cleanup")
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
        await world.until_attempt(handle, 2)
        old = world.caller_client
        world.workers["caller"].client = await type(old).connect(server.address, namespace=CALLER)
        for name in ("respond_activity_task_failed", "describe_workflow_execution", "record_activity_task_heartbeat"):
            setattr(old.workflow_service, name, _revoked)
        attempt = (await pending_by(world.workers["caller"].client, handle)).attempt

        async def renewed() -> None:
            now = await pending_by(world.workers["caller"].client, handle)
            assert now.attempt >= attempt + 2
            assert now.last_failure.application_failure_info.type == "bridge.StillRunning"

        await assert_eventually(renewed)
        await handle.cancel()
        await cause_of(handle)


async def pending_by(client: Any, handle: WorkflowHandle[Any, Any]) -> Any:
    described = await client.get_workflow_handle(handle.id).describe()
    return described.raw_description.pending_activities[0]


async def _revoked(*_: Any, **__: Any) -> Any:
    raise AssertionError("the old client was used")
