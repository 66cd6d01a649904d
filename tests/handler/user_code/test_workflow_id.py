"""The team's `check` and `workflow_id` on a real handler service: if one of them fails, no run starts."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import aiohttp
import nexusrpc
import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from pydantic import BaseModel
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError, NexusOperationError
from temporalio.service import RPCError

from bridge.security.signatures import MessageSigner
from bridge.workflow.call import Transport
from bridge.workflow.targets import Target, external_target
from handler.user_code import workflow_id as module
from handler.user_code.threads import BoundedThreads
from scripts.environment.server import Server
from tests.support.peer import Answered, send, start
from tests.support.targets import Ask, ProbeService, Reply
from tests.support.world import World, running_world


class Amount(BaseModel):
    amount: int


async def later(_: Ask) -> None:
    """A plain check that returns a coroutine."""


class Gate:
    """A check that blocks until the test releases it."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Semaphore(0), threading.Event()

    def __call__(self, ask: Ask) -> None:
        if ask.behaviour == "block":
            self.entered.release()
            assert self.opened.wait(60)


def check(ask: Ask) -> Any:
    """Returns or raises what the test chooses."""
    match ask.behaviour.removeprefix("check "):
        case "True" | "False" | "''" | "0" | "[]" as literal:
            return eval(literal)
        case "text":
            return ask.text
        case "coroutine":
            return later(ask)
        case "generator":
            return (each for each in ask.text)
        case "ValueError":
            raise ValueError("too much")
        case "ValidationError":
            Amount.model_validate({"amount": ask.text})
        case "KeyError":
            raise KeyError(ask.text)
        case "SystemExit":
            raise SystemExit(ask.text)
        case "StopIteration":
            raise StopIteration(ask.text)
        case "CancelledError":
            raise asyncio.CancelledError(ask.text)
        case "ConnectionError":
            raise ConnectionResetError(ask.text)
        case "TimeoutError":
            raise TimeoutError(ask.text)
        case "HandlerError":
            raise HandlerError("not today", type=HandlerErrorType.RESOURCE_EXHAUSTED)
        case "ApplicationError":
            raise ApplicationError("not now")
        case "final ApplicationError":
            raise ApplicationError("never", non_retryable=True)
        case _:
            pass
    return None


def workflow_id(ask: Ask) -> Any:
    """Returns what the test chooses."""
    match ask.behaviour.removeprefix("id "):
        case "None":
            return None
        case "number":
            return 7
        case "bytes":
            return b"judged"
        case "coroutine":
            return later(ask)
        case "empty":
            return ""
        case "long":
            return "x" * 1001
        case "long in bytes":
            return "\u20ac" * 400
        case "surrogate":
            return "judged-\ud800"
        case "raises ValueError":
            raise ValueError(ask.text)
        case "raises KeyError":
            raise KeyError(ask.text)
        case "raises ConnectionError":
            raise ConnectionResetError(ask.text)
        case _:
            return f"judged-{ask.key}"


def judged(check: Callable[[Any], Any], **options: Any) -> Target:
    return external_target(
        service=ProbeService,
        operation=ProbeService.foreign,
        workflow_type="foreign-type",
        task_queue="none",
        workflow_id=workflow_id,
        check=check,
        **options,
    )


@contextlib.asynccontextmanager
async def judging(server: Server, target: Target, executor: BoundedThreads | None = None) -> AsyncIterator[World]:
    """A handler service that serves only *target*, without a worker, so that started runs make no progress."""

    def prepare(world: World) -> None:
        world.targets = [target]
        world.executor = executor or world.executor

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="session", scope="module", name="quiet")
async def one_quiet_world(server: Server) -> AsyncIterator[World]:
    async with judging(server, judged(check)) as world:
        yield world


async def ask(world: World, **what: Any) -> Answered:
    message = start(world, {"key": world.key(), **what}, operation="foreign")
    return await send(message, MessageSigner(world.keys.start))


async def assert_no_run(world: World) -> None:
    """The service has started none of its targets."""
    found = world.handler_client.list_workflows("WorkflowType = 'foreign-type'")
    assert not [each.id async for each in found if world.id in each.id]


FINAL = (500, "INTERNAL", False)
REFUSED = (400, "BAD_REQUEST", False)
AGAIN = (503, "UNAVAILABLE", True)


