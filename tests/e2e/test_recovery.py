"""After every kind of loss the call ends: leases, renewals, and late outcomes."""

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError

from bridge.security.keys import KeySet
from bridge.workflow.targets import Targets
from scripts.environment.server import Server
from scripts.environment.stack import ROOT, write_local_settings
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.targets import Ask, ProbeWorkflow, Reply
from tests.support.world import Before, World, events, running_world, with_codec

SHORT = CallPlan(first_lease=1, renewal=1)
"""Renewals come every second, so that one soon replaces a lost callback."""
PATIENT = CallPlan(first_lease=1, renewal=3600)
"""From the second attempt on the back-off is longer than a test. Only the callback can end the call."""


def lost(world: World) -> Before:
    """Drop callbacks: the sender gets a signed 200, and the receiver gets nothing."""

    async def taken(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 200)

    return taken


async def unavailable(_: web.Request) -> web.StreamResponse:
    return web.Response(status=503)


async def unanswered(_: web.Request) -> None:
    await asyncio.Event().wait()


async def failure_of(handle: WorkflowHandle[Any, Any]) -> NexusOperationError:
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause


@pytest.mark.parametrize("behaviour", ["return", "fail", "cancel"])
async def test_a_renewal_replaces_a_lost_callback(world: World, behaviour: str) -> None:
    """The renewal gets success, failure and cancellation from the handler, without a history event."""
    world.receiver.before = lost(world)
    ask = Ask(key=world.key(), behaviour="cleanup" if behaviour == "cancel" else behaviour, text="found")
    handle = await world.call(ask, SHORT)
    if behaviour == "cancel":
        await (await world.until_started(ask)).cancel()
    if behaviour == "return":
        assert await handle.result() == Reply("found")
    else:
        error = await failure_of(handle)
        assert isinstance(error.cause, CancelledError if behaviour == "cancel" else ApplicationError)
    assert len(await events(handle)) == 11
    assert await world.receiver.answered() == [200]
    assert world.service.statuses[-1] == (200 if behaviour == "return" else 424)


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "payload codec"])
@pytest.mark.parametrize("caller_is_down", [False, True], ids=["worker up", "worker down"])
@pytest.mark.parametrize("ending", ["success", "decline", "cancellation"])
async def test_an_outcome_after_the_first_lease_arrives(
    server: Server, ending: str, caller_is_down: bool, encrypted: bool
) -> None:
    """The first task token is invalid, and a failure by id needs a started attempt: the receiver nudges one."""
    converter = with_codec(Scrambler()) if encrypted else DataConverter.default
    async with running_world(server, converters=(converter, converter)) as world:
        ask = Ask(key=world.key(), behaviour="cleanup" if ending == "cancellation" else "wait", text="declined")
        handle = await world.call(ask, PATIENT)
        target = await world.until_started(ask)
        await world.until_attempt(handle, 3, in_backoff=True)
        if caller_is_down:
            await world.stop_worker("caller")
        if ending == "cancellation":
            await target.cancel()
        else:
            await target.signal("say", "fail" if ending == "decline" else "paid")

        async def called_back() -> None:
            assert world.receiver.requests, "no callback yet"

        await assert_eventually(called_back)
        if caller_is_down:
            await world.start_worker("caller")
        match ending:
            case "success":
                assert await handle.result() == Reply("paid")
            case "decline":
                error = await failure_of(handle)
                assert isinstance(error.cause, ApplicationError)
                assert (error.cause.type, error.cause.message) == ("Outer", "declined")
                assert isinstance(error.cause.cause, ApplicationError)
            case _:
                assert isinstance((await failure_of(handle)).cause, CancelledError)
        assert len(await events(handle)) == 11


