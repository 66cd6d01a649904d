"""The sweep delivers, once, every outcome that no worker delivers. Other runs cost no read."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from aiohttp import web
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest, StartWorkflowExecutionRequest
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.exceptions import (
    ApplicationError,
    CancelledError,
    TerminatedError,
    TimeoutError,  # noqa: A004 - Temporal's class
    TimeoutType,
)
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

import handler.sweep.activity
import handler.sweep.place
import handler.sweep.workflow
from bridge.errors import UnavailableError
from bridge.security.signatures import MessageSigner
from handler.delivery.close_event import read_run
from handler.reports.deliveries import UNDELIVERED, Deliveries
from handler.sweep.activity import SweepActivities
from handler.sweep.place import SweepPlace
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.calling_workflows import failure_of
from tests.support.codec import Scrambler, Tagged
from tests.support.helpers import assert_eventually
from tests.support.peer import send, start
from tests.support.sweeps import (
    FLAKY,
    FOREIGN,
    LONG,
    assert_delivered_once,
    deliveries,
    end_sweep,
    hasten,
    place,
    set_interval,
    swept_on,
    terminated,
)
from tests.support.targets import (
    Ask,
    ForeignWorkflow,
    ProbeWorkflow,
    Reply,
)
from tests.support.world import World, events, running_world, with_codec


async def test_a_terminated_target_is_delivered_without_reason_and_who(swept: World) -> None:
    """None of its code runs any more. The sweep delivers the close event, without the operator's own words."""
    ask = Ask(key=swept.key(), behaviour="wait")
    failure = await failure_of(await terminated(swept, ask))
    assert isinstance(failure, TerminatedError)
    assert failure.message == "operation terminated"
    await assert_delivered_once(swept, ask)


