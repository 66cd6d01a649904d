"""The team's `authorize` on a real handler service: nothing starts unless it returns None."""

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import NexusOperationError
from temporalio.service import RPCError

from bridge.errors import UnavailableError
from bridge.runtime.settings import SettingsError
from bridge.security.signatures import MessageSigner
from bridge.temporal.connection import Namespace
from handler.authorization import Authorize
from handler.delivery.operation_token import OperationToken
from handler.service import Served
from handler.user_code.workflow_id import TIMEOUT
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER
from tests.support.peer import Answered, send, start
from tests.support.services import Quotes
from tests.support.targets import Ask, ProbeWorkflow, Reply
from tests.support.world import World, clock, events, running_world

SECRET = "the-teams-own-secret"


def decide(caller: str, operation: str, ask: Ask) -> Any:
    """Returns or raises what the test chooses."""
    assert isinstance(ask, Ask)
    match ask.text:
        case "refused":
            message = f"{caller} may not call {operation} for {ask.key}"
            raise PermissionError(message)
        case "False" | "True" | "''" as literal:
            return eval(literal)
        case "OSError":
            Path("/").write_bytes(b"")
        case "number":
            raise PermissionError(13, SECRET)
        case "KeyError":
            raise KeyError(SECRET)
        case "SystemExit":
            raise SystemExit(SECRET)
        case "CancelledError":
            raise asyncio.CancelledError(SECRET)
        case "HandlerError":
            raise HandlerError(SECRET, type=HandlerErrorType.BAD_REQUEST)
        case "UnavailableError":
            raise UnavailableError(SECRET)
        case _:
            pass
    return None


async def decide_later(caller: str, operation: str, ask: Ask) -> Any:
    await asyncio.sleep(0)
    return decide(caller, operation, ask)


class Deciding:
    """An object with an `async` call."""

    async def __call__(self, caller: str, operation: str, ask: Ask) -> Any:
        return decide(caller, operation, ask)


@pytest_asyncio.fixture(
    loop_scope="session", scope="module", params=[decide, decide_later, Deciding()], ids=["plain", "async", "object"]
)
async def quiet(server: Server, request: Any) -> AsyncIterator[World]:
    def prepare(world: World) -> None:
        world.authorize = request.param
        world.services = [Quotes()]

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=prepare) as world:
        yield world


OPERATIONS = ["ProbeService/probe", "QuoteService/quote", "QuoteService/lookup"]


async def ask(world: World, operation: str, text: str, key: str) -> Answered:
    message = start(world, {"key": key, "text": text})
    message.url = message.url.replace("ProbeService/probe", operation)
    return await send(message, MessageSigner(world.keys.start))


