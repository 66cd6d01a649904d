"""The limits of one caller and of one run: what is refused, for how long, and that no call ends by it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import ResetActivityRequest
from yarl import URL

from bridge.errors import UnavailableError
from bridge.http import in_flight
from bridge.protocol.link import WorkflowRef
from bridge.security.signatures import MessageKind, MessageSigner
from handler import service
from handler.delivery.calls import read_memo
from handler.delivery.close_reporter import MAX_ATTACHED
from handler.start import limits
from handler.start.limits import MAX_EVENTS, MAX_HISTORY_BYTES, AttachedCalls, TokenBucket
from handler.start.runs import Run
from scripts.environment.server import Server, running_server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.peer import Message, assert_nothing_started, send, signer, start
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world


class Seconds:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def wait_of(bucket: TokenBucket) -> float | None:
    """Take a token; the seconds to wait if the bucket is empty."""
    try:
        bucket.take()
    except UnavailableError as error:
        return round(error.retry_after.total_seconds(), 6)
    return None


def test_a_bucket_refills_at_its_rate_up_to_its_size() -> None:
    """A pause of any length gives no more than a full bucket."""
    clock = Seconds()
    bucket = TokenBucket(per_second=2, burst=3, clock=clock)
    assert [wait_of(bucket) for _ in range(3)] == [None] * 3
    assert wait_of(bucket) is not None
    clock.now += 0.5
    assert wait_of(bucket) is None
    assert wait_of(bucket) is not None
    clock.now += 3600
    assert [wait_of(bucket) is None for _ in range(4)] == [True, True, True, False]


def test_refused_requests_come_back_one_after_the_other() -> None:
    """Each refusal names a later time. When all obey, all are served at the rate, and none is refused again."""
    clock = Seconds()
    bucket = TokenBucket(per_second=2, burst=1, clock=clock)
    assert wait_of(bucket) is None
    waits = [wait_of(bucket) for _ in range(4)]
    assert waits == [0.5, 1.0, 1.5, 2.0]
    for _ in waits:
        clock.now += 0.5
        assert wait_of(bucket) is None


def test_no_refused_request_waits_longer_than_a_minute() -> None:
    """Also after a flood."""
    bucket = TokenBucket(per_second=1, burst=1, clock=Seconds())
    waits = [wait_of(bucket) for _ in range(1000)]
    assert max(each for each in waits if each is not None) == 60


RUN = Run(
    ref=WorkflowRef(namespace=HANDLER, workflow_id="payment-7", run_id="second"),
    workflow_type="PaymentWorkflow",
    first_run_id="first",
    events=MAX_EVENTS - 1,
    history_bytes=MAX_HISTORY_BYTES - 1,
    start_time_ms=0,
    is_open=True,
    memo=None,
    is_recorded=False,
    served=frozenset(),
    progress=None,
)


def test_a_run_and_its_successors_have_a_limit_of_calls() -> None:
    """A repeat counts once. A call of another run has the room of that run."""
    attached = AttachedCalls()
    assert all(attached.admit(str(number % MAX_ATTACHED), RUN) for number in range(MAX_ATTACHED + 3))
    assert not attached.admit("one more", RUN)
    assert not attached.admit("one more", replace(RUN, ref=replace(RUN.ref, run_id="third")))
    assert attached.admit("0", RUN)
    assert attached.admit("one more", replace(RUN, first_run_id="another"))


@pytest.mark.parametrize("full", [replace(RUN, events=MAX_EVENTS), replace(RUN, history_bytes=MAX_HISTORY_BYTES)])
def test_a_run_with_a_long_history_takes_no_call(full: Run) -> None:
    """The limit is where Temporal begins to warn, and does not depend on what was counted."""
    assert AttachedCalls().admit("call", RUN)
    assert not AttachedCalls().admit("call", full)


def test_the_counts_of_runs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that was asked for least recently drops out."""
    monkeypatch.setattr(limits, "_MAX_RUNS", 2)
    monkeypatch.setattr(limits, "MAX_ATTACHED", 1)
    attached = AttachedCalls()
    for first in ("a", "b", "a", "c"):
        attached.admit("call", replace(RUN, first_run_id=first))
    assert [attached.admit("other", replace(RUN, first_run_id=first)) for first in ("a", "c")] == [False, False]
    assert attached.admit("other", replace(RUN, first_run_id="b"))


