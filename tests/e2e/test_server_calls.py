"""Temporal's own server calls our handler service: a plain Nexus workflow, an endpoint with a URL target."""

import asyncio
import contextlib
import logging
import os
import re
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web
from multidict import CIMultiDict
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.nexus.v1 import EndpointTarget
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError
from temporalio.worker import Worker
from yarl import URL

from bridge.security.keys import KeySet
from handler.delivery.records import CallMemo
from handler.settings import HandlerSettings
from scripts.environment import temporal_cli
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.helpers import CALLER, assert_eventually, key_set
from tests.support.native import NativeCaller, NativePlan
from tests.support.services import Quotes
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

SERVER = "order-server"
"""The name of the caller's server in our handler's settings."""
PAGE = ROOT / "docs" / "interoperation.md"

Native = WorkflowHandle[NativeCaller, Reply]
Prepare = Callable[[World], None]


@pytest.fixture(scope="session")
def server(own_server: Server) -> Server:
    """Its HTTP port is known, which the calls' completions use."""
    return own_server


def takes_calls_of_the_server(server: Server, **peer: Any) -> Prepare:
    """The settings of the handler's second caller; *peer* holds its proof."""

    def prepare(world: World) -> None:
        completions = f"{server.http}/namespaces/{CALLER}/nexus/callback"
        caller = {
            "operations": ["ProbeService/*", "QuoteService/*"],
            "callbacks": [{"url": completions, "networks": ["127.0.0.0/8"], "allow_insecure": True}],
            **peer,
        }
        settings = world.handler_settings
        world.override_handler_settings(
            HandlerSettings.model_validate({**dict(settings), "callers": {**settings.callers, SERVER: caller}})
        )
        world.services = [Quotes()]

    return prepare


@contextlib.asynccontextmanager
async def running_side(
    server: Server, *, url: str | None = None, prepare: Prepare | None = None, **peer: Any
) -> AsyncIterator[World]:
    """A handler of ours, and a caller with Temporal only: no receiver, no plugin, no key."""
    prepare = prepare or takes_calls_of_the_server(server, **peer)
    async with running_world(server, without=("receiver", "caller"), prepare=prepare) as world:
        external = EndpointTarget.External(url=f"{url or world.service.url}/c/{SERVER}")
        await world.create_nexus_endpoint(EndpointTarget(external=external))
        async with Worker(world.caller_client, task_queue=world.order_queue, workflows=[NativeCaller]):
            yield world


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_side(server, auth="none") as made:
        yield made


async def call(world: World, ask: Ask, **plan: Any) -> Native:
    return await world.caller_client.start_workflow(
        NativeCaller.run,
        args=[ask, NativePlan(endpoint=world.nexus_endpoint, **plan)],
        id=f"native-{ask.key}",
        task_queue=world.order_queue,
    )


async def cause_of(handle: Native) -> BaseException | None:
    """The error that the caller's workflow caught, without the wrapper of every Nexus operation."""
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    error = raised.value.cause
    assert isinstance(error, NexusOperationError)
    assert error.message == "nexus operation completed unsuccessfully"
    return error.cause


async def until_known_to_run(handle: Native) -> None:
    """Wait until the start is in the caller's workflow: a cancel in that same task would end it before it cancels."""

    async def started() -> None:
        _, found, later = "\n".join(await events(handle)).partition("NEXUS_OPERATION_STARTED")
        assert found
        assert "WORKFLOW_TASK_COMPLETED" in later

    await assert_eventually(started)


async def runs_of(world: World, ask: Ask) -> int:
    """The runs of the target: one, for any number of starts."""
    workflow_id = world.target(ask).id
    return len([each async for each in world.handler_client.list_workflows(f"WorkflowId = '{workflow_id}'")])


async def is_unknown(handle: WorkflowHandle[Any, Any]) -> bool:
    try:
        await handle.describe()
    except RPCError:
        return True
    return False


async def assert_delivered(caplog: pytest.LogCaptureFixture, target: WorkflowHandle[Any, Any], answer: str) -> None:
    """Wait until the dispatcher has delivered the outcome of *target* once, with this answer."""

    async def delivered() -> None:
        records = [
            each.__dict__ for each in caplog.records if each.getMessage().startswith("bridge.completion_delivered")
        ]
        assert [each["bridge.answer"] for each in records if each["bridge.target"] == target.id] == [answer]

    await assert_eventually(delivered)


async def test_a_call_by_the_server_gets_the_result_when_the_target_has_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The started event has our token; the completion goes to the server's endpoint."""
    caplog.set_level(logging.INFO, "handler.delivery.callback_client")
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    target = await world.until_started(ask)
    await target.signal("say", "from the handler")
    assert await handle.result() == Reply("from the handler")
    assert world.service.statuses == [201]
    await target.result()
    await assert_delivered(caplog, target, "accepted")


