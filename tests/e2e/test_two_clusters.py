"""Two unconnected Temporal servers of different versions, between which native Nexus is impossible."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from aiohttp import web
from temporalio.client import WorkflowFailureError
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError

from scripts.environment.server import Server, running_server
from scripts.environment.temporal_cli import NEWEST, OLDEST
from tests.support.callers import CallPlan
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world


@pytest_asyncio.fixture(scope="module", loop_scope="session", name="clusters", params=[(OLDEST, NEWEST)], ids=str)
async def two_servers(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Server, Server]]:
    """The caller's server has no namespace of the handler, and the other way round."""
    caller, handler = request.param
    async with (
        running_server(namespaces=[CALLER], choice=caller) as first,
        running_server(namespaces=[HANDLER], choice=handler) as second,
    ):
        assert (first.version, second.version) == (caller, handler)
        yield first, second


@pytest_asyncio.fixture(loop_scope="session", name="world")
async def world_of_two(clusters: tuple[Server, Server]) -> AsyncIterator[World]:
    caller, handler = clusters

    def prepare(world: World) -> None:
        world.handler_server = handler

    async with running_world(caller, prepare=prepare) as made:
        yield made


async def failure_of(world: World, ask: Ask) -> NexusOperationError:
    with pytest.raises(WorkflowFailureError) as raised:
        await (await world.call(ask)).result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause


async def test_a_result_arrives_from_the_other_cluster(world: World) -> None:
    """The call takes the same two requests and eleven events as on one server."""
    ask = Ask(key=world.key(), text="across")
    handle = await world.call(ask)
    assert await handle.result() == Reply("across")
    assert (await world.service.answered(), await world.receiver.answered()) == ([201], [200])
    assert len(await events(handle)) == 11


async def test_a_failure_arrives_from_the_other_cluster(world: World) -> None:
    """The failure arrives with its type."""
    error = await failure_of(world, Ask(key=world.key(), behaviour="fail"))
    assert isinstance(error.cause, ApplicationError)


async def test_a_cancel_reaches_the_other_cluster(world: World) -> None:
    """The target cleans up, and the call ends as canceled."""
    ask = Ask(key=world.key(), behaviour="cleanup")
    handle = await world.call(ask)
    await world.until_started(ask)
    await handle.cancel()
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, CancelledError)


async def test_a_renewal_replaces_a_lost_callback_across_clusters(world: World) -> None:
    """The renewal reads the outcome from the handler's cluster."""

    async def lost(_: web.Request) -> web.StreamResponse:
        return web.Response(status=200)

    world.receiver.before = lost
    ask = Ask(key=world.key(), text="found")
    handle = await world.call(ask, CallPlan(first_lease=1, renewal=1))
    assert await handle.result() == Reply("found")


async def test_the_same_order_from_two_runs_is_carried_out_once(world: World) -> None:
    """The second call gets the outcome of the first one's target."""
    ask = Ask(key=world.key(), text="once")
    first = await (await world.call(ask)).result()
    run = (await world.target(ask).describe()).run_id

    async def same_run() -> None:
        assert (await world.target(ask).describe()).run_id == run

    assert await (await world.call(ask)).result() == first
    await assert_eventually(same_run)
