"""The real pair: a handler is tested without a caller, and both sides with lost, late and repeated messages."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Worker

from bridge.testing import Fault, Pair
from scripts.environment.server import Server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.services import Quotes, QuoteService
from tests.support.targets import Ask, ProbeService, ProbeWorkflow, Reply
from tests.support.world import RUNNER

BINARY = Path(sys.executable).with_name("temporal-test-server")


def served() -> ModuleType:
    module = ModuleType("served")
    vars(module).update(probe=ProbeWorkflow, quotes=Quotes())
    return module


def key() -> str:
    return uuid.uuid4().hex[:12]


@asynccontextmanager
async def running(
    handler_client: Client, *, caller_client: Client | None = None, plugin: bool = True
) -> AsyncIterator[Pair]:
    """The pair, and a worker of the targets."""
    queue = f"payments-{key()}"
    async with (
        Pair(served(), task_queue=queue, handler_client=handler_client, caller_client=caller_client) as pair,
        Worker(
            handler_client,
            task_queue=queue,
            workflows=[ProbeWorkflow],
            plugins=[pair.handler_plugin] if plugin else [],
            workflow_runner=RUNNER,
        ),
    ):
        yield pair


@pytest_asyncio.fixture(loop_scope="session")
async def handler_client(server: Server) -> Client:
    return await Client.connect(server.address, namespace=HANDLER)


async def error_of(pair: Pair, ask: Ask) -> BaseException | None:
    async with pair.client(service=ProbeService) as probes:
        with pytest.raises(NexusOperationError) as raised:
            await probes.execute_operation(ProbeService.probe, ask)
    return raised.value.__cause__


async def test_a_handler_is_tested_without_a_caller(handler_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without a plugin suffices. The settings of the environment are not read."""
    monkeypatch.setenv("BRIDGE_CONFIG", "/no/such/file")
    monkeypatch.setenv("BRIDGE_NAME", "another")
    async with running(handler_client, plugin=False) as pair:
        async with pair.client(service=ProbeService) as probes:
            ask = Ask(key=key(), text="hello")
            assert await probes.execute_operation(ProbeService.probe, ask) == Reply("hello")
            # The same workflow id: the second call gets the outcome of the same run.
            again = await probes.start_operation(ProbeService.probe, Ask(key=ask.key, text="other"))
            assert await again.result() == Reply("hello")
            described = await handler_client.get_workflow_handle(f"probe-{ask.key}").describe()
            assert "bridge" in described.raw_description.workflow_execution_info.memo.fields
            canceled = await probes.start_operation(ProbeService.probe, Ask(key=key(), behaviour="cleanup"))
            await canceled.cancel()
            with pytest.raises(NexusOperationError) as raised:
                await canceled.result()
            assert isinstance(raised.value.__cause__, CancelledError)
        async with pair.client(service=QuoteService) as quotes:
            assert await quotes.execute_operation(QuoteService.quote, Ask(key="q", text="12.5")) == Reply("12.5")
        failed = await error_of(pair, Ask(key=key(), behaviour="fail"))
        assert isinstance(failed, ApplicationError)
        assert failed.type == "Outer"
        refused = await error_of(pair, Ask(key=key(), behaviour="refused"))
        assert isinstance(refused, HandlerError)
        assert refused.type is HandlerErrorType.BAD_REQUEST


async def test_a_target_is_tested_with_time_skipping() -> None:
    """The test skips the time of the target, and the client then gets the outcome."""
    async with (
        await WorkflowEnvironment.start_time_skipping(test_server_existing_path=str(BINARY)) as environment,
        running(environment.client) as pair,
        pair.client(service=ProbeService) as probes,
    ):
        ask = Ask(key=key(), behaviour="slow cleanup")
        call = await probes.start_operation(ProbeService.probe, ask)
        await environment.sleep(timedelta(hours=2))
        assert await asyncio.wait_for(call.result(), 30) == Reply("end")


@pytest.mark.parametrize(
    ("side", "faults"),
    [
        pytest.param("receiver", ["lost"], id="callback lost"),
        pytest.param("receiver", ["answer lost"], id="callback repeated"),
        pytest.param("receiver", [timedelta(seconds=0.5)], id="callback late"),
        pytest.param("receiver", [503, 503], id="receiver behind a proxy that answers 503"),
        pytest.param("service", ["lost", 404, "answer lost"], id="start lost"),
    ],
)
async def test_a_call_survives_the_faults(server: Server, side: str, faults: list[Fault]) -> None:
    """Each fault happens, and the workflow gets its result once."""
    caller = await Client.connect(server.address, namespace=CALLER)
    handler = await Client.connect(server.address, namespace=HANDLER)
    async with running(handler, caller_client=caller) as pair:
        service = getattr(pair, side)
        service.faults = list(faults)
        ask = Ask(key=key(), text="once")
        assert await called(caller, pair, ask) == Reply("once")
        assert not service.faults


async def test_a_killed_receiver_comes_back(server: Server) -> None:
    """The delivery waits for it. No renewal is involved."""
    caller = await Client.connect(server.address, namespace=CALLER)
    handler = await Client.connect(server.address, namespace=HANDLER)
    async with running(handler, caller_client=caller) as pair:
        await pair.receiver.stop()
        ask = Ask(key=key(), text="late")
        calling = asyncio.create_task(called(caller, pair, ask))

        async def closed() -> None:
            runs = [each async for each in handler.list_workflows(f'WorkflowId = "probe-{ask.key}"')]
            assert [each.status for each in runs] == [WorkflowExecutionStatus.COMPLETED]

        await assert_eventually(closed)
        assert not calling.done()
        await pair.receiver.start()
        assert await calling == Reply("late")


async def called(client: Client, pair: Pair, ask: Ask) -> Any:
    """The result of a workflow that makes the call."""
    queue = f"orders-{key()}"
    async with Worker(
        client, task_queue=queue, workflows=[CallingWorkflow], plugins=[pair.caller_plugin], workflow_runner=RUNNER
    ):
        return await client.execute_workflow(
            CallingWorkflow.run, args=[ask, CallPlan(first_lease=600)], id=f"calling-{ask.key}", task_queue=queue
        )
