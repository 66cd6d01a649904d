"""Every ending is delivered while the worker's connection to its server is cut again and again."""

import asyncio
from collections import Counter

import pytest
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError, NexusOperationError
from temporalio.worker import Worker

from handler.plugin import HandlerPlugin
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.cut_proxy import cutting_proxy
from tests.support.helpers import HANDLER
from tests.support.targets import TARGETS, Ask
from tests.support.world import World, running_world

CALLS = 250
KINDS = {
    "return": ("probe", "return", "own answer"),
    "fail": ("probe", "fail", "Outer"),
    "continue": ("probe", "continue once", "second run"),
    "retry": ("flaky", "return", "attempt 3"),
    "retry in vain": ("flaky", "fail", "Flaky"),
    "init": ("breaking", "init", "Broken"),
}


async def ending(world: World, number: int) -> tuple[str, str]:
    """The call's actual outcome and the expected one."""
    operation, behaviour, expected = list(KINDS.values())[number % len(KINDS)]
    text = "own answer" if behaviour == "return" else ""
    ask = Ask(key=world.key(), behaviour=behaviour, text=text)
    handle = await world.call(ask, CallPlan(operation=operation, first_lease=600))
    try:
        return (await handle.result()).text, expected
    except WorkflowFailureError as error:
        failure = error.cause.cause if isinstance(error.cause, NexusOperationError) else None
        return str(failure.type if isinstance(failure, ApplicationError) else failure), expected


@pytest.mark.timeout(600)
@pytest.mark.part("soak", short=True)
async def test_no_ending_is_missed_while_the_connection_is_cut(server: Server) -> None:
    """Callbacks deliver, not renewals: every start is answered 201, and no lease runs out."""
    async with (
        running_world(server, without=("handler",)) as world,
        cutting_proxy(server.address, every_s=1.2) as address,
    ):
        client = await Client.connect(address, namespace=HANDLER)
        worker = Worker(
            client,
            task_queue=world.payment_queue,
            workflows=TARGETS,
            plugins=[HandlerPlugin(world.handler_settings)],
        )
        async with worker:
            endings = await asyncio.gather(*(ending(world, number) for number in range(CALLS)))
        assert [each for each in endings if each[0] != each[1]] == []
        assert Counter(world.service.statuses) == {201: CALLS}
