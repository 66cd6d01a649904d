"""Fake endpoints: a caller's workflows are tested without a handler, in the SDK's environments and in any worker."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from temporalio import workflow
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, FailureError, NexusOperationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.testing import WorkflowEnvironment
from temporalio.worker import Replayer, Worker
from temporalio.workflow import NexusOperationCancellationType as CancellationType

import bridge
from bridge.testing import FakeEndpoints
from scripts.environment.server import Server
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.helpers import CALLER, assert_eventually
from tests.support.targets import Ask, ProbeService, Reply
from tests.support.world import RUNNER

BINARY = Path(sys.executable).with_name("temporal-test-server")
DAY = 86400.0
ASK = Ask(key="7", text="hello")


@workflow.defn(sandboxed=False)
class WrongCaller:
    """Names the operation, so that no type checker sees the mistake."""

    @workflow.run
    async def run(self) -> str:
        client = bridge.create_client(service="ProbeService", endpoint="payments")
        try:
            await client.execute_operation("probe", {"key": 7}, output_type=Reply)
        except NexusOperationError as error:
            return str(error.cause)
        return "no error"


class Caller:
    """A worker with fakes, and a fake of the service that its workflow calls."""

    def __init__(self, client: Client, fakes: FakeEndpoints) -> None:
        self.client, self.fakes = client, fakes
        self.probe = fakes.on(ProbeService.probe, service=ProbeService, endpoint="payments")
        self.queue = f"orders-{uuid.uuid4().hex[:8]}"

    async def call(self, plan: CallPlan | None = None, **options: Any) -> WorkflowHandle[CallingWorkflow, Reply]:
        return await self.client.start_workflow(
            CallingWorkflow.run,
            args=[ASK, plan or CallPlan()],
            id=f"calling-{uuid.uuid4().hex[:8]}",
            task_queue=self.queue,
            **options,
        )

    async def error(self, plan: CallPlan | None = None, **options: Any) -> BaseException:
        """The cause of the call's error."""
        with pytest.raises(WorkflowFailureError) as raised:
            await (await self.call(plan, **options)).result()
        assert isinstance(raised.value.cause, NexusOperationError)
        assert raised.value.cause.cause is not None
        return raised.value.cause.cause


@asynccontextmanager
async def running(client: Client, fakes: FakeEndpoints, **options: Any) -> AsyncIterator[Caller]:
    caller = Caller(client, fakes)
    async with Worker(
        client,
        task_queue=caller.queue,
        workflows=[CallingWorkflow, WrongCaller],
        plugins=[fakes],
        workflow_runner=RUNNER,
        **options,
    ):
        yield caller


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def skipping() -> AsyncIterator[Client]:
    async with await WorkflowEnvironment.start_time_skipping(test_server_existing_path=str(BINARY)) as environment:
        yield environment.client


@pytest_asyncio.fixture(params=["dev server", "time skipping"], loop_scope="session")
async def caller(request: pytest.FixtureRequest, server: Server, skipping: Client) -> AsyncIterator[Caller]:
    real = await Client.connect(server.address, namespace=CALLER)
    with FakeEndpoints() as fakes:
        async with running(skipping if request.param == "time skipping" else real, fakes) as made:
            yield made


async def doubled(ask: Ask) -> Reply:
    await asyncio.sleep(0)
    return Reply(ask.text * 2)


async def test_a_fake_returns_and_records_the_typed_call(caller: Caller) -> None:
    """The test reads what the workflow has sent, as the contract's types."""
    probe = caller.probe
    probe.returns(Reply("faked"))
    handle = await caller.call(CallPlan(headers={"Tenant": "seven"}, transport="callback"))
    assert await handle.result() == Reply("faked")
    [call] = probe.calls
    assert (call.endpoint, call.service, call.operation) == ("payments", "ProbeService", "probe")
    assert call.input == ASK
    assert call.headers == {"tenant": "seven"}
    assert not call.is_canceled


@pytest.mark.parametrize("function", [doubled, lambda ask: Reply(ask.text * 2)])
async def test_a_fake_runs_a_function_of_the_input(
    caller: Caller, function: Callable[[Ask], Reply | Awaitable[Reply]]
) -> None:
    """The function may be `async`."""
    caller.probe.runs(function)
    assert await (await caller.call(CallPlan(transport="wait"))).result() == Reply("hellohello")