async def test_an_outcome_reaches_a_receiver_that_was_down_when_the_target_ended(server: Server) -> None:
    """The target closes. A delivery workflow continues the delivery, and ends when the receiver is back."""
    async with running_world(server) as world:
        await world.receiver.stop()
        ask = Ask(key=world.key(), text="late")
        handle = await world.call(ask, CallPlan(first_lease=600))
        target = await world.until_started(ask)
        assert await target.result() == {"text": "late", "blob": ""}
        described = await target.describe()
        request_id = (await described.memo())["bridge"]["request_id"]
        delivery = world.handler_client.get_workflow_handle(f"bridge-delivery-{CALLER}:{request_id}-{described.run_id}")

        async def started() -> None:
            try:
                await delivery.describe()
            except RPCError as error:
                raise AssertionError from error

        await assert_eventually(started)
        await world.receiver.start()
        assert await handle.result() == Reply("late")
        assert world.service.statuses == [201]
        assert await delivery.result() == "accepted"


async def test_an_outcome_survives_a_rollout_in_which_the_receiver_has_another_key(server: Server) -> None:
    """No number of 401 ends a delivery. It goes on by itself once the keys agree."""
    async with running_world(server) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        handle = await world.call(ask, CallPlan(first_lease=600))
        target = await world.until_started(ask)
        await world.receiver.stop()
        good, world.keys.completion = world.keys.completion, key_set()
        await world.receiver.start()
        world.keys.completion = good
        await target.signal("say", "paid")

        async def refused() -> None:
            assert world.receiver.statuses.count(401) >= 3

        await assert_eventually(refused)
        await world.receiver.stop()
        await world.receiver.start()
        assert await handle.result() == Reply("paid")
        assert world.service.statuses == [201]


async def test_a_handler_that_is_down_for_a_while_is_reached_when_it_is_back(server: Server) -> None:
    """Nothing was started; the pending activity shows the failed connection."""
    async with running_world(server, without=("service",)) as world:
        ask = Ask(key=world.key(), text="at last")
        handle = await world.call(ask)
        await world.until_attempt(handle, 2)
        activity = await world.pending(handle)
        assert "handler not reached" in activity.last_failure.message
        await world.service.start()
        assert await handle.result() == Reply("at last")
        assert len(await events(handle)) == 11


@pytest.mark.parametrize("is_again", [False, True], ids=["next attempt", "scheduled again"])
async def test_settings_that_lose_the_endpoint_after_a_start_was_sent_end_no_call(
    world: World, *, is_again: bool
) -> None:
    """The answer to the start was lost, so that the target may run. Only the handler itself could end the call now.

    An activity that is scheduled again begins with attempt 1.
    """
    ask = Ask(key=world.key(), behaviour="wait")
    world.service.change = lambda *_: web.Response(status=504)
    handle = await world.call(ask, CallPlan(renewal=1))
    target = await world.until_started(ask)
    if is_again:
        world.service.before = unanswered
        await world.stop_waiting(handle)
    await world.stop_worker("caller")
    world.service.before = world.service.change = None
    world.caller_options = {"endpoints": {"other": world.caller_settings.endpoints["payments"]}}
    await world.start_worker("caller")

    async def shown() -> None:
        pending = await world.pending(handle)
        assert pending is not None, "not scheduled again yet"
        assert "no endpoint 'payments'" in pending.last_failure.message

    await assert_eventually(shown)
    await world.stop_worker("caller")
    world.caller_options = {}
    await world.start_worker("caller")
    await target.signal("say", "paid")
    assert await handle.result() == Reply("paid")


async def test_an_unsigned_refusal_ends_no_call_that_is_scheduled_again(server: Server) -> None:
    """Anyone on the way may have written it, and a lost answer may have been a 201. The new activity has attempt 1."""

    def prepare(world: World) -> None:
        keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
        world.caller_options = {"handlers": {HANDLER: {**keys, "answers": "unsigned"}}}

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        world.service.change = lambda *_: web.Response(status=504)
        handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
        target = await world.until_started(ask)
        world.service.before = unanswered
        await world.stop_waiting(handle)

        async def refuse(_: web.Request) -> web.StreamResponse:
            return web.json_response({"message": "no such operation"}, status=404)

        world.service.before, world.service.change = refuse, None

        async def refused() -> None:
            pending = await world.pending(handle)
            assert pending is not None, "not scheduled again yet"
            assert "unsigned peer" in pending.last_failure.message

        await assert_eventually(refused)
        world.service.before = None
        await target.signal("say", "paid")
        assert await handle.result() == Reply("paid")