async def test_an_existing_outcome_is_the_answer_to_the_start(world: World) -> None:
    """The same order again makes no second run and no completion."""
    ask = Ask(world.key(), text="once")
    assert await (await call(world, ask)).result() == Reply("once")
    again = await call(world, ask)
    assert await again.result() == Reply("once")
    assert "NEXUS_OPERATION_STARTED" not in await events(again)
    assert world.service.statuses == [201, 200]
    assert await runs_of(world, ask) == 1


async def test_an_operation_without_a_workflow_is_answered_at_once(world: World) -> None:
    """A plain nexusrpc operation takes one request."""
    handle = await call(world, Ask(world.key(), text="quoted"), operation="QuoteService/quote")
    assert await handle.result() == Reply("quoted")
    assert world.service.statuses == [200]


@pytest.mark.parametrize("behaviour", ["fail", "cancel"])
async def test_an_operation_without_a_workflow_that_fails_fails_the_call(world: World, behaviour: str) -> None:
    handle = await call(world, Ask(world.key(), behaviour), operation="QuoteService/quote")
    cause = await cause_of(handle)
    if behaviour == "fail":
        assert isinstance(cause, ApplicationError)
        assert [str(each) for each in chain(cause)] == [
            "OperationError: no such rate",
            "Inner: the inner reason",
            "ValueError: the innermost",
        ]
    else:
        assert isinstance(cause, CancelledError)
    assert world.service.statuses == [424]


def chain(error: BaseException | None) -> list[BaseException]:
    return [] if error is None else [error, *chain(error.__cause__)]


async def test_a_failure_arrives_with_its_whole_chain(world: World) -> None:
    """Message, type, details and cause arrive as from a native handler, also for a repeated start."""
    ask = Ask(world.key(), "fail")
    for _ in range(2):
        causes = chain(await cause_of(await call(world, ask)))
        outer, inner = (
            each for each in causes if isinstance(each, ApplicationError) and each.type in {"Outer", "Inner"}
        )
        assert isinstance(outer, ApplicationError)
        assert (outer.message, list(outer.details)) == ("the outer reason", [{"key": ask.key}, "two"])
        assert isinstance(inner, ApplicationError)
        assert (inner.message, inner.non_retryable, list(inner.details)) == ("the inner reason", True, [1])
    assert world.service.statuses == [201, 424]


async def test_a_cancel_by_the_server_cancels_the_target(world: World) -> None:
    """The operation token comes in the path or in a header, depending on the server's version."""
    ask = Ask(world.key(), "cleanup")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    target = await world.until_started(ask)
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, CancelledError)
    with pytest.raises(WorkflowFailureError):
        await target.result()
    assert (await events(target))[-1] == "WORKFLOW_EXECUTION_CANCELED"
    assert world.service.statuses == [201, 202]
    path, _ = world.service.requests[1]
    assert re.fullmatch(rf"/c/{SERVER}/ProbeService/probe(/[^/]+)?/cancel", path)


async def test_a_cancel_does_not_decide(world: World) -> None:
    ask = Ask(world.key(), "swallow cancel")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    await handle.cancel()
    assert await handle.result() == Reply("went on all the same")


async def test_an_outcome_after_the_callers_deadline_is_sent_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """The server answers that the operation is over; the target closes, and no delivery continues."""
    caplog.set_level(logging.INFO, "handler.delivery.callback_client")
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask, deadline=2.0)
    cause = await cause_of(handle)
    assert isinstance(cause, TemporalTimeoutError)
    assert cause.type is TimeoutType.SCHEDULE_TO_CLOSE
    target = world.target(ask)
    await target.signal("say", "too late")
    await target.result()
    await assert_delivered(caplog, target, "gone")


def spoil_first_answer(world: World, way: str, *, first: Callable[[], Awaitable[None]] | None = None) -> list[str]:
    """The service acts on the first start, *first* happens, the answer is "lost" or "500". Returns the caller."""
    asked: list[web.Request] = []
    ids: list[str] = []

    async def note(request: web.Request) -> None:
        asked.append(request)
        ids.append(request.headers["Nexus-Request-Id"])

    async def spoil() -> None:
        if len(asked) > 1:
            return
        if first is not None:
            await first()
        if way == "500":
            raise web.HTTPInternalServerError
        assert asked[0].transport is not None
        asked[0].transport.abort()

    world.service.before, world.service.after = note, spoil
    return ids