@pytest.mark.parametrize("field", ["workflow_run_timeout", "workflow_execution_timeout"])
async def test_a_target_out_of_time_is_delivered(swept: World, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The timeout is the workflow's own, of the run or of the execution, and not the caller's."""
    service = swept.handler_client.workflow_service
    start = service.start_workflow_execution

    async def with_timeout(request: StartWorkflowExecutionRequest, **options: Any) -> Any:
        if request.workflow_type.name == "ProbeWorkflow":
            getattr(request, field).FromSeconds(1)
        return await start(request, **options)

    monkeypatch.setattr(service, "start_workflow_execution", with_timeout)
    ask = Ask(key=swept.key(), behaviour="wait")
    failure = await failure_of(await swept.call(ask, LONG))
    assert isinstance(failure, TimeoutError)
    assert failure.type is TimeoutType.START_TO_CLOSE
    assert failure.message == "operation exceeded internal timeout"
    await assert_delivered_once(swept, ask)


async def test_a_retried_target_that_is_terminated_is_delivered(swept: World) -> None:
    """A retry policy does not restart a terminated workflow."""
    ask = Ask(key=swept.key(), behaviour="wait")
    assert isinstance(await failure_of(await terminated(swept, ask, FLAKY)), TerminatedError)
    await assert_delivered_once(swept, ask)


async def end_foreign(world: World, ask: Ask) -> WorkflowHandle[Any, Any]:
    """Call the operation whose worker has no plugin, and let it end."""
    async with Worker(world.handler_client, task_queue=f"foreign-{world.id}", workflows=[ForeignWorkflow]):
        handle = await world.call(ask, FOREIGN)
        target = await world.until_started(ask)
        if ask.behaviour == "wait":
            await target.cancel()
        with_failure = ask.behaviour in {"wait", "fail"}
        if with_failure:
            with pytest.raises(WorkflowFailureError):
                await target.result()
        else:
            await target.result()
    return handle


def assert_declined(failure: BaseException | None) -> None:
    assert isinstance(failure, ApplicationError)
    assert (failure.type, failure.message, failure.details) == ("Declined", "card declined", ({"code": 51},))


async def test_the_success_of_a_worker_without_the_interceptor_is_delivered(swept: World) -> None:
    """No code on that worker could deliver it."""
    ask = Ask(key=swept.key(), text="from afar")
    assert await (await end_foreign(swept, ask)).result() == Reply("from afar")
    await assert_delivered_once(swept, ask)


async def test_the_failure_of_a_worker_without_the_interceptor_is_delivered_whole(swept: World) -> None:
    """Type, message and details arrive."""
    ask = Ask(key=swept.key(), behaviour="fail")
    assert_declined(await failure_of(await end_foreign(swept, ask)))
    await assert_delivered_once(swept, ask)


async def test_the_cancellation_of_a_worker_without_the_interceptor_is_delivered(swept: World) -> None:
    """The caller gets a cancellation."""
    ask = Ask(key=swept.key(), behaviour="wait")
    assert isinstance(await failure_of(await end_foreign(swept, ask)), CancelledError)
    await assert_delivered_once(swept, ask)


async def test_an_outcome_too_large_to_complete_an_activity_is_delivered_as_a_failure(swept: World) -> None:
    """A result may have 2 MiB. The caller's server would accept so large a completion and then drop it."""
    failure = await failure_of(await end_foreign(swept, Ask(key=swept.key(), size=2 * 1024 * 1024 - 600)))
    assert isinstance(failure, ApplicationError)
    assert failure.type == "OutcomeTooLarge"


async def test_outcomes_are_delivered_through_a_codec(server: Server) -> None:
    """The payload on the wire is encoded once, although history has it encoded already."""
    converters = (with_codec(Scrambler()), with_codec(Scrambler()))
    async with running_world(server, prepare=hasten, converters=converters) as world:
        await world.start_sweep()
        ask = Ask(key=world.key(), text="scrambled")
        assert await (await end_foreign(world, ask)).result() == Reply("scrambled")
        assert_declined(await failure_of(await end_foreign(world, Ask(key=world.key(), behaviour="fail"))))
        terminating = await terminated(world, Ask(key=world.key(), behaviour="wait"))
        assert isinstance(await failure_of(terminating), TerminatedError)
        # First another plan, which is read through the codec, then the same plan again.
        set_interval(world, 0.3)
        await world.start_sweep()
        await world.start_sweep()
        await swept_on(world)
        assert await world.receiver.answered() == [200] * 3
        assert world.service.statuses == [201] * 3
        await end_sweep(world)


async def test_a_converter_that_returns_objects_without_a_type_hint_stops_no_sweep(server: Server) -> None:
    """The sweep reads its place again, and the list of deliveries shows the delivery that goes on."""

    async def unavailable(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    converters = (DataConverter.default, DataConverter(payload_converter_class=Tagged))
    async with running_world(server, converters=converters, prepare=hasten) as world:
        await world.start_sweep()
        world.receiver.before = unavailable
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(first_lease=600, deadline=30))
        target = await world.until_started(ask)
        await swept_on(world)
        await target.terminate()

        async def listed() -> None:
            found = await Deliveries(client=world.handler_client).read_all(UNDELIVERED)
            assert target.id in [each.target_workflow_id for each in found]

        await assert_eventually(listed)
        world.receiver.before = None
        assert isinstance(await failure_of(handle), TerminatedError)
        await end_sweep(world)


async def test_the_place_survives_the_worker(swept: World, looks: list[str]) -> None:
    """Runs that closed meanwhile are delivered. Runs that were handled before are not read again."""
    first, second = (Ask(key=swept.key(), behaviour="wait") for _ in range(2))
    await failure_of(await terminated(swept, first))

    async def recorded() -> dict[str, Any]:
        found = await place(swept)
        assert looks[0] in found["handled"]
        return found

    before = await assert_eventually(recorded)
    handle = await swept.call(second, LONG)
    target = await swept.until_started(second)
    await swept.stop_worker("handler")
    await target.terminate(reason="no worker was running")
    await swept.start_worker("handler")
    failure = await failure_of(handle)
    assert isinstance(failure, TerminatedError)
    await swept_on(swept)
    after = await place(swept)
    assert after["until_ms"] > before["until_ms"]
    assert set(after["handled"]) == set(looks)
    assert len(looks) == 2
    assert await swept.receiver.answered() == [200, 200]


async def test_a_delivered_outcome_costs_the_sweep_nothing(swept: World, looks: list[str]) -> None:
    """Success, failure and cancellation of ordinary targets cause no read, delivery workflow or second request."""
    asks = [Ask(key=swept.key(), behaviour=behaviour) for behaviour in ("return", "fail", "cleanup")]
    for ask in asks:
        handle = await swept.call(ask, LONG)
        target = await swept.until_started(ask)
        if ask.behaviour == "cleanup":
            await target.cancel()
        if ask.behaviour == "return":
            await handle.result()
        else:
            await failure_of(handle)
    await swept_on(swept)
    assert (await swept.service.answered(), await swept.receiver.answered()) == ([201] * 3, [200] * 3)
    assert looks == []
    assert (await place(swept))["handled"] == {}
    for ask in asks:
        assert await deliveries(swept, ask) == []


async def test_a_reset_target_has_not_ended(swept: World, looks: list[str]) -> None:
    """A reset terminates the run that it replaces. The new run continues the call, and its outcome is delivered."""
    ask = Ask(key=swept.key(), behaviour="wait")
    handle = await swept.call(ask, LONG)
    target = await swept.until_started(ask)

    async def waiting() -> None:
        assert "WORKFLOW_TASK_COMPLETED" in await events(target)

    await assert_eventually(waiting)
    old = (await target.describe()).run_id
    await swept.handler_client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=swept.handler_client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=target.id, run_id=old),
            reason="mended",
            workflow_task_finish_event_id=4,
            request_id=swept.key(),
        )
    )

    async def handled() -> None:
        assert old in (await place(swept))["handled"]

    await assert_eventually(handled)
    await target.signal(ProbeWorkflow.say, "after the reset")
    assert await handle.result() == Reply("after the reset")
    assert (await swept.service.answered(), await swept.receiver.answered()) == ([201], [200])
    assert looks == []
    assert await deliveries(swept, ask) == []


