"""The close reporter notices every way in which a worker closes a run, under any runner and with any plugin."""

import asyncio
import dataclasses
import gc
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from temporalio import workflow
from temporalio.bridge.proto.workflow_activation import WorkflowActivation
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.plugin import SimplePlugin
from temporalio.worker import UnsandboxedWorkflowRunner, Worker, WorkflowInstanceDetails, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.runtime.settings import SettingsError
from handler.delivery.close_reporter import CloseReporter, ClosingRun
from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import failure_of
from tests.support.helpers import HANDLER
from tests.support.targets import Ask, ProbeWorkflow, Reply
from tests.support.world import World, running_world

LONG = CallPlan(first_lease=600)


@pytest.mark.parametrize("cached", [1000, 0])
@pytest.mark.parametrize("behaviour", ["signal", "init", "unwritable"])
async def test_a_failure_outside_the_run_function_is_delivered_at_once(
    server: Server, behaviour: str, cached: int
) -> None:
    """The failure is in a signal handler, in `@workflow.init`, or in the conversion of the result."""

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
        assert await world.receiver.answered() == [200]
    gc.collect()


async def test_a_signal_handler_that_fails_after_the_function_returned_changes_nothing(world: World) -> None:
    """The run has closed with its result, because no delivery keeps it open."""
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
    """A team's own runner."""


Plugins = Callable[[HandlerPlugin], list[Any]]


@pytest.mark.parametrize(
    "plugins",
    [
        pytest.param(lambda ours: [ours, _restricting()], id="replaced restrictions after ours"),
        pytest.param(lambda ours: [_restricting(), ours], id="replaced restrictions before ours"),
        pytest.param(lambda ours: [_replacing(OtherRunner()), ours], id="own runner before ours"),
    ],
)
async def test_targets_are_delivered_with_other_plugins(server: Server, plugins: Plugins) -> None:
    """The other plugins set a runner or replace the sandbox's restrictions."""
    async with running_world(server, without=("handler",)) as world:
        worker = Worker(
            world.handler_client,
            task_queue=world.payment_queue,
            workflows=[ProbeWorkflow],
            plugins=plugins(HandlerPlugin(world.handler_settings)),
        )
        async with worker:
            assert await (await world.call(Ask(key=world.key(), text="other"), LONG)).result() == Reply("other")


async def test_a_worker_whose_runner_was_replaced_refuses_to_start(world: World) -> None:
    """The error names the workflow and the cure, because no closing would be noticed on that worker."""
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
    """The second instance finds the worker configured."""
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
        assert await world.receiver.answered() == [200]


@pytest.mark.filterwarnings("ignore:The same plugin type")
@pytest.mark.parametrize("option", ["on_undelivered", "authorize"])
async def test_a_function_that_a_second_plugin_would_never_call_is_refused(world: World, option: str) -> None:
    """The plugin on the client has configured the worker already."""

    def function(*_: object) -> None: ...

    client = await Client.connect(
        world.server.address, namespace=HANDLER, plugins=[HandlerPlugin(world.handler_settings)]
    )
    options: dict[str, Any] = {option: function}
    second = HandlerPlugin(world.handler_settings, **options)
    with pytest.raises(SettingsError, match="give on_undelivered and authorize to that one"):
        Worker(client, task_queue=f"twice-{world.id}", workflows=[ProbeWorkflow], plugins=[second])
    # One plugin in both places is one configuration.
    client = await Client.connect(world.server.address, namespace=HANDLER, plugins=[second])
    Worker(client, task_queue=f"twice-{world.id}", workflows=[ProbeWorkflow], plugins=[second])