@pytest_asyncio.fixture(loop_scope="session")
async def narrow(server: Server) -> AsyncIterator[World]:
    """A caller with one start at once and one every half second."""

    def prepare(world: World) -> None:
        world.peer_options = {"limits": {"starts_per_second": 2, "burst": 1, "deadline_days": 1}}

    async with running_world(server, prepare=prepare) as world:
        yield world


async def test_a_start_over_the_rate_is_a_signed_429_that_starts_nothing(server: Server) -> None:
    """The refusal names a wait. A sender without a proof takes none of the caller's starts."""

    def prepare(world: World) -> None:
        # So few that a busy machine sends the second start before the first token is back.
        world.peer_options = {"limits": {"starts_per_second": 0.02, "burst": 1}}

    without = ("caller", "handler", "receiver")
    async with running_world(server, without=without, prepare=prepare) as world:
        keys = [world.key(), world.key()]
        assert (await send(start(world, {"key": keys[0]}), MessageSigner(world.keys.completion))).status == 401
        started, refused = [await send(start(world, {"key": key}), signer(world)) for key in keys]
        assert (started.status, refused.status) == (201, 429)
        assert refused.is_signed
        assert (refused.type, refused.headers["Retry-After"]) == ("RESOURCE_EXHAUSTED", "50")
        assert refused.failure["details"]["retryableOverride"] is True
        assert "0.02 starts a second" in refused.message
        await assert_nothing_started(world, keys[1])