async def test_runs_of_others_and_bad_memos_stop_no_delivery(swept: World, looks: list[str]) -> None:
    """The runs are one without a call, and one with another program's memo under the bridge's key."""
    for memo in ({}, {"bridge": 7}, {"bridge": {"caller": "half a call"}}):
        other = await swept.handler_client.start_workflow(
            ProbeWorkflow.run,
            Ask(key="other", behaviour="wait"),
            id=swept.key(),
            task_queue=swept.payment_queue,
            memo=memo,
        )
        await other.terminate()
    ask = Ask(key=swept.key(), behaviour="wait")
    assert isinstance(await failure_of(await terminated(swept, ask)), TerminatedError)
    await assert_delivered_once(swept, ask)
    assert len(looks) == 1


async def test_a_run_that_cannot_be_read_is_repeated_until_it_is_delivered(
    swept: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep delivers the others and moves on. It asks for that run also when the window has passed."""
    errors: dict[str, Exception] = {}

    async def unavailable_for_some(client: Any, workflow_id: str, run_id: str) -> Any:
        if workflow_id in errors:
            raise errors[workflow_id]
        return await read_run(client, workflow_id, run_id)

    monkeypatch.setattr(handler.sweep.activity, "read_run", unavailable_for_some)
    asks = [Ask(key=swept.key(), behaviour="wait") for _ in range(3)]
    errors[swept.target(asks[0]).id] = RPCError("unavailable", RPCStatusCode.UNAVAILABLE, b"")
    errors[swept.target(asks[1]).id] = UnavailableError("the codec's key is unavailable")
    first, second, third = [await terminated(swept, ask) for ask in asks]
    assert isinstance(await failure_of(third), TerminatedError)
    runs = {(await swept.target(ask).describe()).run_id for ask in asks[:2]}

    async def kept() -> None:
        assert set((await place(swept))["unread"]) == runs
        activity = await swept.pending(swept.sweep)
        assert activity.last_failure.message == "2 closed runs could not be read or delivered"

    await assert_eventually(kept)
    monkeypatch.setattr(handler.sweep.place, "WINDOW", timedelta(0))
    await swept_on(swept)
    found = await place(swept)
    assert found["until_ms"] > max(found["unread"].values())
    assert await swept.receiver.answered() == [200]
    errors.clear()
    assert isinstance(await failure_of(first), TerminatedError)
    assert isinstance(await failure_of(second), TerminatedError)

    async def all_delivered() -> None:
        assert (await place(swept))["unread"] == {}

    await assert_eventually(all_delivered)
    assert await swept.receiver.answered() == [200] * 3


async def test_all_pages_are_read(swept: World, looks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep handles any number of runs that closed since the last one."""
    monkeypatch.setattr(handler.sweep.activity, "_PAGE", 1)
    asks = [Ask(key=swept.key(), behaviour="wait") for _ in range(4)]
    handles = [await swept.call(ask, LONG) for ask in asks]
    targets = [await swept.until_started(ask) for ask in asks]
    await swept.stop_worker("handler")
    await asyncio.gather(*(target.terminate() for target in targets))
    await swept.start_worker("handler")
    failures = await asyncio.gather(*map(failure_of, handles))
    assert {type(failure) for failure in failures} == {TerminatedError}
    await swept_on(swept)
    assert await swept.receiver.answered() == [200] * 4
    assert len(looks) == 4


async def test_an_ordinary_ending_is_swept_for_callers_that_do_not_renew(server: Server) -> None:
    """The worker was killed between closing and request. The first call and an attached call get the outcome."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    async with running_world(server, without=("handler",), prepare=prepare) as world:
        got: list[tuple[str, bytes]] = []

        async def take(request: web.Request) -> web.StreamResponse:
            got.append((request.headers["Nexus-Operation-State"], await request.read()))
            return world.signed_response(request, 200)

        world.receiver.before = take
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="wait")
        for request_id in ("first", "second"):
            message = start(world, {"key": ask.key, "behaviour": "wait"}, request_id=f"{request_id}-{world.id}")
            if request_id == "first":
                # Only the settings say whether a caller renews.
                del message.headers["Bridge-Scheduled-Time"]
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        async with Worker(world.handler_client, task_queue=world.payment_queue, workflows=[ProbeWorkflow]):
            target = await world.until_started(ask)
            await target.signal("say", "swept")
            await target.result()
        assert got == []
        await world.start_worker("handler")

        async def delivered() -> None:
            assert [(state, b"swept" in body) for state, body in got] == [("succeeded", True)] * 2

        await assert_eventually(delivered)
        await swept_on(world)
        await delivered()
        await end_sweep(world)


async def test_many_runs_at_once_cost_one_heartbeat_and_few_repeats(
    swept: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place of many runs is large. When it can hold no more of them, the sweep waits until it needs them no more."""
    monkeypatch.setattr(handler.sweep.activity, "_PAGE", 1)
    monkeypatch.setattr(handler.sweep.place, "_MAX_REMEMBERED", 3)
    recorded: list[int] = []
    record = SweepActivities._record

    async def counting(sweep: SweepActivities, place: SweepPlace) -> None:
        if place.handled:
            recorded.append(len(place.handled))
        await record(sweep, place)

    monkeypatch.setattr(SweepActivities, "_record", counting)
    asks = [Ask(key=swept.key(), behaviour="wait") for _ in range(4)]
    handles = [await swept.call(ask, LONG) for ask in asks]
    targets = [await swept.until_started(ask) for ask in asks]
    await swept.stop_worker("handler")
    await asyncio.gather(*(target.terminate() for target in targets))

    async def visible() -> None:
        query = f"TaskQueue = '{swept.payment_queue}' AND ExecutionStatus = 'Terminated'"
        assert len([each async for each in swept.handler_client.list_workflows(query)]) == 4

    await assert_eventually(visible)
    await swept.start_worker("handler")
    await asyncio.gather(*map(failure_of, handles))

    async def waits() -> None:
        activity = await swept.pending(swept.sweep)
        assert activity.current_retry_interval.ToTimedelta() >= handler.sweep.place.WINDOW

    await assert_eventually(waits)
    assert recorded == [4]
    assert await swept.receiver.answered() == [200] * 4


async def test_the_sweep_repeats_no_delivery_of_its_own_process(server: Server) -> None:
    """The sweep considers every closed run, but a run that the dispatcher has delivered costs no read."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    async with running_world(server, prepare=prepare) as world:
        await world.start_sweep()
        assert await (await world.call(Ask(key=world.key(), text="once"), LONG)).result() == Reply("once")

        async def handled() -> None:
            assert (await place(world))["handled"]

        await assert_eventually(handled)
        assert await world.receiver.answered() == [200]
        await end_sweep(world)


@pytest.mark.part("load", short=True)
async def test_a_sweep_of_many_runs_is_not_stopped_by_its_own_worker(
    swept: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK stops an attempt if it hears of no heartbeat: the next one would begin minutes later."""
    read: list[str] = []

    async def slowly(client: Any, workflow_id: str, run_id: str) -> Any:
        read.append(run_id)
        await asyncio.sleep(1.2)
        return await read_run(client, workflow_id, run_id)

    monkeypatch.setattr(handler.sweep.activity, "_PAGE", 1)
    monkeypatch.setattr(handler.sweep.activity, "_RECORD_S", 0.1)
    monkeypatch.setattr(handler.sweep.activity, "read_run", slowly)
    monkeypatch.setattr(handler.sweep.workflow, "HEARTBEAT_TIMEOUT", timedelta(seconds=2))
    asks = [Ask(key=swept.key(), behaviour="wait") for _ in range(8)]
    handles = [await swept.call(ask, LONG) for ask in asks]
    targets = [await swept.until_started(ask) for ask in asks]
    await swept.stop_worker("handler")
    await asyncio.gather(*(target.terminate() for target in targets))
    set_interval(swept, 300)
    await swept.start_sweep()
    await swept.start_worker("handler")
    await asyncio.gather(*map(failure_of, handles))

    async def ended() -> None:
        activity = await swept.pending(swept.sweep)
        assert activity.state == 1, "an attempt runs"  # SCHEDULED
        assert activity.attempt == 2

    await assert_eventually(ended)
    assert len(read) == 8
