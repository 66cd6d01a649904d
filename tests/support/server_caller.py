"""Temporal's own server as a caller: a plain Nexus workflow, and an endpoint whose URL is our handler service."""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from temporalio.api.nexus.v1 import EndpointTarget
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import NexusOperationError
from temporalio.service import RPCError
from temporalio.worker import Worker

from handler.settings import HandlerSettings
from scripts.environment.server import Server
from tests.support.helpers import CALLER, assert_eventually
from tests.support.native import NativeCaller, NativePlan
from tests.support.services import Quotes
from tests.support.targets import Ask, Reply
from tests.support.world import World, events, running_world

SERVER = "order-server"
"""The name of the caller's server in our handler's settings."""

Native = WorkflowHandle[NativeCaller, Reply]
Prepare = Callable[[World], None]


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


async def is_unknown(handle: WorkflowHandle[Any, Any]) -> bool:
    try:
        await handle.describe()
    except RPCError:
        return True
    return False
