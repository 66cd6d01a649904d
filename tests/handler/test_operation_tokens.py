"""An operation token grants nothing: the route authenticates the caller, and the memo of the run decides."""

import json
import secrets
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from multidict import CIMultiDict
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.security.signatures import MessageKind, MessageSigner
from handler.delivery.operation_token import OperationToken
from handler.start import canceler
from handler.start.runs import Run, find_run
from scripts.environment.server import Server
from tests.support.helpers import CALLER, assert_eventually, key_set
from tests.support.peer import Answered, Message, send, start
from tests.support.targets import Ask
from tests.support.world import World, events, running_world

OTHER = key_set()


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def quiet(server: Server) -> AsyncIterator[World]:
    """A handler service with a second caller, and without workers."""

    def add_caller(world: World) -> None:
        settings = world.handler_settings
        other = settings.callers[CALLER].model_copy(update={"start_keys": OTHER})
        callers = {**settings.callers, "other": other}
        world.override_handler_settings(settings.model_copy(update={"callers": callers}))

    async with running_world(server, without=("caller", "handler", "receiver"), prepare=add_caller) as made:
        yield made


async def started(world: World, key: str, *, caller: str = CALLER, request_id: str | None = None) -> str:
    """Start a target as *caller*. Returns the operation token."""
    message = start(world, {"key": key}, request_id=request_id)
    message.url = message.url.replace(f"/c/{CALLER}/", f"/c/{caller}/")
    answer = await send(message, signer(world, caller))
    assert answer.status == 201
    return str(json.loads(answer.body)["token"])


def signer(world: World, caller: str = CALLER) -> MessageSigner:
    return MessageSigner(world.keys.start if caller == CALLER else OTHER)


async def cancel(world: World, token: str, *, caller: str = CALLER, operation: str = "probe") -> Answered:
    url = f"{world.service.url}/c/{caller}/ProbeService/{operation}/cancel"
    message = Message(url, CIMultiDict({"Nexus-Operation-Token": token}), b"", kind=MessageKind.CANCEL)
    return await send(message, signer(world, caller))


async def is_asked_to_cancel(world: World, key: str) -> bool:
    target = world.handler_client.get_workflow_handle(f"probe-{key}")
    return "WORKFLOW_EXECUTION_CANCEL_REQUESTED" in await events(target)


async def exists(world: World, key: str) -> bool:
    try:
        await world.handler_client.get_workflow_handle(f"probe-{key}").describe()
    except RPCError:
        return False
    return True


async def test_only_the_caller_of_an_operation_may_cancel_it(quiet: World) -> None:
    """A correct token of another caller is refused like a token of nothing."""
    key = quiet.key()
    token = await started(quiet, key)
    answers = [await cancel(quiet, each, caller="other") for each in (token, token[:-3] + "AAA")]
    assert [(each.status, each.message, each.is_signed) for each in answers] == [(404, "no such operation", True)] * 2
    assert not await is_asked_to_cancel(quiet, key)
    assert (await cancel(quiet, token)).status == 202
    assert await is_asked_to_cancel(quiet, key)