@pytest.mark.parametrize("way", ["lost", "500"])
async def test_a_start_that_the_server_repeats_starts_the_target_once(world: World, way: str) -> None:
    """The same request id gets the same token."""
    ids = spoil_first_answer(world, way)
    ask = Ask(world.key(), "wait")
    handle = await call(world, ask)
    await until_known_to_run(handle)
    await world.target(ask).signal("say", "once")
    assert await handle.result() == Reply("once")
    assert len(ids) == 2
    assert len(set(ids)) == 1
    assert await runs_of(world, ask) == 1


async def test_a_completion_may_overtake_the_answer_to_the_start(world: World) -> None:
    """The answer is lost; the completion arrives with the token that the answer would have had."""
    spoil_first_answer(world, "lost")
    ask = Ask(world.key(), text="overtaken")
    handle = await call(world, ask)
    assert await handle.result() == Reply("overtaken")
    [started] = [
        each.nexus_operation_started_event_attributes
        for each in (await handle.fetch_history()).events
        if each.HasField("nexus_operation_started_event_attributes")
    ]
    memo = await (await world.target(ask).describe()).memo()
    assert started.operation_token == CallMemo(**memo["bridge"]).operation_token
    assert await runs_of(world, ask) == 1


async def test_a_repeated_start_is_answered_with_an_undelivered_outcome(world: World) -> None:
    """The target was terminated before the repeat: no worker could deliver that, and no sweep runs here."""
    ask = Ask(world.key(), "wait")

    async def terminate() -> None:
        await world.target(ask).terminate(reason="by the test")

    ids = spoil_first_answer(world, "lost", first=terminate)
    cause = await cause_of(await call(world, ask))
    assert "operation terminated" in str(chain(cause)[-1])
    assert len(ids) == 2
    assert await runs_of(world, ask) == 1


async def test_a_refused_input_fails_the_call_at_once(world: World) -> None:
    """The refusal is final: the server sends one request, and nothing is started."""
    ask = Ask(world.key(), "refused")
    cause = await cause_of(await call(world, ask))
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.BAD_REQUEST
    assert "the check says no" in str(cause)
    assert world.service.statuses == [400]
    assert await is_unknown(world.target(ask))


async def test_a_call_goes_on_when_the_handler_service_is_back(world: World) -> None:
    """The server repeats the start."""
    await world.service.stop()
    ask = Ask(world.key(), text="after the outage")
    handle = await call(world, ask)

    async def asked_in_vain() -> None:
        pending = (await handle.describe()).raw_description.pending_nexus_operations
        assert [each.HasField("last_attempt_failure") for each in pending] == [True]

    await assert_eventually(asked_in_vain)
    await world.service.start()
    assert await handle.result() == Reply("after the outage")
    assert world.service.statuses == [201]


# Authentication of the calls.


@contextlib.asynccontextmanager
async def operators_proxy(authorization: str | None) -> AsyncIterator[tuple[str, Callable[[str], None]]]:
    """A proxy in front of a handler service: it adds the header. Yields its URL and a function that sets its target."""
    goal = ""

    async def forward(request: web.Request) -> web.Response:
        hop = {"host", "transfer-encoding", "content-length", "connection"}
        headers = CIMultiDict((name, value) for name, value in request.headers.items() if name.lower() not in hop)
        if authorization is not None:
            headers["Authorization"] = authorization
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.post(
                URL(goal + request.raw_path, encoded=True),
                headers=headers,
                data=await request.read(),
                skip_auto_headers=("Content-Type", "User-Agent"),
            ) as answer,
        ):
            kept = CIMultiDict((name, value) for name, value in answer.headers.items() if name.lower() not in hop)
            return web.Response(status=answer.status, headers=kept, body=await answer.read() or None)

    def aim(url: str) -> None:
        nonlocal goal
        goal = url

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}", aim
    finally:
        await runner.cleanup()


def bearer(keys: KeySet, key_id: str = "k1") -> str:
    return f"Bearer {keys.keys[key_id].get_secret_value()}"


async def assert_refused(world: World) -> None:
    """The server gets 401 and stops at once; the caller's workflow gets the error, and nothing was started."""
    ask = Ask(world.key())
    cause = await cause_of(await call(world, ask))
    assert isinstance(cause, HandlerError)
    assert cause.type is HandlerErrorType.UNAUTHENTICATED
    assert world.service.statuses == [401]
    assert await is_unknown(world.target(ask))


async def test_a_bearer_secret_that_a_proxy_adds_lets_the_servers_calls_in(server: Server) -> None:
    """Start and cancel are accepted with every key of the key set, so that a new key can be rolled out."""
    keys = key_set()
    rolled = KeySet.model_validate({"signing": "new", "keys": {"new": key_set().keys["k1"], "k1": keys.keys["k1"]}})
    async with (
        operators_proxy(bearer(keys)) as (url, aim),
        running_side(server, url=url, auth="bearer", bearer_keys=rolled) as world,
    ):
        aim(world.service.url)
        ask = Ask(world.key(), "cleanup")
        handle = await call(world, ask)
        await until_known_to_run(handle)
        await handle.cancel()
        with pytest.raises(WorkflowFailureError):
            await handle.result()
        assert world.service.statuses == [201, 202]


