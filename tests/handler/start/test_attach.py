"""Attach: many calls wait for one run. Each gets the outcome, and no call disturbs another."""

import asyncio
import json
import uuid
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import web
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import NexusOperationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.worker import Worker

from bridge.security.signatures import MessageSigner
from handler.delivery.records import ATTACHED_HEADER, milliseconds
from scripts.environment.server import Server, free_ports
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, assert_eventually, key_set
from tests.support.peer import Message, send, start
from tests.support.targets import Ask, ForeignWorkflow, Reply, foreign_target
from tests.support.world import Listener, World, clock, events, running_world

LONG = CallPlan(first_lease=600)


async def until_attached(world: World, ask: Ask, count: int) -> None:
    async def attached() -> None:
        assert (await events(world.target(ask))).count("WORKFLOW_EXECUTION_SIGNALED") == count

    await assert_eventually(attached, within=150)


async def test_two_calls_wait_for_one_run_and_both_get_its_outcome(world: World) -> None:
    """Both get it by callback, not by a renewal, because the lease is far longer than the test."""
    ask = Ask(key=world.key(), behaviour="wait")
    first = await world.call(ask, LONG)
    await world.until_started(ask)
    second = await world.call(ask, LONG)
    await until_attached(world, ask, 1)
    await world.target(ask).signal("say", "both")
    assert await first.result() == await second.result() == Reply("both")
    assert world.service.statuses == [201, 201]
    assert await world.receiver.answered() == [200, 200]


async def test_renewals_of_an_attached_call_leave_the_targets_history_as_it_is(world: World) -> None:
    """Renewals only read the run that holds the id."""
    ask = Ask(key=world.key(), behaviour="wait")
    await world.call(ask, LONG)
    target = await world.until_started(ask)
    second = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await until_attached(world, ask, 1)
    await world.until_attempt(second, 4)
    names = await events(target)
    assert names.count("WORKFLOW_EXECUTION_SIGNALED") == 1
    assert "WORKFLOW_EXECUTION_OPTIONS_UPDATED" not in names


@pytest.mark.part("load", short=True)
@pytest.mark.timeout(300)
async def test_two_hundred_calls_get_the_outcome_and_one_that_leaves_disturbs_no_other(world: World) -> None:
    """Each call has its own deadline. The delivery to the expired call delays no other delivery."""
    ask = Ask(key=world.key(), behaviour="wait")
    first = await world.call(ask, LONG)
    await world.until_started(ask)
    leaving = await world.call(ask, CallPlan(first_lease=600, deadline=5))
    await until_attached(world, ask, 1)
    others = await asyncio.gather(*(world.call(ask, LONG) for _ in range(198)))
    await until_attached(world, ask, 199)
    with pytest.raises(WorkflowFailureError) as raised:
        await leaving.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    assert isinstance(raised.value.cause.cause, TemporalTimeoutError)
    await world.target(ask).signal("say", "all")
    assert await asyncio.gather(*(each.result() for each in [first, *others])) == [Reply("all")] * 199


async def test_an_attached_call_is_carried_over_continue_as_new(world: World) -> None:
    """Each call gets the last run's outcome once."""
    ask = Ask(key=world.key(), behaviour="continue on signal")
    first = await world.call(ask, LONG)
    await world.until_started(ask)
    second = await world.call(ask, LONG)
    await until_attached(world, ask, 1)
    await world.target(ask).signal("say", "go")
    assert await first.result() == await second.result() == Reply("second run")
    assert await world.receiver.answered() == [200, 200]


async def test_a_call_that_renews_is_carried_once_over_many_runs(server: Server) -> None:
    """Its renewals send the attach signal to every run again. The header of a long chain must not grow by them."""
    async with running_world(server, without=("caller", "receiver")) as world:
        signer, key = MessageSigner(world.keys.start), world.key()
        target = world.handler_client.get_workflow_handle(f"minded-{key}")

        async def attach(name: str) -> None:
            message = start(world, {"key": key}, request_id=world.key(name), operation="minded")
            assert (await send(message, signer)).status == 201

        await attach("first")
        for _ in range(3):
            await attach("second")
            run_id = (await target.describe()).run_id
            await target.signal("say", "continue")

            async def continued(before: str = run_id) -> None:
                assert (await target.describe()).run_id != before

            await assert_eventually(continued)
        started = (await target.fetch_history()).events[0].workflow_execution_started_event_attributes
        assert [name for name in started.header.fields if name.startswith(ATTACHED_HEADER)] == [f"{ATTACHED_HEADER}0"]
        await target.terminate()


