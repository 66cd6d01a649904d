"""Workers without the plugin of their side, and task queues without workers: the log says so, with a remedy."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from temporalio import activity
from temporalio.client import Client
from temporalio.worker import Replayer, Worker

from bridge.runtime.settings import SettingsError
from bridge.temporal.pollers import check_workers, workers_seen
from bridge.workflow.targets import Targets
from caller.plugin import CallerPlugin
from caller.reports.calls import Calls
from handler.task_queues import task_queues
from scripts.environment.server import Server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import TARGETS, Ask, ProbeWorkflow, Reply
from tests.support.world import World, running_world


@activity.defn
async def something_else() -> None:
    """An activity of the team, so that the worker polls for activities too."""


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if "bridge.no_caller_plugin" in each.getMessage()]


@pytest.mark.parametrize("activities", [[something_else], []], ids=["with activities", "without activities"])
async def test_a_callers_worker_without_the_plugin_is_named_by_its_workflows(
    server: Server, caplog: pytest.LogCaptureFixture, activities: Sequence[Any]
) -> None:
    """One warning for each run names the plugin and the task queue. A worker with the plugin then ends the call."""
    async with running_world(server, without=("caller",)) as world:
        plain = Worker(
            world.caller_client, task_queue=world.order_queue, workflows=[CallingWorkflow], activities=activities
        )
        with caplog.at_level(logging.WARNING, logger="temporalio.workflow"):
            async with plain:
                handle = await world.call(Ask(world.key(), "return", "paid"))

                async def warned() -> None:
                    assert len(warnings(caplog)) == 1

                await assert_eventually(warned)
                [warning] = warnings(caplog)
                assert f"polls task queue {world.order_queue}: Worker(..., plugins=[CallerPlugin()])" in warning
            await world.start_worker("caller")
            assert await handle.result() == Reply("paid")
            caplog.clear()
            await Replayer(workflows=[CallingWorkflow]).replay_workflow(await handle.fetch_history())
            assert warnings(caplog) == []


async def test_a_call_that_no_worker_has_taken_shows_no_attempt(server: Server) -> None:
    """Temporal counts an attempt when it is scheduled, and the report when it begins."""
    async with running_world(server, without=("caller",)) as world:
        async with Worker(world.caller_client, task_queue=world.order_queue, workflows=[CallingWorkflow]):
            handle = await world.call(Ask(world.key(), "return", "paid"))

            async def scheduled() -> None:
                reports = await Calls(client=world.caller_client, settings=None).of_run(handle.id)
                assert [(each.state, each.attempts, each.next_try) for each in reports] == [("waiting", 0, None)]

            await assert_eventually(scheduled)
        await handle.terminate()


async def test_a_worker_with_the_plugin_is_not_warned_about(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Its workflows find the plugin."""
    with caplog.at_level(logging.WARNING, logger="temporalio.workflow"):
        assert await (await world.call(Ask(world.key(), "return", "paid"), CallPlan())).result() == Reply("paid")
    assert warnings(caplog) == []