@pytest.mark.parametrize("after", [0.0, 0.5])
@pytest.mark.parametrize(
    "error",
    [
        ApplicationError("declined", {"code": 51}, type="Declined", non_retryable=True),
        CancelledError("operation canceled"),
    ],
)
async def test_a_fake_fails_with_the_cause_that_the_workflow_gets(
    caller: Caller, error: FailureError, after: float
) -> None:
    """Type, message and details are those of production."""
    caller.probe.fails(error, after=timedelta(seconds=after))
    cause = await caller.error()
    assert type(cause) is type(error)
    assert str(cause) == str(error)
    if isinstance(cause, ApplicationError) and isinstance(error, ApplicationError):
        assert (cause.type, cause.details, cause.non_retryable) == ("Declined", ({"code": 51},), True)


async def test_a_fake_refuses_a_start(caller: Caller) -> None:
    """A HandlerError is the handler's answer to the start."""
    caller.probe.fails(HandlerError("not today", type=HandlerErrorType.UNAUTHORIZED))
    cause = await caller.error()
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.UNAUTHORIZED
    assert "not today" in str(cause)


async def test_an_input_that_is_not_the_contract_s_is_refused(server: Server) -> None:
    """The answer is that of a handler: it names the field."""
    client = await Client.connect(server.address, namespace=CALLER)
    with FakeEndpoints() as fakes:
        async with running(client, fakes) as caller:
            caller.probe.returns(Reply("never"))
            name = f"wrong-{uuid.uuid4().hex[:8]}"
            answer = await client.execute_workflow(WrongCaller.run, id=name, task_queue=caller.queue)
    assert answer == "the input is not a Ask: key (TypeError)"


async def test_days_pass_in_a_moment_where_the_server_skips_time(skipping: Client) -> None:
    """A call of two days, and one that no outcome ends before its deadline of thirty days."""
    with FakeEndpoints() as fakes:
        async with running(skipping, fakes) as caller:
            probe = caller.probe
            probe.returns(Reply("late"), after=timedelta(days=2))
            handle = await caller.call(CallPlan(deadline=30 * DAY))
            assert await handle.result() == Reply("late")
            description = await handle.describe()
            assert description.close_time is not None
            passed = description.close_time - description.start_time
            assert timedelta(days=2) <= passed < timedelta(days=2, minutes=1)
            probe.never()
            # An attempt that stayed open at the deadline would take its whole timeout of half a minute.
            error = await asyncio.wait_for(caller.error(CallPlan(deadline=30 * DAY)), 25)
            assert isinstance(error, TemporalTimeoutError)
            assert len(probe.calls) == 2


@pytest.mark.parametrize("ends", ["returns", "fails", "refuses"])
async def test_a_call_with_a_short_deadline_gets_the_answer_that_is_there(
    caller: Caller, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline of a second, here of 20, passes only if the operation takes longer."""
    monkeypatch.setattr("bridge.testing.fakes.LAST_ATTEMPT", timedelta(seconds=30))
    refusal = HandlerError("no", type=HandlerErrorType.UNAUTHORIZED)
    caller.probe.fails(refusal if ends == "refuses" else ApplicationError("declined", type="Declined"))
    if ends == "returns":
        caller.probe.returns(Reply("in time"))
        assert await (await caller.call(CallPlan(deadline=20))).result() == Reply("in time")
    else:
        error = await caller.error(CallPlan(deadline=20))
        assert isinstance(error, HandlerError if ends == "refuses" else ApplicationError)


@pytest.mark.parametrize("plan", [CallPlan(deadline=2), CallPlan(start_to_close=2)])
async def test_a_call_that_never_ends_ends_by_its_limits(caller: Caller, plan: CallPlan) -> None:
    """The error is the timeout of production."""
    caller.probe.never()
    assert isinstance(await caller.error(plan), TemporalTimeoutError)


async def test_a_start_that_is_refused_for_the_moment_is_repeated_until_the_deadline(caller: Caller) -> None:
    """The pauses are at least a second, and the handler's error is the cause of the timeout."""
    caller.probe.fails(HandlerError("busy", type=HandlerErrorType.UNAVAILABLE))
    handle = await caller.call(CallPlan(deadline=3))
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    timeout = raised.value.cause.cause
    assert isinstance(timeout, TemporalTimeoutError)
    assert "busy" in str(timeout.cause)
    started = [each.activity_task_started_event_attributes.attempt for each in (await handle.fetch_history()).events]
    assert 2 <= max(started) <= 5


@pytest.mark.parametrize("kind", [CancellationType.WAIT_COMPLETED, CancellationType.WAIT_REQUESTED])
async def test_a_cancel_ends_the_fake_operation(caller: Caller, kind: CancellationType) -> None:
    """The workflow gets the cancellation, and the recorded call shows it."""
    probe = caller.probe
    probe.never()
    handle = await caller.call(CallPlan(cancellation=int(kind), cancel_after=True))

    async def called() -> None:
        assert probe.calls

    await assert_eventually(called)
    await handle.signal(CallingWorkflow.cancel_call)
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError | CancelledError)
    assert probe.calls[0].is_canceled