async def test_a_call_that_comes_while_another_is_delivered_gets_the_outcome_as_its_answer(world: World) -> None:
    """The target has closed by then, so that the call cannot attach."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_: web.Request) -> web.StreamResponse | None:
        reached.set()
        await go_on.wait()
        return None

    world.receiver.before = hold
    ask = Ask(key=world.key(), text="late comer")
    first = await world.call(ask, LONG)
    await asyncio.wait_for(reached.wait(), 20)
    second = await world.call(ask, LONG)
    assert await second.result() == Reply("late comer")
    go_on.set()
    assert await first.result() == Reply("late comer")
    assert world.service.statuses == [201, 200]


async def test_calls_around_the_close_are_never_lost(world: World) -> None:
    """A refused signal means that the run has closed, and its outcome is the answer. No call waits for its lease."""
    ask = Ask(key=world.key(), behaviour="wait")
    calls = [await world.call(ask, LONG)]
    await world.until_started(ask)
    ending = asyncio.create_task(world.target(ask).signal("say", "around"))
    calls += [await world.call(ask, LONG) for _ in range(20)]
    await ending
    assert {(await each.result()).text for each in calls} == {"around"}


async def test_a_call_attaches_before_the_first_workflow_task(server: Server) -> None:
    """The server accepts the signal before a worker runs."""
    async with running_world(server, without=("handler",)) as world:
        ask = Ask(key=world.key(), text="before the first task")
        calls = [await world.call(ask, LONG)]
        await world.until_started(ask)
        calls.append(await world.call(ask, LONG))
        await until_attached(world, ask, 1)
        await world.start_worker("handler")
        assert {(await each.result()).text for each in calls} == {"before the first task"}


async def test_a_shared_operation_attaches_to_a_run_started_by_hand(world: World) -> None:
    """The call gets the run's outcome. If the operation does not attach across callers, the call is refused."""
    ask = Ask(key=world.key(), behaviour="wait")
    target: Any = await world.handler_client.start_workflow(
        "SharedWorkflow", ask, id=f"shared-{ask.key}", task_queue=world.payment_queue
    )
    handle = await world.call(ask, CallPlan(first_lease=600, operation="shared"))

    async def attached() -> None:
        assert "WORKFLOW_EXECUTION_SIGNALED" in await events(target)

    await assert_eventually(attached, within=150)
    await target.signal("say", "by hand")
    assert await handle.result() == Reply("by hand")


async def test_another_callers_run_is_shared_only_if_the_operation_allows_it(world: World) -> None:
    """The second caller gets the outcome of the first caller's run, but cannot cancel the run."""
    settings = world.handler_settings
    other = settings.callers[CALLER].model_copy(update={"start_keys": key_set(), "completion_keys": key_set()})
    world.override_handler_settings(settings.model_copy(update={"callers": {**settings.callers, "other": other}}))
    await world.service.stop()
    await world.service.start()
    assert other.start_keys is not None
    signer = MessageSigner(other.start_keys)
    ask = Ask(key=world.key(), behaviour="wait")
    for operation, expected in (("probe", 400), ("shared", 201)):
        handle = await world.call(ask, CallPlan(first_lease=600, operation=operation))
        target = world.handler_client.get_workflow_handle(f"{operation}-{ask.key}")

        async def started(target: Any = target) -> None:
            assert [each async for each in world.handler_client.list_workflows(f"WorkflowId = '{target.id}'")]

        await assert_eventually(started)
        message = start(world, {"key": ask.key, "behaviour": "wait"}, operation=operation)
        message.url = message.url.replace(f"/c/{CALLER}/", "/c/other/")
        assert (await send(message, signer)).status == expected
        await target.terminate()
        await handle.terminate()