async def test_a_check_that_refuses_the_repeat_of_a_start_ends_no_call(server: Server) -> None:
    """The answer to the start was lost, and by now the order counts as paid. The repeat finds the run of the call."""
    checked: list[str] = []

    def is_unpaid(ask: Ask) -> None:
        checked.append(ask.key)
        if len(checked) > 1:
            message = "the order is paid already"
            raise ValueError(message)

    def prepare(world: World) -> None:
        [target] = Targets([ProbeWorkflow])
        world.targets = [replace(target, check=is_unpaid)]

    async with running_world(server, prepare=prepare) as world:
        ask = Ask(key=world.key(), behaviour="wait")
        world.service.change = lambda *_: web.Response(status=504)
        handle = await world.call(ask, CallPlan(renewal=1))
        target = await world.until_started(ask)
        world.service.change = None
        await world.until_attempt(handle, 3)
        await target.signal("say", "paid")
        assert await handle.result() == Reply("paid")
        other = await world.call(Ask(key=world.key()))
        with pytest.raises(WorkflowFailureError) as raised:
            await other.result()
        assert isinstance(raised.value.cause, NexusOperationError)
        assert "paid already" in str(raised.value.cause.cause)


async def test_retry_after_of_the_handler_is_honored(world: World) -> None:
    """An unavailable handler sends `Retry-After`, and the next attempt waits that long."""

    async def busy(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 503, {"Retry-After": "1800"})

    world.service.before = busy
    handle = await world.call(Ask(key=world.key()), CallPlan(deadline=7200))
    await world.until_attempt(handle, 2, in_backoff=True)
    activity = await world.pending(handle)
    wait = activity.next_attempt_schedule_time.ToDatetime() - activity.last_attempt_complete_time.ToDatetime()
    assert round(wait.total_seconds() / 60) == 30
    await handle.terminate()


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
async def test_a_renewal_that_is_refused_by_mistake_fails_nothing(world: World, status: int) -> None:
    """After a 201 a refusal does not end the call."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=2, renewal=1))
    target = await world.until_started(ask)

    async def target_is_shown() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads, "the 201 is not recorded yet"

    await assert_eventually(target_is_shown)

    async def refuse(_: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "a proxy says no"}, status=status)

    world.service.before = refuse
    await world.until_attempt(handle, 4)
    assert world.service.statuses.count(status) >= 2
    assert "handler not reached" in (await world.pending(handle)).last_failure.message
    world.service.before = None
    await target.signal("say", "healthy")
    assert await handle.result() == Reply("healthy")


async def test_a_wrong_key_for_a_while_fails_nothing(world: World) -> None:
    """A wrong key on the handler's side is corrected later: the renewals and the outcome still arrive."""
    good: KeySet = world.keys.start
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=2, renewal=1))
    target = await world.until_started(ask)

    async def target_is_shown() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads, "the 201 is not recorded yet"

    await assert_eventually(target_is_shown)
    await world.service.stop()
    world.keys.start = key_set()
    await world.service.start()
    await world.until_attempt(handle, 4)
    assert 401 in world.service.statuses
    await world.service.stop()
    world.keys.start = good
    await world.service.start()
    await target.signal("say", "healthy")
    assert await handle.result() == Reply("healthy")