async def checked(world: World, caplog: pytest.LogCaptureFixture, client: Client | None = None) -> list[str]:
    """The log lines of the check at the service's start, which may be in another namespace."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="bridge.temporal.pollers"):
        queues = task_queues(Targets(world.targets), world.handler_settings)
        await check_workers(client or world.handler_client, queues, after_s=0)
    return [each.getMessage() for each in caplog.records if each.name == "bridge.temporal.pollers"]


async def test_the_service_logs_at_its_start_which_task_queue_has_no_worker(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """No worker, a worker without the plugin, a service in the wrong namespace, and a worker with the plugin."""
    async with running_world(server, without=("caller", "handler", "service", "receiver")) as world:
        world.targets = [ProbeWorkflow]
        queue = world.payment_queue
        missing = "bridge.workers_not_ready: no worker polls task queue {} in namespace {}: start one, or correct"
        [line] = await checked(world, caplog)
        assert line.startswith(missing.format(queue, HANDLER))
        async with Worker(world.handler_client, task_queue=queue, workflows=TARGETS, identity="7@host"):

            async def without() -> None:
                [line] = await checked(world, caplog)
                assert line.startswith(
                    f"bridge.workers_not_ready: a worker of task queue {queue} has no HandlerPlugin: 7@"
                )
                assert line.endswith("7@host; add it: Worker(..., plugins=[HandlerPlugin()])")

            await assert_eventually(without)
            # Workers in other languages need no plugin: the sweep delivers for them.
            assert (await workers_seen(world.handler_client, queue, None))[0] is None
        world.payment_queue = f"{queue}-2"
        await world.start_worker("handler")

        async def ready() -> None:
            assert await checked(world, caplog) == [
                f"bridge.workers_ready: workers poll task queue {world.payment_queue}"
            ]

        await assert_eventually(ready)
        [line] = await checked(world, caplog, world.caller_client)
        assert line.startswith(missing.format(world.payment_queue, CALLER))


async def test_workers_that_run_no_activities_are_named(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workflows and activities of a task queue may have workers of their own. Calls wait for the latter."""
    monkeypatch.setattr("bridge.temporal.pollers.check_workers.__kwdefaults__", {"after_s": 0.5})
    async with running_world(server, without=("caller", "handler", "service")) as world:
        plugin, queue = CallerPlugin(world.caller_settings), world.order_queue
        options: dict[str, Any] = {"task_queue": queue, "workflows": [CallingWorkflow], "plugins": [plugin]}
        with caplog.at_level(logging.WARNING, logger="bridge.temporal.pollers"):
            async with Worker(world.caller_client, no_remote_activities=True, **options):

                async def named() -> None:
                    problem = (await workers_seen(world.caller_client, queue, "CallerPlugin"))[0]
                    assert f"no worker of task queue {queue} runs activities, which CallerPlugin needs" in str(problem)

                async def warned() -> None:
                    # The check may come before the worker's first poll. Its line then has another text.
                    assert f"task queue {queue}" in caplog.text

                await assert_eventually(named)
                await assert_eventually(warned)
        async with Worker(world.caller_client, task_queue=queue, activities=[something_else], identity="8@host"):

            async def without() -> None:
                problem = (await workers_seen(world.caller_client, queue, "CallerPlugin"))[0]
                assert f"a worker of task queue {queue} has no CallerPlugin: 8@host" in str(problem)

            await assert_eventually(without)


async def test_a_worker_whose_client_has_the_plugin_too_is_configured_once(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK gives the client's plugins to the worker. Two activities of one name would be refused."""
    monkeypatch.setattr("bridge.temporal.pollers.check_workers.__kwdefaults__", {"after_s": 0.5})
    async with running_world(server, without=("caller",)) as world:
        plugin, another = (CallerPlugin(world.caller_settings) for _ in range(2))
        serving = CallerPlugin(world.caller_settings, serve_receiver=True)
        client = await Client.connect(server.address, namespace=CALLER, plugins=[plugin])
        # On a busy machine the check may come before the worker's first poll. Its line then has another text.
        line = f"task queue {world.order_queue}"
        options: dict[str, Any] = {"task_queue": world.order_queue, "workflows": [CallingWorkflow]}

        def make(again: CallerPlugin) -> Worker:
            with pytest.warns(UserWarning, match="present from both client and worker"):
                return Worker(client, **options, plugins=[again])

        with pytest.raises(SettingsError, match="the worker's client has another CallerPlugin"):
            make(serving)
        for each in (plugin, another):
            caplog.clear()
            with caplog.at_level(logging.INFO, logger="bridge.temporal.pollers"):
                async with make(each):
                    assert await (await world.call(Ask(world.key(), "return", "paid"))).result() == Reply("paid")

                    async def checked() -> None:
                        assert line in caplog.text

                    await assert_eventually(checked)
            assert caplog.text.count(line) == 1


async def test_a_worker_with_an_identity_of_its_own_keeps_it(world: World) -> None:
    """The plugin adds its name once, also if the client has the plugin too."""
    for side in ("caller", "handler"):
        name = "bridge.CallerPlugin" if side == "caller" else "bridge.HandlerPlugin"
        identity = world.workers[side].config(active_config=True)["identity"]
        assert identity is not None
        assert identity.endswith(f" {name}")
        assert identity.count(name) == 1