@pytest.mark.parametrize(
    ("behaviour", "expected", "says"),
    [
        *((f"check {each}", FINAL, "check returned bool and not None") for each in ("True", "False")),
        ("check ''", FINAL, "check returned str"),
        ("check 0", FINAL, "check returned int"),
        ("check []", FINAL, "check returned list"),
        ("check text", FINAL, "check returned str"),
        ("check coroutine", FINAL, "check returned coroutine"),
        ("check generator", FINAL, "check returned generator"),
        ("check ValueError", REFUSED, "too much"),
        ("check ValidationError", REFUSED, "amount (int_parsing)"),
        ("check KeyError", FINAL, "check raised KeyError"),
        ("check SystemExit", FINAL, "check raised SystemExit"),
        ("check StopIteration", FINAL, "check raised StopIteration"),
        ("check CancelledError", FINAL, "check raised CancelledError"),
        ("check ConnectionError", AGAIN, "check is unavailable (ConnectionResetError)"),
        ("check TimeoutError", AGAIN, "check is unavailable (TimeoutError)"),
        ("check HandlerError", (429, "RESOURCE_EXHAUSTED", True), "not today"),
        ("check ApplicationError", (500, "INTERNAL", True), "not now"),
        ("check final ApplicationError", FINAL, "never"),
        ("id None", FINAL, "workflow_id returned NoneType and not str"),
        ("id number", FINAL, "workflow_id returned int"),
        ("id bytes", FINAL, "workflow_id returned bytes"),
        ("id coroutine", FINAL, "workflow_id returned coroutine"),
        ("id empty", REFUSED, "has 0 bytes"),
        ("id long", REFUSED, "has 1001 bytes"),
        ("id long in bytes", REFUSED, "has 1200 bytes"),
        ("id surrogate", REFUSED, "not valid Unicode"),
        ("id raises ValueError", FINAL, "workflow_id raised ValueError"),
        ("id raises KeyError", FINAL, "workflow_id raised KeyError"),
        ("id raises ConnectionError", AGAIN, "workflow_id is unavailable"),
    ],
)
async def test_nothing_starts_unless_both_functions_accept(
    quiet: World, caplog: pytest.LogCaptureFixture, behaviour: str, expected: tuple[int, str, bool], says: str
) -> None:
    """The answer names the function and says whether the call may be retried. It does not quote the input."""
    answer = await ask(quiet, behaviour=behaviour, text="4111-1111")
    assert (answer.status, answer.type, answer.failure["details"]["retryableOverride"]) == expected
    assert says in answer.message
    assert "4111-1111" not in answer.message + caplog.text
    if expected == FINAL and behaviour != "check final ApplicationError":
        [record] = [each for each in caplog.records if each.levelname == "ERROR"]
        assert says.partition(" ")[0] in record.getMessage()
        assert vars(record)["bridge.operation"] == "foreign"
    await assert_no_run(quiet)


async def test_an_input_that_both_functions_accept_is_started(quiet: World) -> None:
    """The run has the id that `workflow_id` returned."""
    key = quiet.key("accepted")
    message = start(quiet, {"key": key}, operation="foreign")
    assert (await send(message, MessageSigner(quiet.keys.start))).status == 201
    await quiet.handler_client.get_workflow_handle(f"judged-{key}").terminate()


@pytest.mark.parametrize("transport", ["callback", "poll", "nexus"])
async def test_a_call_that_met_a_broken_check_ends_at_once(server: Server, transport: Transport) -> None:
    """The call fails with the reason, over every transport, because every repeat would fail equally."""

    def prepare(world: World) -> None:
        world.handler_options = {"nexus": True}

    async with running_world(server, prepare=prepare) as world:
        await world.create_nexus_endpoint()
        probe = Ask(world.key(), behaviour="buggy check")
        with pytest.raises(WorkflowFailureError) as raised:
            await (await world.call(probe, world.plan(transport))).result()
        assert isinstance(raised.value.cause, NexusOperationError)
        cause = raised.value.cause.cause
        assert isinstance(cause, HandlerError)
        assert (cause.type, cause.retryable) == (HandlerErrorType.INTERNAL, False)
        chain = f"{cause.message} {cause.__cause__}"
        assert "the operation's check raised KeyError" in chain
        assert len(world.service.requests) == (transport != "nexus")
        with pytest.raises(RPCError):
            await world.target(probe).describe()


async def _livez(world: World) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{world.service.url}/livez") as response:
        return response.status


async def test_a_check_that_blocks_keeps_neither_health_nor_other_starts_waiting(server: Server) -> None:
    """The check runs in a separate thread."""
    gate = Gate()
    async with judging(server, judged(gate)) as world:
        blocked = asyncio.create_task(ask(world, behaviour="block"))
        assert await asyncio.to_thread(gate.entered.acquire, timeout=60)
        assert await _livez(world) == 200
        assert (await ask(world)).status == 201
        assert not blocked.done()
        gate.opened.set()
        assert (await blocked).status == 201