async def assert_nothing_ran(world: World, key: str) -> None:
    with pytest.raises(RPCError):
        await world.target(Ask(key)).describe()
    assert not world.services[0].calls


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_refused_start_is_a_403_with_the_words_of_the_team(quiet: World, operation: str) -> None:
    """The caller's name, the operation and the decoded input are known to the function."""
    key = quiet.key()
    answer = await ask(quiet, operation, "refused", key)
    assert (answer.status, answer.type, answer.is_signed) == (403, "UNAUTHORIZED", True)
    assert answer.message == f"{CALLER} may not call {operation} for {key}"
    await assert_nothing_ran(quiet, key)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "text",
    [
        "False",
        "True",
        "''",
        "number",
        "KeyError",
        "SystemExit",
        "CancelledError",
        "HandlerError",
        "UnavailableError",
        "OSError",
    ],
)
async def test_a_function_that_fails_starts_nothing_and_says_nothing(
    quiet: World, operation: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller repeats its start. Neither the answer nor the log has the words of the error."""
    key = quiet.key()
    with caplog.at_level(logging.DEBUG):
        answer = await ask(quiet, operation, text, key)
    assert (answer.status, answer.type, answer.failure["details"]["retryableOverride"]) == (500, "INTERNAL", True)
    assert answer.message == "the handler could not decide whether this caller may start this operation"
    assert SECRET not in caplog.text
    [logged] = [each for each in caplog.records if each.message.startswith("bridge.authorize_failed")]
    assert operation in logged.message
    assert logged.message.endswith("To refuse a start, authorize raises PermissionError")
    await assert_nothing_ran(quiet, key)


async def test_an_allowed_start_starts(quiet: World) -> None:
    """For each kind of operation."""
    answers = [await ask(quiet, operation, "yes", quiet.key()) for operation in OPERATIONS]
    assert [each.status for each in answers] == [201, 200, 200]
    quiet.services[0].calls.clear()


async def test_the_token_of_an_operation_does_not_replace_the_permission(quiet: World) -> None:
    """A caller can make up a token. Without the permission it would get the outcome of another call's run."""
    key, token = quiet.key(), "Nexus-Operation-Token"
    message = start(quiet, {"key": key, "text": "yes"}, operation="shared")
    owner = await send(message, MessageSigner(quiet.keys.start))
    assert owner.status == 201
    namespace_id = await Namespace(quiet.handler_client, clock=clock).id()
    for text, status in (("refused", 403), ("yes", 201)):
        message = start(quiet, {"key": key, "text": text}, operation="shared", request_id="r-2")
        message.headers[token] = OperationToken(namespace_id, "r-2", f"shared-{key}").encode()
        assert (await send(message, MessageSigner(quiet.keys.start))).status == status


async def test_a_stranger_is_not_asked_about(quiet: World) -> None:
    """The function sees authenticated callers only: a refusal would show who may do what."""
    message = start(quiet, {"key": quiet.key(), "text": "refused"})
    assert (await send(message, MessageSigner(quiet.keys.completion))).status == 401


async def test_a_function_that_takes_too_long_starts_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain one blocks a thread and no other request."""
    entered, opened = threading.Event(), threading.Event()

    def block(_caller: str, _operation: str, ask: Ask) -> None:
        if ask.text == "block":
            entered.set()
            assert opened.wait(60)

    monkeypatch.setattr("handler.start.starter.TIMEOUT", TIMEOUT / 16)
    async with running_world(
        server, without=("caller", "handler", "receiver"), prepare=functools.partial(authorized, block)
    ) as world:
        keys = [world.key(), world.key()]
        blocked = asyncio.create_task(ask(world, OPERATIONS[0], "block", keys[0]))
        await asyncio.to_thread(entered.wait, 60)
        assert (await ask(world, OPERATIONS[0], "pass", keys[1])).status == 201
        assert (await blocked).status == 500
        opened.set()
        with pytest.raises(RPCError):
            await world.target(Ask(keys[0])).describe()


def authorized(function: Authorize, world: World) -> None:
    world.authorize = function


async def test_a_call_that_is_refused_fails_with_the_words_and_one_that_runs_goes_on(server: Server) -> None:
    """The function counts: it allows one call. Repeats and renewals of the allowed call are no further calls."""
    seen: list[str] = []

    def once(_caller: str, _operation: str, ask: Ask) -> None:
        seen.append(ask.key)
        if len(seen) > 1:
            message = "the budget of today is used up"
            raise PermissionError(message)

    async with running_world(server, prepare=functools.partial(authorized, once)) as world:
        # The answer to the first start is lost, so that the start is repeated without a token.
        lost: list[int] = []

        def lose(_: Any, answer: Any) -> Any:
            if answer.status == 201 and not lost:
                lost.append(answer.status)
                answer.set_status(502)
            return answer

        world.service.change = lose
        allowed = Ask(world.key(), "wait")
        handle = await world.call(allowed, CallPlan(first_lease=2, renewal=1))
        await world.until_attempt(handle, 4)
        refused = await world.call(Ask(world.key()), CallPlan(first_lease=600))
        with pytest.raises(WorkflowFailureError) as raised:
            await refused.result()
        error = raised.value.cause
        assert isinstance(error, NexusOperationError)
        assert isinstance(error.cause, HandlerError)
        assert (error.cause.type, error.cause.message) == (
            HandlerErrorType.UNAUTHORIZED,
            "the budget of today is used up",
        )
        # A start without a token, a repeat of it, and the refused one: renewals name their operation and are not asked.
        assert len(seen) == 3
        await world.target(allowed).signal("say", "paid")
        assert await handle.result() == Reply("paid")


async def test_a_native_call_is_authorized_by_the_worker(server: Server) -> None:
    """The plugin has the same function. The caller's name begins with `nexus:`."""
    callers: list[str] = []

    def decide_native(caller: str, operation: str, ask: Ask) -> None:
        callers.append(caller)
        decide(caller, operation, ask)

    def prepare(world: World) -> None:
        world.authorize = decide_native
        world.handler_options = {"nexus": True}

    async with running_world(server, without=("service", "receiver"), prepare=prepare) as world:
        await world.create_nexus_endpoint()
        handle = await world.call(Ask(world.key(), text="refused"), world.plan("nexus"))
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        assert "may not call ProbeService/probe" in str(raised.value.cause.__cause__)
        assert "NEXUS_OPERATION_STARTED" not in await events(handle)
        assert await (await world.call(Ask(world.key(), text="yes"), world.plan("nexus"))).result() == Reply("yes")
        assert {each.partition(":")[0] for each in callers} == {"nexus"}


@pytest.mark.parametrize("function", [lambda: None, lambda _caller, _operation: None, "yes", True])
def test_a_function_of_other_parameters_is_refused_at_start(function: Any) -> None:
    """Else every start would fail."""
    module = ModuleType("served")
    vars(module).update(authorize=function, probe=ProbeWorkflow)
    with pytest.raises(SettingsError, match=r"served.authorize must be a function of \(caller, operation, input\)"):
        Served.by(module)
