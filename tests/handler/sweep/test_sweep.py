"""The sweep delivers, once, every outcome that no worker delivers. Other runs cost no read."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest, StartWorkflowExecutionRequest
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.exceptions import (
    ApplicationError,
    CancelledError,
    NexusOperationError,
    TerminatedError,
    TimeoutError,  # noqa: A004 - Temporal's class
    TimeoutType,
)
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import Worker

import handler.sweep.activity
import handler.sweep.place
from bridge.errors import UnavailableError
from bridge.protocol.payload import encode_payload
from bridge.security.signatures import MessageSigner
from handler.delivery import close_reporter, dispatcher
from handler.delivery.close_event import read_run
from handler.reports.deliveries import UNDELIVERED, Deliveries
from handler.sweep.activity import SweepActivities
from handler.sweep.place import SweepPlace
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler, Tagged
from tests.support.helpers import CALLER, assert_eventually
from tests.support.peer import send, start
from tests.support.targets import (
    Ask,
    FlakyWorkflow,
    ForeignWorkflow,
    ProbeWorkflow,
    Reply,
    foreign_target,
)
from tests.support.world import World, events, running_world, with_codec

LONG = CallPlan(first_lease=600)
FLAKY = CallPlan(first_lease=600, operation="flaky")
FOREIGN = CallPlan(first_lease=600, operation="foreign")


def hasten(world: World) -> None:
    set_interval(world, 0.2)
    world.targets = [ProbeWorkflow, FlakyWorkflow, foreign_target(f"foreign-{world.id}")]


def set_interval(world: World, seconds: float) -> None:
    world.override_handler_settings(world.handler_settings.model_copy(update={"sweep_interval_s": seconds}))


async def end_sweep(world: World) -> None:
    """Stop the sweeps after the test, because a sweep runs for ever."""
    for each in world.sweeps:
        await each.terminate()


@pytest_asyncio.fixture(loop_scope="session", name="swept")
async def swept_world(server: Server) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(running_world(server, prepare=hasten))
        stack.push_async_callback(end_sweep, world)
        await world.start_sweep()
        yield world


@pytest.fixture(name="looks")
def counted_looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the ids of the runs that the sweep reads."""
    read: list[str] = []

    async def counting(client: Any, workflow_id: str, run_id: str) -> Any:
        read.append(run_id)
        return await read_run(client, workflow_id, run_id)

    monkeypatch.setattr(handler.sweep.activity, "read_run", counting)
    return read


async def failure_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


async def attempts(world: World) -> list[int]:
    found = [await world.pending(each) for each in world.sweeps]
    return [0 if activity is None else int(activity.attempt) for activity in found]


async def swept_on(world: World, times: int = 3) -> None:
    """Wait until every sweep has run a few more times."""
    before = await attempts(world)

    async def check() -> None:
        assert all(now >= then + times for now, then in zip(await attempts(world), before, strict=True))

    await assert_eventually(check)


async def place(world: World) -> dict[str, Any]:
    activity = await world.pending(world.sweep)
    assert activity is not None
    assert activity.heartbeat_details.payloads, "nothing recorded yet"
    [text] = await world.handler_client.data_converter.decode(activity.heartbeat_details.payloads, [str])
    found: dict[str, Any] = json.loads(text)
    return found


async def request_id(world: World, ask: Ask) -> str:
    described = await world.target(ask).describe()
    return str((await described.memo_value("bridge"))["request_id"])


async def deliveries(world: World, ask: Ask) -> list[str]:
    """Return the delivery workflows for all runs of the call."""
    prefix = f"bridge-delivery-{CALLER}:{await request_id(world, ask)}"
    query = f"WorkflowType = 'bridge.Delivery' AND WorkflowId STARTS_WITH '{prefix}'"
    return [each.id async for each in world.handler_client.list_workflows(query)]