async def test_an_operation_may_bound_its_target_by_the_callers_deadline(world: World) -> None:
    """No caller waits longer than its deadline."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=600, operation="shared", deadline=1800))
    target = world.handler_client.get_workflow_handle(f"shared-{ask.key}")

    async def bounded() -> None:
        found = [each async for each in world.handler_client.list_workflows(f"WorkflowId = '{target.id}'")]
        assert found
        first = (await target.fetch_history()).events[0].workflow_execution_started_event_attributes
        timeout = first.workflow_execution_timeout.ToTimedelta()
        assert timedelta(minutes=29) < timeout <= timedelta(minutes=30)

    await assert_eventually(bounded)
    await target.terminate()
    await handle.terminate()


@pytest.mark.parametrize("text", ["0ms", "0s", "100ns", "1ms"])
async def test_a_deadline_that_is_over_bounds_its_target_too(server: Server, text: str) -> None:
    """Temporal takes a timeout of zero as none, and a call without a deadline has seven days."""
    async with running_world(server, without=("caller", "handler", "receiver")) as world:
        message = start(world, {"key": world.key("late")}, operation="shared")
        message.headers["Operation-Timeout"] = text
        assert (await send(message, MessageSigner(world.keys.start))).status == 201
        target = world.handler_client.get_workflow_handle(f"shared-{world.key('late')}")
        first = (await target.fetch_history()).events[0].workflow_execution_started_event_attributes
        assert first.workflow_execution_timeout.ToTimedelta() == timedelta(milliseconds=1)
        memo = await (await target.describe()).memo_value("bridge")
        assert memo["deadline_ms"] <= milliseconds(clock())


async def test_a_large_outcome_is_delivered_to_many(world: World) -> None:
    """The outcome is sent once for each call. Only the callers' histories get a copy."""
    ask = Ask(key=world.key(), behaviour="wait", size=1_500_000)
    calls = [await world.call(ask, LONG)]
    await world.until_started(ask)
    calls += [await world.call(ask, LONG) for _ in range(3)]
    await until_attached(world, ask, 3)
    await world.target(ask).signal("say", "big")
    assert [len((await each.result()).blob) for each in calls] == [1_500_000] * 4


async def receiver_of_a_plain_peer(world: World, ask: Ask, *, operation: str = "probe") -> tuple[int, list[bytes]]:
    """Start *ask* as a caller that does not renew. Returns the status and the list of completions to come."""
    got: list[bytes] = []

    async def take(request: web.Request) -> web.StreamResponse | None:
        if request.path.endswith("c" * 22):
            got.append(await request.read())
            return world.signed_response(request, 200)
        return None

    world.receiver.before = take
    message = start(world, {"key": ask.key, "behaviour": ask.behaviour}, operation=operation)
    del message.headers["Bridge-Scheduled-Time"]
    return (await send(message, MessageSigner(world.keys.start))).status, got