async def test_a_refusal_by_the_rate_is_held_back_and_delays_no_other_caller(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that ignores Retry-After and waits for each answer sends few requests."""
    monkeypatch.setattr(service, "REFUSAL_DELAY_S", 3600)

    def prepare(world: World) -> None:
        settings = world.handler_settings
        peer = settings.callers[CALLER]
        few = peer.limits.model_copy(update={"starts_per_second": 0.02, "burst": 1})
        strict = peer.model_copy(update={"limits": few})
        world.override_handler_settings(
            settings.model_copy(update={"callers": {**settings.callers, CALLER: strict, "other": peer}})
        )

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        assert (await send(start(world, {"key": world.key()}), signer(world))).status == 201
        refused = asyncio.create_task(send(start(world, {"key": world.key()}), signer(world)))
        for _ in range(3):
            other = start(world, {"key": world.key()})
            other.url = other.url.replace(f"/c/{CALLER}/", "/c/other/")
            assert (await send(other, signer(world))).status == 201
        assert not refused.done()
        refused.cancel()


@pytest.mark.parametrize("kind", [MessageKind.START, MessageKind.CANCEL, MessageKind.ECHO])
async def test_a_caller_with_slow_bodies_takes_no_place_of_another(
    server: Server, monkeypatch: pytest.MonkeyPatch, kind: MessageKind
) -> None:
    """Its connections would fill the listener. The one request more is a signed 429, which ends no call."""
    monkeypatch.setattr(in_flight, "connection_limit", lambda: 6)

    def prepare(world: World) -> None:
        settings = world.handler_settings
        callers = {**settings.callers, "other": settings.callers[CALLER]}
        world.override_handler_settings(settings.model_copy(update={"callers": callers}))

    def message(world: World, caller: str = CALLER) -> Message:
        made = start(world, {"key": world.key()})
        made.kind, path = kind, f"/c/{caller}"
        if kind is not MessageKind.ECHO:
            path += "/ProbeService/probe" + ("/cancel" if kind is MessageKind.CANCEL else "")
        if kind is MessageKind.CANCEL:
            made.headers["Nexus-Operation-Token"] = "none"
        made.url = world.service.url + path
        return made

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        slow = []
        for _ in range(3):
            made = message(world)
            signer(world).sign(kind, made.url, made.headers, made.body)
            _, writer = await asyncio.open_connection("127.0.0.1", world.service.port)
            lines = [f"{name}: {value}" for name, value in made.headers.items()]
            head = [f"POST {URL(made.url).raw_path} HTTP/1.1", "Host: h", f"Content-Length: {len(made.body)}", *lines]
            writer.write("\r\n".join([*head, "", ""]).encode() + made.body[:-1])
            slow.append(writer)

        async def is_full() -> None:
            refused = await send(message(world), signer(world))
            assert (refused.status, refused.is_signed) == (429, True)
            assert "3 requests at a time" in refused.message

        await assert_eventually(is_full)
        assert (await send(message(world, "other"), signer(world))).status != 429
        for writer in slow:
            writer.transport.abort()

        async def is_free() -> None:
            assert (await send(message(world), signer(world))).status != 429

        await assert_eventually(is_free)


async def test_calls_over_the_rate_all_get_their_outcomes(narrow: World) -> None:
    """The waiting activity obeys Retry-After and starts again."""
    asks = [Ask(narrow.key(), text=str(number)) for number in range(6)]
    handles = await asyncio.gather(*(narrow.call(ask, CallPlan(first_lease=600)) for ask in asks))
    assert [await each.result() for each in handles] == [Reply(ask.text) for ask in asks]
    assert 429 in narrow.service.statuses


async def test_a_deadline_over_the_limit_is_cut_and_the_call_goes_on(narrow: World) -> None:
    """The caller waits for ten days, and its outcome is delivered within one."""
    ask = Ask(narrow.key(), "wait")
    handle = await narrow.call(ask, CallPlan(first_lease=600, deadline=10 * 86400))
    target = await narrow.until_started(ask)
    described = await target.describe()
    memo = await read_memo(narrow.handler_client.data_converter, described.raw_info)
    assert memo is not None
    remaining = datetime.fromtimestamp(memo.deadline_ms / 1000, UTC) - datetime.now(UTC)
    assert timedelta(hours=23) < remaining <= timedelta(days=1)
    await target.signal("say", "in time")
    assert await handle.result() == Reply("in time")


async def test_a_full_run_takes_no_further_call_and_every_call_gets_the_outcome(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that finds the run full adds nothing to its history, and gets the outcome in the end."""
    monkeypatch.setattr(limits, "MAX_ATTACHED", 1)
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, CallPlan(first_lease=600))
    target = await world.until_started(ask)
    second = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await world.until_attempt(second, 3)

    refused = await send(start(world, {"key": ask.key, "behaviour": "wait"}), MessageSigner(world.keys.start))
    assert (refused.status, refused.headers["Retry-After"], refused.is_signed) == (429, "30", True)
    third = await world.call(ask, CallPlan(first_lease=600))

    async def is_refused() -> None:
        activity = await world.pending(third)
        assert activity is not None
        assert "no further call may wait" in activity.last_failure.message

    await assert_eventually(is_refused)
    assert (await events(target)).count("WORKFLOW_EXECUTION_SIGNALED") == 1
    await target.signal("say", "to all")
    assert [await first.result(), await second.result()] == [Reply("to all")] * 2
    # Do not wait for the third call's next attempt, which is 30 seconds from now.
    await world.caller_client.workflow_service.reset_activity(
        ResetActivityRequest(
            namespace=CALLER,
            execution=WorkflowExecution(workflow_id=third.id),
            id=(await world.pending(third)).activity_id,
        )
    )
    assert await third.result() == Reply("to all")


async def test_a_run_with_a_long_history_refuses_new_calls_and_not_the_renewals_of_old_ones(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length of the history that Temporal describes is compared."""
    ask = Ask(world.key(), "wait")
    first = await world.call(ask, CallPlan(first_lease=600))
    target = await world.until_started(ask)
    second = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    await world.until_attempt(second, 2)
    monkeypatch.setattr(limits, "MAX_EVENTS", 4)
    assert (await send(start(world, {"key": ask.key}), MessageSigner(world.keys.start))).status == 429
    await world.until_attempt(second, 4)
    assert world.service.statuses.count(429) == 1
    await target.signal("say", "to both")
    assert [await first.result(), await second.result()] == [Reply("to both")] * 2


async def test_a_run_with_all_the_signals_that_the_server_allows_refuses_a_call_for_now() -> None:
    """The server's refusal is no verdict on the call: it is answered 429 and not 400."""
    async with (
        running_server(namespaces=[CALLER, HANDLER], dynamic_config=["history.maximumSignalsPerExecution=1"]) as strict,
        running_world(strict, without=("caller", "handler", "receiver")) as world,
    ):
        message = [start(world, {"key": "k", "behaviour": "wait"}) for _ in range(3)]
        statuses = [(await send(each, MessageSigner(world.keys.start))).status for each in message]
        assert statuses == [201, 201, 429]