async def assert_delivered_once(world: World, ask: Ask) -> None:
    """One request delivers the outcome, without a delivery workflow. The next sweeps do not repeat it."""
    await swept_on(world)
    assert (await world.service.answered(), await world.receiver.answered()) == ([201], [200])
    assert await deliveries(world, ask) == []


async def terminated(world: World, ask: Ask, plan: CallPlan = LONG) -> WorkflowHandle[Any, Any]:
    handle = await world.call(ask, plan)
    target = await world.until_started(ask)
    await target.terminate(reason="suspected fraud")
    return handle


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


async def runs_of_sweep(world: World) -> list[str]:
    query = f"WorkflowId = '{world.sweep.id}'"
    return [each.run_id async for each in world.handler_client.list_workflows(query)]


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


async def test_replicas_share_one_sweep(swept: World, looks: list[str]) -> None:
    """Any number of replicas may start it, at once or later. Its history stays at five events."""
    await asyncio.gather(*(swept.start_sweep() for _ in range(4)))
    ask = Ask(key=swept.key(), behaviour="wait")
    await failure_of(await terminated(swept, ask))
    await swept.start_sweep()
    await assert_delivered_once(swept, ask)
    assert len(await runs_of_sweep(swept)) == 1
    assert len(await events(swept.sweep)) == 5
    assert len(looks) == 1


async def test_replicas_that_start_together_make_one_sweep(server: Server) -> None:
    """Each replica finds no sweep, and all start the same one."""
    async with running_world(server, prepare=hasten) as world:
        await asyncio.gather(*(world.start_sweep() for _ in range(4)))
        await swept_on(world)
        assert len(await runs_of_sweep(world)) == 1
        await end_sweep(world)


async def test_a_sweep_with_another_plan_goes_on_where_the_old_one_was(swept: World, looks: list[str]) -> None:
    """The new sweep misses no outcome and repeats no delivery."""
    first = Ask(key=swept.key(), behaviour="wait")
    await failure_of(await terminated(swept, first))

    async def recorded() -> dict[str, Any]:
        found = await place(swept)
        assert looks[0] in found["handled"]
        return found

    old = await assert_eventually(recorded)
    await swept.stop_worker("handler")
    set_interval(swept, 0.3)
    await swept.start_sweep()
    plan = (await swept.sweep.fetch_history()).events[0].workflow_execution_started_event_attributes.input
    assert json.loads(plan.payloads[0].data)["since_ms"] >= old["until_ms"]
    await swept.start_worker("handler")
    await swept_on(swept)
    assert len(await runs_of_sweep(swept)) == 2
    # A new sweep does not know which runs the old one handled. The receiver recognises the repeat.
    assert await swept.receiver.answered() == [200, 200]


async def test_two_handlers_with_different_targets_on_one_queue_are_both_swept(server: Server) -> None:
    """This holds even if an old replica with fewer targets restarts during a deploy."""
    async with running_world(server, prepare=hasten) as world:
        new, old = world.targets, [FlakyWorkflow]
        for targets in (new, old):
            world.targets = list(targets)
            await world.start_sweep()
        ask, flaky = (Ask(key=world.key(), behaviour="wait") for _ in range(2))
        assert isinstance(await failure_of(await terminated(world, ask)), TerminatedError)
        assert isinstance(await failure_of(await terminated(world, flaky, FLAKY)), TerminatedError)
        world.targets = new
        await end_sweep(world)


