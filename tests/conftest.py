"""One Temporal server for the whole run; a world of its own for every test that asks for one."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_asyncio
from temporalio.bridge.worker import Worker as BridgeWorker

from scripts.environment.server import Server, running_server
from tests.support.helpers import CALLER, HANDLER
from tests.support.settings_files import Configured, Tree, toml
from tests.support.world import World, running_world

# On a busy machine an example may take long; how long is no property of the code.
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

# A shell starts background jobs with Ctrl-C ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ALLOW_CALLBACKS_TO_LOOPBACK = 'component.callbacks.allowedAddresses=[{"Pattern":"127.0.0.1:*","AllowInsecure":true}]'
"""Native Nexus needs it on servers before 1.31. Later ones complete the calls of their own workers without a URL."""
FEW_CALLBACKS = "callback.maxPerExecution=32"
"""Gives servers from 1.32 the limit of older ones, which is 32 callbacks of a run. By default it is 2 000."""

MAY_SKIP = ("no container engine", "no production server", "no Python", "no disk is filled")
"""The beginnings of the only reasons for which a test may be skipped under CI."""
CORE = (
    "tests/bridge/protocol/",
    "tests/bridge/security/",
    "tests/bridge/workflow/",
    "tests/caller/",
    "tests/handler/delivery/",
    "tests/handler/sweep/",
    "tests/e2e/test_like_native_nexus.py",
    "tests/e2e/test_limits.py",
    "tests/e2e/test_cluster_limits.py",
    "tests/e2e/test_clocks.py",
)
"""The tests that every version of Python, of the dependencies and of the server runs."""

_exit_code = pytest.StashKey[int]()


@pytest.fixture(scope="session", autouse=True)
def bounded_worker_stop() -> Iterator[None]:
    """Give up the last step of a worker's stop after some seconds, as the SDK does if that step fails.

    temporalio 1.35.0 sometimes never returns from it if an activity was beginning when the worker was stopped: in 9 of
    400 stops on two busy cores, and in none of 480 with a `graceful_shutdown_timeout`. By then the worker polls no
    more, and all its activities have ended.
    """
    finalize = BridgeWorker.finalize_shutdown

    async def bounded(worker: BridgeWorker) -> None:
        await asyncio.wait_for(finalize(worker), 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BridgeWorker, "finalize_shutdown", bounded)
        yield


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def own_server() -> AsyncIterator[Server]:
    """A server of which the flags and the HTTP port are known."""
    async with running_server(
        namespaces=[CALLER, HANDLER], dynamic_config=[ALLOW_CALLBACKS_TO_LOOPBACK, FEW_CALLBACKS]
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def named_server() -> AsyncIterator[Server]:
    """The server that TEMPORAL_ADDRESS names. Its flags are unknown."""
    async with running_server(namespaces=[CALLER, HANDLER], address=os.environ["TEMPORAL_ADDRESS"]) as running:
        yield running


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The server that the user names, or else our own. A module that needs a flag puts `own_server` in its place."""
    found = request.getfixturevalue("named_server" if "TEMPORAL_ADDRESS" in os.environ else "own_server")
    assert isinstance(found, Server)
    return found


@pytest.fixture
def no_named_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that the test runs start servers of their own."""
    monkeypatch.delenv("TEMPORAL_ADDRESS", raising=False)


@pytest_asyncio.fixture(loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with running_world(server) as made:
        yield made


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Configured:
    """Name a file of these settings in BRIDGE_CONFIG."""
    monkeypatch.delenv("BRIDGE_NAME", raising=False)

    def write(content: Tree | str | bytes) -> Path:
        path = tmp_path / "bridge.toml"
        text = toml(content) if isinstance(content, dict) else content
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.setenv("BRIDGE_CONFIG", str(path))
        return path

    return write


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=["suite", "all", "short", "core"],
        default="suite",
        help="which tests to run: those of no part, all, only the short case of each part, or those of CORE that are "
        "of no part or short",
    )


def pytest_configure() -> None:
    # The SDK's core warns of reports that came after a completion: here they are meant.
    logging.getLogger("temporalio").setLevel(logging.ERROR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the chosen tier."""
    tier = config.getoption("tier")
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        part = item.get_closest_marker("part")
        is_short = part is not None and part.kwargs.get("short", False)
        is_kept = {
            "suite": part is None,
            "all": True,
            "short": is_short,
            "core": item.nodeid.startswith(CORE) and (part is None or is_short),
        }[tier]
        (kept if is_kept else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Under CI a skipped test is a failure: a test that does not run proves nothing."""
    report = yield
    reason = str(call.excinfo.value) if call.excinfo is not None else ""
    if report.skipped and os.environ.get("CI") and not reason.startswith(MAY_SKIP):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, which is a failure under CI: {reason}"
    return report


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