async def test_calls_beyond_the_limit_are_answered_with_a_delay(server: Server) -> None:
    """The answer is 503 with a delay. The other calls are answered, and their places are free afterwards."""
    gate = Gate()
    async with judging(server, judged(gate), BoundedThreads(threads=1, waiting=0)) as world:
        running = asyncio.create_task(ask(world, behaviour="block"))
        assert await asyncio.to_thread(gate.entered.acquire, timeout=60)
        answer = await ask(world)
        assert (answer.status, answer.type, answer.headers["Retry-After"]) == (503, "UNAVAILABLE", "1")
        assert await _livez(world) == 200
        gate.opened.set()
        assert (await running).status == 201
        assert (await ask(world)).status == 201


async def test_a_check_that_does_not_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gets 503 before its own request times out."""
    monkeypatch.setattr(module, "TIMEOUT", timedelta(milliseconds=50))
    gate = Gate()
    async with judging(server, judged(gate)) as world:
        answer = await ask(world, behaviour="block")
        assert (answer.status, answer.type) == (503, "UNAVAILABLE")
        assert "took too long" in answer.message
        gate.opened.set()


async def _started(world: World, key: str, **what: Any) -> Answered:
    message = start(world, {"key": key, **what}, operation="foreign")
    return await send(message, MessageSigner(world.keys.start))


@pytest.mark.parametrize("is_closed", [False, True], ids=["open", "closed"])
async def test_another_input_under_the_same_id_is_a_conflict_if_the_operation_refuses_it(
    server: Server, *, is_closed: bool
) -> None:
    """An equal input still finds its run. A second caller is still refused."""
    async with judging(server, judged(check, on_input_mismatch="refuse")) as world:
        key = world.key()
        assert (await _started(world, key, text="12.50")).status == 201
        if is_closed:
            await world.handler_client.get_workflow_handle(f"judged-{key}").terminate()
        other = await _started(world, key, text="99")
        assert (other.status, other.type) == (409, "CONFLICT")
        assert "another input" in other.message
        assert other.failure["details"]["retryableOverride"] is False
        assert (await _started(world, key, text="12.50")).status == (424 if is_closed else 201)


@pytest.mark.parametrize("transport", ["callback", "nexus"])
async def test_a_call_that_conflicts_fails_and_leaves_the_first_alone(server: Server, transport: Transport) -> None:
    """The call fails at once with the reason, over both transports. A call with the same input waits for the run."""

    def prepare(world: World) -> None:
        world.handler_options = {"nexus": True}

    async with running_world(server, prepare=prepare) as world:
        await world.create_nexus_endpoint()
        paid, other = (Ask(world.id, text=text) for text in ("12.50", "99"))
        plan = world.plan(transport, operation="strict")
        calls = [await world.call(paid, plan)]
        target = await world.until_started(paid)
        calls.append(await world.call(paid, plan))
        with pytest.raises(WorkflowFailureError) as raised:
            await (await world.call(other, plan)).result()
        assert isinstance(raised.value.cause, NexusOperationError)
        cause = raised.value.cause.cause
        assert isinstance(cause, HandlerError)
        assert "belongs to a run with another input" in f"{cause.message} {cause.__cause__}"
        assert cause.retryable is False
        await target.signal("say", "paid")
        assert [await each.result() for each in calls] == [Reply("12.50")] * 2


async def test_another_input_under_the_same_id_attaches_by_default(quiet: World) -> None:
    """By default only the workflow id identifies a run."""
    key = quiet.key("attaching")
    assert (await _started(quiet, key, text="12.50")).status == 201
    answer = await _started(quiet, key, text="99")
    assert (answer.status, json.loads(answer.body)["state"]) == (201, "running")
    await quiet.handler_client.get_workflow_handle(f"judged-{key}").terminate()


async def test_a_run_whose_input_is_not_known_counts_as_one_with_another_input(server: Server) -> None:
    """A call may attach to a run that no call started. Such a run has no hash to compare."""
    async with judging(server, judged(check, on_input_mismatch="refuse", attach_across_callers=True)) as world:
        key = world.key()
        await world.handler_client.start_workflow("foreign-type", Ask(key), id=f"judged-{key}", task_queue="none")
        answer = await _started(world, key)
        assert (answer.status, answer.type) == (409, "CONFLICT")


def test_an_option_that_does_not_exist_is_refused() -> None:
    """A misspelled "refuse" must not count as "attach"."""
    with pytest.raises(ValueError, match="on_input_mismatch='Refuse' is not one of"):
        judged(check, on_input_mismatch="Refuse")


def test_operations_of_a_contract_are_not_functions() -> None:
    """The error names the object that was passed instead of a function."""
    with pytest.raises(TypeError, match="check: Operation is not a function"):
        judged(nexusrpc.Operation[Ask, Ask](name="x"))  # type: ignore[arg-type] # the mistake under test