async def test_a_deadline_is_a_schedule_to_close_timeout(world: World) -> None:
    """The deadline passes while the call waits for the callback."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(deadline=2))
    error = await failure_of(handle)
    assert isinstance(error.cause, TemporalTimeoutError)
    assert error.cause.type is TimeoutType.SCHEDULE_TO_CLOSE
    assert error.cause.message == "operation timed out"


async def test_a_deadline_while_the_handler_is_unavailable_is_the_same_timeout(server: Server) -> None:
    """The error does not depend on the cause of the delay."""
    async with running_world(server, without=("service",)) as world:
        handle = await world.call(Ask(key=world.key()), CallPlan(deadline=3))
        error = await failure_of(handle)
        assert isinstance(error.cause, TemporalTimeoutError)
        assert error.cause.type is TimeoutType.SCHEDULE_TO_CLOSE


@pytest.mark.parametrize("stops", [False, True], ids=["worker up", "worker stopped"])
async def test_a_failure_during_a_short_lease_takes_two_requests(world: World, stops: bool) -> None:
    """The attempt stays open for its lease, because Temporal accepts a failure only for an open attempt.

    A worker that stops ends the attempt. The failure then needs a nudge, and another worker.
    """
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=25))
    target = await world.until_started(ask)

    async def recorded() -> None:
        assert (await world.pending(handle)).heartbeat_details.payloads

    await assert_eventually(recorded)
    assert (await world.pending(handle)).state == 2  # STARTED
    if stops:
        await world.stop_worker("caller")
        assert (await world.pending(handle)).state == 1  # SCHEDULED
        assert (await world.pending(handle)).last_failure.application_failure_info.type == "bridge.StillRunning"
        await world.start_worker("caller")
    await target.signal("say", "fail")
    assert isinstance((await failure_of(handle)).cause, ApplicationError)
    if not stops:
        assert (await world.service.answered(), await world.receiver.answered()) == ([201], [200])


async def test_a_deadline_between_renewals_is_the_same_timeout(world: World) -> None:
    """The last attempts stay started, so that the server's timer ends the call."""
    ask = Ask(key=world.key(), behaviour="wait")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=2, deadline=13))
    error = await failure_of(handle)
    assert isinstance(error.cause, TemporalTimeoutError)
    assert error.cause.type is TimeoutType.SCHEDULE_TO_CLOSE


@asynccontextmanager
async def order_worker_process(world: World, folder: Path) -> Any:
    """A worker for CallingWorkflow in a separate process that the test can kill."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.calling_worker", world.order_queue),
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "BRIDGE_CONFIG": str(folder / "caller.toml"),
            "TEMPORAL_ADDRESS": world.server.address,
            "TEMPORAL_NAMESPACE": CALLER,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline(), "the worker did not start"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.mark.parametrize("moment", ["before the start arrives", "after the start, before its answer"])
async def test_a_worker_killed_inside_the_activity_loses_nothing(server: Server, tmp_path: Path, moment: str) -> None:
    """The server runs the next attempt when the first lease is over, and the target runs once."""
    async with running_world(server, without=("caller",)) as world:
        write_local_settings(tmp_path, receiver_url=world.receiver.url, service_url=world.service.url)
        text = (tmp_path / "caller.toml").read_text()
        (tmp_path / "caller.toml").write_text(_with_keys(text, world))
        reached, go_on = asyncio.Event(), asyncio.Event()

        async def hold(request: web.Request) -> web.StreamResponse | None:
            del request
            if not reached.is_set():
                reached.set()
                await go_on.wait()
                # The process that sent the start is dead, and nothing was started.
                return web.Response(status=503)
            return None

        async def hold_answer() -> None:
            if not reached.is_set():
                reached.set()
                await go_on.wait()

        if moment.startswith("before"):
            world.service.before = hold
        else:
            world.service.after = hold_answer
        ask = Ask(key=world.key(), text="survived")
        async with order_worker_process(world, tmp_path) as process:
            handle = await world.call(ask, CallPlan(first_lease=3, renewal=1))
            await asyncio.wait_for(reached.wait(), 20)
            process.send_signal(signal.SIGKILL)
            await process.wait()
            go_on.set()
        async with order_worker_process(world, tmp_path):
            assert await handle.result() == Reply("survived")
        runs = [run async for run in world.handler_client.list_workflows(f"WorkflowId = 'probe-{ask.key}'")]
        assert len(runs) == 1


def _with_keys(text: str, world: World) -> str:
    """The generated settings with this world's keys in place of the generated ones."""

    def key_set_text(keys: KeySet) -> str:
        secret = keys.keys["k1"].get_secret_value()
        return f'{{ signing = "k1", keys = {{ k1 = "{secret}" }} }}'

    own = {
        "callback_keys": world.keys.callback,
        "start_keys": world.keys.start,
        "completion_keys": world.keys.completion,
    }
    lines = []
    for line in text.splitlines():
        name = line.partition(" = ")[0]
        lines.append(f"{name} = {key_set_text(own[name])}" if name in own else line)
    return "\n".join(lines)
