"""What the close reporter notices: every way in which a worker closes a run, under any runner and beside any plugin."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, NexusOperationError
from temporalio.plugin import SimplePlugin
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.helpers import HANDLER
from tests.support.workflows import Ask, CallPlan, ProbeWorkflow, Reply
from tests.support.world import World, running_world

LONG = CallPlan(first_lease=600)


async def failure_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


# The SDK leaves a coroutine unawaited where a workflow fails in its init.
@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("cached", [1000, 0])
@pytest.mark.parametrize("behaviour", ["signal", "init", "unwritable"])
async def test_a_failure_outside_the_run_function_is_delivered_at_once(
    server: Server, behaviour: str, cached: int
) -> None:
    """In a signal handler, in `@workflow.init`, in the conversion of the result."""

    def prepare(world: World) -> None:
        world.worker_options = {"max_cached_workflows": cached, "workflow_failure_exception_types": [TypeError]}
        world.worker_options |= {} if cached else {"max_concurrent_workflow_task_polls": 1}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(key=world.key(), behaviour=behaviour)
        handle = await world.call(ask, dataclasses.replace(LONG, operation="breaking"))
        if behaviour == "signal":
            target = await world.until_started(ask)
            await target.signal("fail")
        failure = await failure_of(handle)
        assert isinstance(failure, ApplicationError)
        assert failure.type == ("TypeError" if behaviour == "unwritable" else "Broken")
        assert world.receiver.statuses == [200]


async def test_a_signal_handler_that_fails_after_the_function_returned_changes_nothing(world: World) -> None:
    """The run has closed with its result: no delivery keeps it open."""
    ask = Ask(key=world.key(), text="paid")
    handle = await world.call(ask, LONG)
    assert await handle.result() == Reply("paid")
    assert await world.target(ask).result() == {"text": "paid", "blob": ""}


def _replacing(runner: WorkflowRunner) -> SimplePlugin:
    return SimplePlugin("theirs", workflow_runner=runner)


def _restricting() -> SimplePlugin:
    def replace(runner: WorkflowRunner | None) -> WorkflowRunner:
        assert isinstance(runner, SandboxedWorkflowRunner)
        restrictions = runner.restrictions.with_passthrough_modules("tests.support.codec")
        return dataclasses.replace(runner, restrictions=restrictions)

    return SimplePlugin("theirs", workflow_runner=replace)


class OtherRunner(UnsandboxedWorkflowRunner):
    """A team's own."""


Plugins = Callable[[HandlerPlugin], list[Any]]


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(lambda ours: [ours, _restricting()], id="replaced restrictions after ours"),
        pytest.param(lambda ours: [_restricting(), ours], id="replaced restrictions before ours"),
        pytest.param(lambda ours: [_replacing(OtherRunner()), ours], id="own runner before ours"),
    ],
)
async def test_targets_are_delivered_beside_other_plugins(server: Server, plugins: Plugins) -> None:
    """Whatever runner ours finds, and whoever replaces restrictions."""
    async with running_world(server, without=("handler",)) as world:
        worker = Worker(
            world.handler_client,
            task_queue=world.payment_queue,
            workflows=[ProbeWorkflow],
            plugins=plugins(HandlerPlugin(world.handler_settings)),
        )
        async with worker:
            assert await (await world.call(Ask(key=world.key(), text="beside"), LONG)).result() == Reply("beside")


async def test_a_worker_whose_runner_was_replaced_refuses_to_start(world: World) -> None:
    """By name, and with the cure: nothing would be noticed there."""
    worker = Worker(
        world.handler_client,
        task_queue=f"replaced-{world.id}",
        workflows=[ProbeWorkflow],
        plugins=[HandlerPlugin(world.handler_settings), _replacing(SandboxedWorkflowRunner())],
    )
    with pytest.raises(RuntimeError, match=r"ProbeWorkflow .* Give HandlerPlugin after it"):
        await worker.run()


@pytest.mark.filterwarnings("ignore:The same plugin type")
async def test_a_plugin_on_client_and_worker_delivers_once(server: Server) -> None:
    """The second finds the worker configured."""
    async with running_world(server, without=("handler",)) as world:
        client = await Client.connect(
            server.address, namespace=HANDLER, plugins=[HandlerPlugin(world.handler_settings)]
        )
        worker = Worker(
            client,
            task_queue=world.payment_queue,
            workflows=[ProbeWorkflow],
            plugins=[HandlerPlugin(world.handler_settings)],
        )
        async with worker:
            assert await (await world.call(Ask(key=world.key(), text="once"), LONG)).result() == Reply("once")
        assert world.receiver.statuses == [200]


async def test_an_error_in_the_reporter_harms_no_run_and_no_shutdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception would fail the team's workflow task, or keep the worker from stopping."""

    def broken(*_: Any) -> None:
        message = "a bug of ours"
        raise KeyError(message)

    for name in ("_before", "_after"):
        monkeypatch.setattr(f"handler.delivery.close_reporter._WatchedRun.{name}", broken)
    ask = Ask(key=world.key(), text="unharmed")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    assert await handle.result() == Reply("unharmed")
    await asyncio.wait_for(world.stop_worker("handler"), 30)