async def test_a_caller_that_does_not_renew_attaches_and_is_delivered_to(world: World) -> None:
    """Only the callback delivers the outcome to such a caller."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, LONG)
    target = await world.until_started(ask)
    status, got = await receiver_of_a_plain_peer(world, ask)
    assert status == 201
    await target.signal("say", "to both")
    assert await handle.result() == Reply("to both")

    async def delivered() -> None:
        assert [b"to both" in body for body in got] == [True]

    await assert_eventually(delivered)


async def test_a_caller_that_does_not_renew_gets_503_if_no_worker_could_deliver(server: Server) -> None:
    """The runs are on workers without the plugin, retried, or not started by a call."""
    foreign = f"foreign-{uuid.uuid4().hex[:8]}"
    async with running_world(server, prepare=lambda world: world.targets.append(foreign_target(foreign))) as world:
        worker = Worker(world.handler_client, task_queue=foreign, workflows=[ForeignWorkflow])
        async with worker:
            for operation in ("foreign", "flaky"):
                ask = Ask(key=world.key(), behaviour="wait")
                await world.call(ask, CallPlan(first_lease=600, operation=operation))
                target = await world.until_started(ask)
                assert (await receiver_of_a_plain_peer(world, ask, operation=operation))[0] == 503
                assert "WORKFLOW_EXECUTION_SIGNALED" not in await events(target)
                await target.terminate()
            ask = Ask(key=world.key(), behaviour="wait")
            by_hand: Any = await world.handler_client.start_workflow(
                "SharedWorkflow", ask, id=f"shared-{ask.key}", task_queue=world.payment_queue
            )
            assert (await receiver_of_a_plain_peer(world, ask, operation="shared"))[0] == 503
            await by_hand.terminate()


async def test_every_copy_of_the_service_knows_an_attached_call(server: Server) -> None:
    """The 201 was lost and the budget is used up since. The repeat is no further call, also after continue-as-new."""
    allowed: list[str] = []

    def budget(_caller: str, _operation: str, ask: Ask) -> None:
        if len(allowed) == 2:
            message = "used up"
            raise PermissionError(message)
        allowed.append(ask.key)

    def prepare(world: World) -> None:
        world.authorize = budget

    async with running_world(server, without=("caller",), prepare=prepare) as world:
        ask = {"key": world.key(), "behaviour": "continue on signal"}

        async def status(request_id: str) -> int:
            message = start(world, ask, request_id=request_id)
            return (await send(message, MessageSigner(world.keys.start))).status

        assert [await status("first"), await status("second")] == [201, 201]
        await world.service.stop()
        await world.service.start()
        assert [await status("second"), await status("third")] == [201, 403]
        target = world.target(Ask(ask["key"]))
        first_run = (await target.describe()).run_id
        await target.signal("say", "and wait")

        async def continued() -> None:
            assert (await target.describe()).run_id != first_run

        await assert_eventually(continued)
        assert [await status("second"), await status("third")] == [201, 403]
        await target.terminate()


@pytest.mark.parametrize(("operation", "minutes_ahead"), [("probe", 0), ("shared", 0), ("shared", 4)])
async def test_a_renewal_gets_the_outcome_of_its_own_run_although_people_ran_the_id_again(
    server: Server, operation: str, minutes_ahead: float
) -> None:
    """The call that started the run gets it, and so does one that was attached. No renewal gets the other run's.

    The clock of the caller's cluster may be ahead.

    The delivery goes on meanwhile: an answer "unknown" would end the call before the outcome arrives.
    """
    async with running_world(server, without=("caller", "receiver")) as world:
        signer, key = MessageSigner(world.keys.start), world.key("again")

        scheduled = (clock() + timedelta(minutes=minutes_ahead)).isoformat()

        def request(name: str) -> Message:
            content = {"key": key, "behaviour": "wait"}
            message = start(world, content, request_id=world.key(name), operation=operation)
            message.headers["Bridge-Scheduled-Time"] = scheduled
            return message

        async def token(name: str) -> str:
            return str(json.loads((await send(request(name), signer)).body)["token"])

        tokens = {name: await token(name) for name in ("first", "attached")}
        target = world.handler_client.get_workflow_handle(f"{operation}-{key}")
        await target.signal("say", "of the first run")
        await target.result()
        again: Any = await world.handler_client.start_workflow(
            "SharedWorkflow" if operation == "shared" else "ProbeWorkflow",
            Ask(key, "wait"),
            id=target.id,
            task_queue=world.payment_queue,
        )

        async def answered(name: str, operation_token: str) -> int:
            renewal = request(name)
            renewal.headers["Nexus-Operation-Token"] = operation_token
            answer = await send(renewal, signer)
            assert (b"of the first run" in answer.body) is (answer.status == 200)
            return answer.status

        async def listed() -> None:
            query = f"WorkflowId = '{target.id}'"
            assert len([each async for each in world.handler_client.list_workflows(query)]) == 2

        await assert_eventually(listed)
        assert [await answered(*each) for each in tokens.items()] == [200, 200]
        # A call of neither run may attach to the run of a shared operation, like every new call.
        assert await answered("another", tokens["first"]) == (201 if operation == "shared" else 404)
        await again.terminate()


async def test_callback_headers_are_bounded(world: World) -> None:
    """Memos and signals hold the headers, and continue-as-new copies them."""
    message = start(world, {"key": world.key()})
    message.headers["Nexus-Callback-Source"] = "x" * 2100
    answer = await send(message, MessageSigner(world.keys.start))
    assert (answer.status, answer.is_signed) == (400, True)


async def test_a_receiver_that_hangs_keeps_no_run_open_and_delays_no_other(server: Server) -> None:
    """Forty calls of one run wait for the receiver. A call with another receiver gets its outcome at once."""
    other = Listener(free_ports(1)[0], web.Application)

    def prepare(world: World) -> None:
        allowed = {"networks": ["127.0.0.0/8"], "allow_insecure": True}
        world.peer_options = {
            "callbacks": [{"url": f"{each.url}/callbacks", **allowed} for each in (world.receiver, other)]
        }

    reached, released = asyncio.Event(), asyncio.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        reached.set()
        await released.wait()
        return web.Response(status=503)

    async with running_world(server, prepare=prepare) as world:
        other.before = hang
        await other.start()
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, LONG)
        target = await world.until_started(ask)
        for _ in range(40):
            message = start(world, {"key": ask.key, "behaviour": "wait"})
            message.url = message.url.replace(quote(world.receiver.url, safe=""), quote(other.url, safe=""))
            assert (await send(message, MessageSigner(world.keys.start))).status == 201
        await target.signal("say", "at once")
        assert await target.result() == {"text": "at once", "blob": ""}
        assert await handle.result() == Reply("at once")
        await asyncio.wait_for(reached.wait(), 20)
        assert other.requests == []
        released.set()
        await other.stop()
