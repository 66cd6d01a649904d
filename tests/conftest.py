"""One Temporal server for the whole run; a world of its own for every test that asks for one."""

import logging
import os
import sys
from collections.abc import AsyncIterator

import hypothesis
import pytest
import pytest_asyncio

from scripts.environment.server import Server, running_server
from tests.support.helpers import CALLER, HANDLER
from tests.support.world import World, running_world

# On a busy machine an example may take long; how long is no property of the code.
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

ALLOW_CALLBACKS_TO_LOOPBACK = 'component.callbacks.allowedAddresses=[{"Pattern":"127.0.0.1:*","AllowInsecure":true}]'

_exit_code = pytest.StashKey[int]()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server() -> AsyncIterator[Server]:
    address = os.environ.get("TEMPORAL_ADDRESS")
    async with running_server(
        namespaces=[CALLER, HANDLER], address=address, dynamic_config=[ALLOW_CALLBACKS_TO_LOOPBACK]
    ) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_world(server) as made:
        yield made


def pytest_configure() -> None:
    # The SDK's core warns of reports that came after a completion: here they are meant.
    logging.getLogger("temporalio").setLevel(logging.ERROR)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_exit_code] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End deliberately, after everything has been reported.

    On CPython 3.11 a process that used the SDK sometimes aborts while the interpreter shuts down (temporalio/sdk-python
    issue 300); a green run must not end as exit code 134.
    """
    if _exit_code in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_exit_code])