async def test_a_cancel_reaches_the_run_that_continues_the_operation(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run continues as new after the service has found it. The 202 must not be for nothing."""
    async with running_world(server, without=("caller", "receiver")) as world:
        message = start(world, {"key": world.key("on"), "behaviour": "continue on signal"})
        token = json.loads((await send(message, signer(world))).body)["token"]
        target = world.target(Ask(world.key("on")))

        async def found_before(client: Client, workflow_id: str) -> Run | None:
            found = await find_run(client, workflow_id)
            assert found is not None
            await target.signal("say", "and wait")

            async def continued() -> None:
                assert (await target.describe()).run_id != found.ref.run_id

            await assert_eventually(continued)
            return found

        monkeypatch.setattr(canceler, "find_run", found_before)
        assert (await cancel(world, token)).status == 202
        assert await is_asked_to_cancel(world, world.key("on"))


@pytest.mark.parametrize("operation", ["shared", "flaky"])
async def test_a_token_of_another_operation_is_refused(quiet: World, operation: str) -> None:
    """The run has another workflow type than the operation in the route."""
    key = quiet.key()
    answer = await cancel(quiet, await started(quiet, key), operation=operation)
    assert (answer.status, answer.is_signed) == (404, True)
    assert not await is_asked_to_cancel(quiet, key)


async def test_a_forged_token_is_refused_and_does_not_show_whether_a_run_exists(quiet: World) -> None:
    """The forger knows every name: the answer is the same for a run of another caller, of no caller, and for no run."""
    key, by_hand = quiet.key(), quiet.key()
    token = OperationToken.decode(await started(quiet, key, caller="other"))
    assert token is not None
    await quiet.handler_client.start_workflow(
        "ProbeWorkflow", {"key": by_hand}, id=f"probe-{by_hand}", task_queue=quiet.payment_queue
    )
    kept = quiet.key()
    own = await started(quiet, kept)
    named = OperationToken.decode(own)
    assert named is not None
    forged = {
        "another caller's": token,
        "no caller's": token._replace(workflow_id=f"probe-{by_hand}"),
        "no run's": token._replace(workflow_id=f"probe-{quiet.key()}"),
        "no workflow id": token._replace(workflow_id=""),
        "too long": token._replace(workflow_id="x" * 2000),
        "another namespace's": named._replace(namespace_id="0190a1b2-0000-7000-8000-000000000001"),
    }
    answers = {name: await cancel(quiet, each.encode()) for name, each in forged.items()}
    answers |= {"spare text": await cancel(quiet, f"{own}="), "text": await cancel(quiet, "token")}
    assert {name: (each.status, each.message) for name, each in answers.items()} == dict.fromkeys(
        answers, (404, "no such operation")
    )
    assert not await is_asked_to_cancel(quiet, key)
    assert not await is_asked_to_cancel(quiet, kept)


async def renewed(world: World, key: str, token: str, *, request_id: str | None = None) -> Answered:
    message = start(world, {"key": key}, request_id=request_id)
    message.headers["Nexus-Operation-Token"] = token
    return await send(message, signer(world))


async def test_a_renewal_with_its_token_finds_its_run(quiet: World) -> None:
    """The answer repeats the token."""
    key, request_id = quiet.key(), secrets.token_hex(8)
    token = await started(quiet, key, request_id=request_id)
    answer = await renewed(quiet, key, token, request_id=request_id)
    assert (answer.status, json.loads(answer.body)["token"]) == (201, token)


@pytest.mark.parametrize("key", ["one", "unknown/operation"])
async def test_a_renewal_with_the_token_of_another_handler_is_a_signed_421(quiet: World, key: str) -> None:
    """It starts nothing, whether the operation exists here or not, and the text says what to do."""
    key = quiet.key(key)
    foreign = OperationToken("0190a1b2-0000-7000-8000-000000000001", "request", f"probe-{key}")
    for token in (foreign.encode(), "the token of another product"):
        message = start(quiet, {"key": key}, operation="unknown" if "/" in key else "probe")
        message.headers["Nexus-Operation-Token"] = token
        answer = await send(message, signer(quiet))
        assert (answer.status, answer.type, answer.is_signed) == (421, "UNAVAILABLE", True)
        assert "point the endpoint's url back" in answer.message
    assert not await exists(quiet, key)


async def test_a_renewal_whose_run_is_gone_starts_nothing(quiet: World) -> None:
    """The operation was started here, but no run of it is left: its outcome is unknown, and the answer is final."""
    key, taken = quiet.key(), quiet.key()
    token = OperationToken.decode(await started(quiet, quiet.key()))
    assert token is not None
    await started(quiet, taken, caller="other")
    gone = await renewed(quiet, key, token._replace(workflow_id=f"probe-{key}").encode())
    assert (gone.status, gone.failure["metadata"]["bridge"], gone.is_signed) == (404, "outcome-unknown", True)
    assert not await exists(quiet, key)
    held = await renewed(quiet, taken, token._replace(workflow_id=f"probe-{taken}").encode())
    assert (held.status, held.message) == (404, gone.message)
