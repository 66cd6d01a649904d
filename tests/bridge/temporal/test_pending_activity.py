"""How many attempts of a pending activity have begun, as a real server shows it."""

import asyncio
import uuid
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import PauseActivityRequest
from temporalio.client import Client
from temporalio.common import RetryPolicy
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from bridge.temporal.executions import describe_existing
from bridge.temporal.pending_activity import Attempts, attempts_of
from scripts.environment.server import Server
from tests.support.helpers import CALLER, assert_eventually


class Waiting:
    """An activity that runs until it is released, and then fails."""

    def __init__(self) -> None:
        self.is_released = asyncio.Event()

    @activity.defn(name="waiting")
    async def run(self) -> None:
        await self.is_released.wait()
        raise ApplicationError("released", next_retry_delay=timedelta(hours=1))


@workflow.defn(name="OneActivity")
class OneActivity:
    @workflow.run
    async def run(self, task_queue: str) -> None:
        policy = RetryPolicy(initial_interval=timedelta(hours=1))
        timeout = timedelta(minutes=5)
        await workflow.execute_activity(
            "waiting", task_queue=task_queue, start_to_close_timeout=timeout, retry_policy=policy
        )


async def test_an_attempt_counts_when_a_worker_has_begun_it(server: Server) -> None:
    """Neither one that waits for a worker or for its time, nor a paused one, has begun."""
    client, queue = await Client.connect(server.address, namespace=CALLER), f"waiting-{uuid.uuid4()}"
    waiting = Waiting()

    async def attempts() -> Attempts:
        [pending] = (await describe_existing(client, handle.id)).pending_activities
        return attempts_of(pending)

    async def until_begun(number: int, *, is_due: bool) -> None:
        async def begun() -> None:
            found = await attempts()
            assert (found.begun, found.next_try is not None) == (number, is_due)

        await assert_eventually(begun)

    async def pause() -> None:
        execution = WorkflowExecution(workflow_id=handle.id)
        await client.workflow_service.pause_activity(
            PauseActivityRequest(namespace=CALLER, execution=execution, type="waiting")
        )

    async with Worker(
        client, task_queue=f"{queue}-flow", workflows=[OneActivity], workflow_runner=UnsandboxedWorkflowRunner()
    ):
        handle = await client.start_workflow(OneActivity.run, queue, id=queue, task_queue=f"{queue}-flow")

        async def scheduled() -> None:
            assert (await describe_existing(client, handle.id)).pending_activities

        await assert_eventually(scheduled)
        assert await attempts() == Attempts(begun=0, next_try=None, last_failure=None)
        async with Worker(client, task_queue=queue, activities=[waiting.run]):
            await until_begun(1, is_due=False)
            await pause()
            assert (await attempts()).begun == 1
            waiting.is_released.set()

            async def ended() -> None:
                found = await attempts()
                assert found.last_failure is not None
                assert found.last_failure.message == "released"

            await assert_eventually(ended)
            assert (await attempts()).begun == 1
        await handle.terminate()