async def test_a_real_server_ends_a_canceled_operation_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cancel does not wait until the call asks again, here after half an hour."""
    monkeypatch.setattr("bridge.testing.fakes._SHORTEST_PAUSE", timedelta(hours=1))
    client = await Client.connect(server.address, namespace=CALLER)
    with FakeEndpoints() as fakes:
        async with running(client, fakes) as caller:
            caller.probe.never()
            handle = await caller.call(CallPlan(deadline=3600, cancel_after=True))

            async def between_two_attempts() -> None:
                pending = (await handle.describe()).raw_description.pending_activities
                assert [each for each in pending if each.HasField("next_attempt_schedule_time")]

            await assert_eventually(between_two_attempts)
            await handle.signal(CallingWorkflow.cancel_call)
            with pytest.raises(WorkflowFailureError):
                await asyncio.wait_for(handle.result(), 30)
            assert caller.probe.calls[0].is_canceled


@pytest.mark.parametrize("is_known", [True, False])
async def test_an_unexpected_call_fails_at_once_and_fails_the_test(server: Server, is_known: bool) -> None:
    """The workflow may catch the error. The test fails nevertheless, and both messages name the call."""
    client = await Client.connect(server.address, namespace=CALLER)
    fakes = FakeEndpoints()

    async def body() -> None:
        with fakes:
            async with running(client, fakes) as caller:
                caller.fakes.on(ProbeService.shared, service=ProbeService, endpoint="payments").never()
                cause = await caller.error(CallPlan(endpoint="payments" if is_known else "elsewhere"))
                assert "unexpected call of ProbeService/probe" in str(cause)

    with pytest.raises(AssertionError, match="unexpected call of ProbeService/probe through endpoint"):
        await body()


async def test_an_error_in_the_test_s_function_fails_the_test(server: Server) -> None:
    """An assertion in the function is an assertion of the test."""
    client = await Client.connect(server.address, namespace=CALLER)

    def judge(ask: Ask) -> Reply:
        assert ask.text == "other"
        return Reply("")

    async def body() -> None:
        with FakeEndpoints() as fakes:
            async with running(client, fakes) as caller:
                caller.probe.runs(judge)
                await caller.error()

    with pytest.raises(AssertionError, match="fake of ProbeService/probe raised AssertionError"):
        await body()


@pytest.mark.parametrize("how", ["returns", "runs", "fails"])
async def test_a_value_that_cannot_be_encoded_fails_the_test(server: Server, how: str) -> None:
    """The call ends at once, the function runs once, and the message names the operation."""
    client = await Client.connect(server.address, namespace=CALLER)
    wrong, asked = cast("Reply", object()), list[Ask]()

    def answers(ask: Ask) -> Reply:
        asked.append(ask)
        return wrong

    async def body() -> None:
        with FakeEndpoints() as fakes:
            async with running(client, fakes) as caller:
                caller.probe.returns(wrong)
                if how == "runs":
                    caller.probe.runs(answers)
                if how == "fails":
                    caller.probe.fails(ApplicationError("declined", wrong))
                await caller.error()
                assert len(caller.probe.calls) == 1

    with pytest.raises(AssertionError, match="fake of ProbeService/probe raised TypeError"):
        await asyncio.wait_for(body(), 20)
    assert len(asked) == (how == "runs")


async def test_a_fake_that_is_not_entered_is_refused(server: Server) -> None:
    """Otherwise an unexpected call would pass unnoticed where the workflow catches its error."""
    client = await Client.connect(server.address, namespace=CALLER)
    with pytest.raises(RuntimeError, match="with FakeEndpoints"):
        Worker(client, task_queue="any", workflows=[CallingWorkflow], plugins=[FakeEndpoints()])


@pytest.mark.parametrize("plugins", [[], [FakeEndpoints()]])
async def test_a_replay_needs_no_settings(
    server: Server, plugins: list[FakeEndpoints], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a plugin, or with the fakes, which share the bridge's modules with the sandbox."""
    monkeypatch.delenv("BRIDGE_CONFIG", raising=False)
    client = await Client.connect(server.address, namespace=CALLER)
    with FakeEndpoints() as fakes:
        async with running(client, fakes) as caller:
            caller.probe.returns(Reply("faked"))
            handle = await caller.call()
            await handle.result()
    await Replayer(workflows=[CallingWorkflow], plugins=plugins).replay_workflow(await handle.fetch_history())