async def test_a_handler_whose_callers_all_renew_takes_no_sweep_from_one_whose_callers_do_not(server: Server) -> None:
    """Two services with different callers serve the same targets. The last one that starts needs the sweep less."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.targets = [ProbeWorkflow]

    async with running_world(server, prepare=prepare) as world:
        for renews in (False, True):
            world.peer_options = {"renews": renews}
            await world.start_sweep()
        plan = (await world.sweep.fetch_history()).events[0].workflow_execution_started_event_attributes.input
        assert "Completed" in json.loads(plan.payloads[0].data)["query"]
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


async def test_the_sweep_delivers_to_the_attached_calls_that_the_worker_did_not_keep(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy of the service counts for itself, so that a run may have more calls than its worker keeps."""
    monkeypatch.setattr(close_reporter, "MAX_ATTACHED", 1)
    monkeypatch.setattr(dispatcher, "MAX_ATTACHED", 1)

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    async with running_world(server, without=("caller",), prepare=prepare) as world:
        got: list[str] = []

        async def take(request: web.Request) -> web.StreamResponse:
            got.append(request.path[-1])
            return world.signed_response(request, 200)

        world.receiver.before = take
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="wait")
        for number in range(4):
            message = start(world, {"key": ask.key, "behaviour": "wait"}, request_id=f"{number}-{world.id}")
            message.url = message.url.replace("c" * 22, "c" * 21 + str(number))
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        await (await world.until_started(ask)).signal("say", "done")

        async def delivered() -> None:
            assert set(got) == set("0123")

        await assert_eventually(delivered)
        await swept_on(world)
        assert sorted(got) == list("0123")
        await end_sweep(world)


class Failing(Scrambler):
    """Cannot decode what holds one of some texts."""

    def __init__(self) -> None:
        self.undecodable: set[bytes] = set()

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        decoded = await super().decode(payloads)
        if any(text in each.data for each in decoded for text in self.undecodable):
            message = "the key is unavailable"
            raise RuntimeError(message)
        return decoded


async def test_an_attached_call_that_the_codec_cannot_decode_is_kept_until_it_can(server: Server) -> None:
    """The codec decodes the memo of the run. The first call gets the outcome at once, the attached one later."""
    codec = Failing()

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.peer_options = {"renews": False}
        world.targets = [ProbeWorkflow]

    converters = (with_codec(codec), with_codec(codec))
    async with running_world(server, without=("caller",), converters=converters, prepare=prepare) as world:
        got: list[str] = []

        async def take(request: web.Request) -> web.StreamResponse:
            got.append(request.headers["Nexus-Operation-State"])
            return world.signed_response(request, 200)

        world.receiver.before = take
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="wait")
        [encoded] = await with_codec(codec).encode([ask])
        for request_id in ("first", "second"):
            message = start(world, {}, request_id=f"{request_id}-{world.id}")
            headers, message.body = encode_payload(encoded)
            message.headers.update(headers)
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        codec.undecodable.add(f"second-{world.id}".encode())
        target = await world.until_started(ask)
        run_id = (await target.describe()).run_id
        await target.terminate()

        async def kept() -> None:
            assert set((await place(world))["unread"]) == {run_id}

        await assert_eventually(kept)
        await swept_on(world)
        assert got == ["failed"]
        codec.undecodable.clear()

        async def delivered() -> None:
            assert got == ["failed"] * 2
            assert set((await place(world))["handled"]) == {run_id}

        await assert_eventually(delivered)
        await end_sweep(world)


async def test_an_attached_call_is_swept_through_a_codec_after_continue_as_new(server: Server) -> None:
    """By default the SDK encodes no headers, and a header carries the attached call to the next run."""

    def prepare(world: World) -> None:
        world.handler_options = {"sweep_interval_s": 0.2}
        world.targets = [ProbeWorkflow]

    converters = (with_codec(Scrambler()), with_codec(Scrambler()))
    async with running_world(server, converters=converters, prepare=prepare) as world:
        await world.start_sweep()
        ask = Ask(key=world.key(), behaviour="continue on signal")
        calls = [await world.call(ask, LONG) for _ in range(2)]
        target = await world.until_started(ask)

        async def attached() -> None:
            assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

        await assert_eventually(attached)
        await target.signal("say", "and wait")

        async def continued() -> None:
            assert (await events(target))[-1] == "WORKFLOW_TASK_COMPLETED"
            assert "WORKFLOW_EXECUTION_SIGNALED" not in await events(target)

        await assert_eventually(continued)
        await target.terminate()
        assert [type(await failure_of(each)) for each in calls] == [TerminatedError] * 2
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
