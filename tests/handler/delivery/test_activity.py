"""The pace of the attempts of a delivery workflow."""

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from temporalio import activity
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import Worker

from bridge.http.client import REQUEST_TIMEOUT, REQUESTS_PER_DESTINATION, HttpClient
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from handler.delivery import dispatcher
from handler.delivery.activities import UndeliveredOutcome, require_hook
from handler.delivery.callback_client import CallbackClient
from handler.delivery.caller_close_policy import CallerWatch
from handler.delivery.records import CallMemo, packed_reply
from handler.delivery.workflow import next_delay
from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import Ask, ProbeWorkflow
from tests.support.world import RUNNER, World, running_world


async def pending_attempts(world: World) -> list[PendingActivityInfo]:
    """The attempts of all delivery workflows of *world*."""
    query = f"WorkflowType = 'bridge.Delivery' AND TaskQueue = '{world.payment_queue}'"
    found = [each.id async for each in world.handler_client.list_workflows(query)]
    described = [await world.handler_client.get_workflow_handle(each).describe() for each in found]
    return [each for run in described for each in run.raw_description.pending_activities]


async def test_a_retry_after_beyond_the_deadline_ends_no_delivery(world: World) -> None:
    """The receiver asks for an hour, and the call ends in ten minutes. The next attempt comes before that."""

    async def busy(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 503, {"Retry-After": "3600"})

    world.receiver.before = busy
    await world.call(Ask(world.key()), CallPlan(first_lease=600, deadline=600))

    async def waiting() -> None:
        attempts = await pending_attempts(world)
        assert [each.attempt for each in attempts] == [2]
        assert attempts[0].current_retry_interval.ToTimedelta() <= timedelta(minutes=5)

    await assert_eventually(waiting)


async def test_deliveries_to_a_receiver_that_hangs_come_back_when_its_requests_may_have_timed_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts that only find all places taken are not repeated every second."""
    monkeypatch.setattr(dispatcher, "_PATIENCE", timedelta(milliseconds=200))
    opened = asyncio.Event()

    async def hang(_: web.Request) -> None:
        await opened.wait()

    world.receiver.before = hang
    asks = [Ask(world.key()) for _ in range(REQUESTS_PER_DESTINATION + 3)]
    await asyncio.gather(*(world.call(ask, CallPlan(first_lease=600)) for ask in asks))

    async def waiting() -> None:
        # After any other first attempt the delay is a second at most.
        assert any(
            each.attempt == 2 and each.current_retry_interval.ToTimedelta() >= REQUEST_TIMEOUT / 2
            for each in await pending_attempts(world)
        )

    try:
        await assert_eventually(waiting)
    finally:
        opened.set()


@pytest.mark.parametrize(
    ("attempt", "retry_after_s", "remaining_s", "spread", "expected_s"),
    [
        pytest.param(1, None, 1000, 1.0, 1, id="first"),
        pytest.param(3, None, 1000, 0.5, 2, id="doubled, then spread"),
        pytest.param(40, None, 10_000, 1.0, 300, id="at most five minutes"),
        pytest.param(40, 3000, 10_000, 1.0, 3000, id="the receiver asks for longer"),
        pytest.param(9, None, 100, 1.0, 50, id="half of what remains"),
        pytest.param(9, None, -1, 1.0, 0.05, id="past the deadline"),
        pytest.param(1, None, 1000, 0.0, 0.05, id="never at once"),
        pytest.param(None, None, 1000, 0.0, 1, id="destination full"),
        pytest.param(None, 9, 1000, 0.0, 9, id="destination hangs"),
    ],
)
def test_the_delay_of_a_delivery_follows_its_attempts_and_no_delay_passes_its_deadline(
    attempt: int | None, retry_after_s: int | None, remaining_s: int, spread: float, expected_s: float
) -> None:
    """A delay is a spread step or what the receiver asked for, between 50 ms and half of the remaining time."""
    retry_after = None if retry_after_s is None else timedelta(seconds=retry_after_s)
    delay = next_delay(attempt, retry_after=retry_after, remaining=timedelta(seconds=remaining_s), spread=spread)
    assert delay == timedelta(seconds=expected_s)


async def test_what_the_teams_report_does_reaches_neither_the_worker_nor_the_event_loop(server: Server) -> None:
    """A plain function may block. One that exits is repeated like one that raises any other error."""
    entered, released, seen = threading.Event(), threading.Event(), list[bool]()

    def report(_: UndeliveredOutcome) -> None:
        entered.set()
        assert activity.info().activity_type == "bridge.report_undelivered"
        seen.append(released.wait(20))
        if len(seen) == 1:
            raise SystemExit(1)

    async def refuse(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 400)

    async with running_world(server, without=("handler",)) as world:
        world.receiver.before = refuse
        plugin = HandlerPlugin(world.handler_settings, on_undelivered=report)
        options: dict[str, Any] = {"workflows": [ProbeWorkflow], "plugins": [plugin], "workflow_runner": RUNNER}
        async with Worker(world.handler_client, task_queue=world.payment_queue, **options):
            await world.call(Ask(world.key()), CallPlan(first_lease=600))

            async def blocks() -> None:
                assert entered.is_set()

            await assert_eventually(blocks)
            released.set()

            async def repeated() -> None:
                assert seen == [True, True]

            await assert_eventually(repeated)


@pytest.mark.parametrize("hook", ["a text", lambda: None], ids=["no function", "no parameter"])
def test_a_hook_that_could_never_be_called_is_refused(hook: Any) -> None:
    """It would be missed when the first outcome is not delivered."""
    with pytest.raises(TypeError, match=r"^on_undelivered must be a function of \(outcome\)$"):
        require_hook(hook)


@pytest.mark.parametrize("hook", [print, max, lambda outcome: outcome])
def test_every_other_hook_is_taken(hook: Any) -> None:
    """Also one without a signature."""
    require_hook(hook)


async def test_the_watch_asks_until_it_finds_one_caller_that_waits(world: World) -> None:
    """A receiver that hangs, with hundreds of calls, would otherwise hold the worker's slot for more than an hour."""

    async def gone_then_hung(request: web.Request) -> web.StreamResponse:
        return world.signed_response(request, 410 if request.path.endswith("0") else 503)

    world.receiver.before = gone_then_hung
    settings, metrics, http = world.handler_settings, Metrics.of(world.handler_client), HttpClient()
    callbacks = CallbackClient(
        settings, keys=LiveKeys(settings, metrics), http=http, metrics=metrics, clock=lambda: datetime.now(UTC)
    )
    watch = CallerWatch(callbacks=callbacks, first=timedelta(minutes=1))
    calls = [
        CallMemo(
            caller=CALLER,
            request_id=str(number),
            input_hash="",
            service="ProbeService",
            operation="minded",
            reply=packed_reply(operation_token="", callback_url=f"{world.receiver.url}/callbacks/{number}"),
            deadline_ms=2**42,
        )
        for number in range(5)
    ]
    environment = ActivityEnvironment()
    environment.info = replace(environment.info, attempt=2)
    with pytest.raises(ApplicationError, match="a caller waits"):
        await environment.run(watch.watch_callers, calls)
    assert await world.receiver.answered() == [410, 503]
    await http.aclose()