async def test_an_error_in_the_reporter_harms_no_run_and_no_shutdown(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reporter catches it. An exception would fail the team's workflow task or keep the worker from stopping."""

    def broken(*_: Any) -> None:
        message = "a bug of ours"
        raise KeyError(message)

    for name in ("_before", "_after"):
        monkeypatch.setattr(f"handler.delivery.close_reporter._WatchedRun.{name}", broken)
    ask = Ask(key=world.key(), text="unharmed")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    assert await handle.result() == Reply("unharmed")
    await asyncio.wait_for(world.stop_worker("handler"), 30)


def activation(*, is_replay: bool = False, evicted: int | None = None) -> WorkflowActivation:
    act = WorkflowActivation(run_id="run", is_replaying=is_replay)
    if evicted is not None:
        act.jobs.add().remove_from_cache.reason = evicted  # type: ignore[assignment] # the enum's numbers
    return act


CLOSE, WAIT, CONTINUE, REPLAY = "close", "wait", "continue", "replay"
"""Steps of a run: the commands of a completion, or the number of an eviction's reason."""


@pytest.mark.parametrize(
    ("steps", "reports"),
    [
        pytest.param([CLOSE, 10], 1, id="accepted"),
        pytest.param([CLOSE, 1], 1, id="accepted or not, cache full"),
        pytest.param([CLOSE, 6], 1, id="answer lost"),
        pytest.param([CLOSE, 8], 1, id="any other error of the report"),
        pytest.param([CLOSE, 7], 0, id="refused because of new events"),
        pytest.param([CLOSE, 4], 0, id="our completion was a failure"),
        pytest.param([CLOSE, 10, 10, 10], 1, id="an eviction that is repeated"),
        pytest.param([CLOSE, "overdue", 10], 2, id="accepted late"),
        pytest.param([CLOSE, "overdue", 6], 2, id="answer lost, and late"),
        pytest.param([CLOSE, "overdue", 7], 1, id="refused late"),
        pytest.param([CLOSE, "overdue", "overdue"], 1, id="no eviction"),
        pytest.param([CLOSE, WAIT, 1], 0, id="went on"),
        pytest.param([WAIT, 10], 1, id="closed outside an activation"),
        pytest.param([WAIT, 1], 0, id="cache full while it waits"),
        pytest.param([CONTINUE, 10], 0, id="continued as new"),
        pytest.param([REPLAY, 10], 0, id="a query of a closed run"),
        pytest.param([WAIT, 3], 0, id="history disagrees"),
    ],
)
@pytest.mark.parametrize("fails_on_nondeterminism", [False, True])
def test_a_run_is_reported_if_the_server_may_have_accepted_its_closing(
    steps: list[str | int], reports: int, fails_on_nondeterminism: bool
) -> None:
    """The rule reads only completions and evictions of the run. The close event decides what happened."""
    reported: list[ClosingRun] = []
    reporter = CloseReporter(reported.append)
    completion = WorkflowActivationCompletion()

    class Inner(WorkflowRunner):
        def prepare_workflow(self, defn: Any) -> None: ...

        def create_instance(self, det: WorkflowInstanceDetails) -> Any:
            return SimpleNamespace(activate=lambda _: completion)

    info = SimpleNamespace(
        run_id="run",
        first_execution_run_id="run",
        workflow_id="target",
        headers={},
        raw_memo={},
        workflow_start_time=datetime.now(UTC),
    )
    types = (workflow.NondeterminismError,) if fails_on_nondeterminism else ()
    defn = workflow._Definition.must_from_class(ProbeWorkflow)
    det: Any = SimpleNamespace(info=info, defn=defn, worker_level_failure_exception_types=types)
    runner = reporter.around(Inner())
    runner.prepare_workflow(defn)
    instance = runner.create_instance(det)
    for step in steps:
        completion.Clear()
        if step == "overdue":
            reporter.report_overdue(older_than_s=0)
            continue
        command = completion.successful.commands.add()
        if step in {CLOSE, REPLAY}:
            command.complete_workflow_execution.SetInParent()
        elif step == CONTINUE:
            command.continue_as_new_workflow_execution.SetInParent()
        else:
            command.start_timer.SetInParent()
        instance.activate(activation(is_replay=step == REPLAY, evicted=step if isinstance(step, int) else None))
    expected = 1 if steps == [WAIT, 3] and fails_on_nondeterminism else reports
    assert len(reported) == expected