@pytest.mark.parametrize("found", ["missing", "wrong", "basic"])
async def test_a_wrong_or_missing_bearer_secret_is_refused(server: Server, found: str) -> None:
    keys = key_set()
    sent = {"missing": None, "wrong": bearer(key_set()), "basic": bearer(keys).replace("Bearer", "Basic")}[found]
    async with (
        operators_proxy(sent) as (url, aim),
        running_side(server, url=url, auth="bearer", bearer_keys=keys) as world,
    ):
        aim(world.service.url)
        await assert_refused(world)


async def test_an_address_outside_the_callers_networks_is_refused(server: Server) -> None:
    async with running_side(server, auth="none", networks=["10.0.0.0/8"]) as world:
        await assert_refused(world)


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "Via"])
async def test_the_network_of_a_proxy_is_no_proof_for_a_forwarded_request(world: World, name: str) -> None:
    ask = Ask(world.key())
    headers = {"Nexus-Request-Id": ask.key, name: "for=10.0.0.1"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{world.service.url}/c/{SERVER}/ProbeService/probe", json={"key": ask.key}, headers=headers
        ) as answer,
    ):
        assert answer.status == 401
    assert await is_unknown(world.target(ask))


@pytest.mark.parametrize("adds", ["nothing", "its own start key", "another caller's secret"])
async def test_by_default_the_servers_unsigned_calls_are_refused(server: Server, adds: str) -> None:
    """A caller that must sign cannot use an Authorization header instead."""
    start_keys, completion_keys = key_set(), key_set()
    sent = {"nothing": None, "its own start key": bearer(start_keys), "another caller's secret": bearer(key_set())}[
        adds
    ]
    async with (
        operators_proxy(sent) as (url, aim),
        running_side(server, url=url, start_keys=start_keys, completion_keys=completion_keys) as world,
    ):
        aim(world.service.url)
        await assert_refused(world)


async def test_outcomes_of_the_servers_calls_go_to_the_servers_own_endpoint_only(world: World) -> None:
    """The allow list has the cluster's completion endpoint; another namespace or another host is refused."""
    async with aiohttp.ClientSession() as session:
        for callback in (
            f"{world.server.http}/namespaces/another/nexus/callback",
            f"{world.receiver.url}/callbacks/x",
            f"{world.server.http}/namespaces/{CALLER}/nexus/callback/../../../x",
        ):
            start = URL(f"{world.service.url}/c/{SERVER}/ProbeService/probe").with_query(callback=callback)
            ask = Ask(world.key())
            body = {"key": ask.key}
            async with session.post(start, json=body, headers={"Nexus-Request-Id": ask.key}) as answer:
                assert answer.status == 400
            assert await is_unknown(world.target(ask))


@pytest.mark.parametrize("auth", ["none", "bearer"])
async def test_the_documents_settings_and_command_let_the_server_call(server: Server, auth: str) -> None:
    """The document's text works unchanged, except for ports, keys and the endpoint's name."""
    keys = key_set()
    toml, command = blocks(PAGE, "toml")[["none", "bearer"].index(auth)], blocks(PAGE, "sh")[1]
    assert server.http is not None
    text = toml.replace("http://127.0.0.1:7243", server.http).replace("BEARER-KEY", keys.keys["k1"].get_secret_value())
    peer = tomllib.loads(text)["callers"][SERVER]
    peer["operations"] = ["ProbeService/*"]
    prepare = takes_calls_of_the_server(server, **peer)
    async with (
        operators_proxy(bearer(keys)) as (proxy, aim),
        running_world(server, without=("receiver", "caller"), prepare=prepare) as world,
    ):
        aim(world.service.url)
        url = proxy if auth == "bearer" else world.service.url
        process = await asyncio.create_subprocess_exec(
            str(server.program or await temporal_cli.find(temporal_cli.chosen())),
            *command.replace("payments-by-url", world.nexus_endpoint)
            .replace("http://127.0.0.1:8081", url)
            .removeprefix("temporal ")
            .split(),
            env={**os.environ, "TEMPORAL_ADDRESS": server.address},
            stdout=asyncio.subprocess.DEVNULL,
        )
        assert await process.wait() == 0
        async with Worker(world.caller_client, task_queue=world.order_queue, workflows=[NativeCaller]):
            assert await (await call(world, Ask(world.key(), text="documented"))).result() == Reply("documented")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
