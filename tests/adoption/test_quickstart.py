"""The quick start page makes a working project outside this repository, and each of its likely failures is named.

What a person must see is looked for where the person looks: in a terminal, in the description of the workflow, or in
the report of `doctor`.
"""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio

from bridge.security.keys import new_key
from scripts.environment import temporal_cli
from scripts.environment.server import free_ports, running_server
from tests.support.helpers import assert_eventually
from tests.support.newcomer import Shell, Terminal, blocks, install, run, terminal, write_files

PAGE = "docs/quickstart.md"
_, INIT, HANDLER, WORKER, ORDER = [block.strip() for block in blocks(PAGE, "sh")]
"""The commands of the page after the one that starts a server."""
CALLER_DOCTOR = "BRIDGE_CONFIG=caller.toml callback-bridge receiver doctor --task-queue order-queue"
HANDLER_DOCTOR = "BRIDGE_CONFIG=handler.toml callback-bridge handler doctor --module shipping"
RECEIVER = "BRIDGE_CONFIG=caller.toml callback-bridge receiver serve"
SERVICE = HANDLER.removesuffix(" --with-worker")
SEND = ORDER.replace("workflow execute", "workflow start") + " --workflow-id $SENT"
DESCRIBE = "temporal workflow describe --namespace order-prod --workflow-id $SENT"

PLAIN_WORKER = """
import asyncio

from temporalio.client import Client
from temporalio.worker import Worker

from shipping import ShipWorkflow


async def main() -> None:
    client = await Client.connect("{temporal}", namespace="shipping-prod")
    await Worker(client, task_queue="shipping-queue", workflows=[ShipWorkflow]).run()


asyncio.run(main())
"""


@dataclass(frozen=True)
class Project:
    """A newcomer's project, and the shell in which its commands run."""

    folder: Path
    shell: Shell

    def terminal(self, command: str) -> contextlib.AbstractAsyncContextManager[Terminal]:
        """Keep *command* running."""
        return terminal(command, folder=self.folder, shell=self.shell)

    async def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        """Run *command* to its end."""
        return await run(command, folder=self.folder, shell=self.shell)


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    """The project as the page makes it, next to a running server. Only ports differ from the page."""
    root = tmp_path_factory.mktemp("newcomer")
    folder = root / "project"
    folder.mkdir()
    program = await temporal_cli.find(temporal_cli.chosen())
    async with running_server(namespaces=["order-prod", "shipping-prod"]) as server:
        shell = install(root)
        shell |= {"PATH": f"{program.parent}{os.pathsep}{shell['PATH']}", "TEMPORAL_ADDRESS": server.address}
        write_files(PAGE, folder, temporal=server.address)
        (folder / "plain_worker.py").write_text(PLAIN_WORKER.format(temporal=server.address))
        initialized = await run(INIT, folder=folder, shell=shell)
        assert initialized.returncode == 0, initialized.stderr
        receiver_port, service_port = free_ports(2)
        for name in ("caller.toml", "handler.toml"):
            text = (folder / name).read_text()
            text = text.replace("8080", str(receiver_port)).replace("8081", str(service_port))
            (folder / name).write_text(text)
        yield Project(folder, shell)


@pytest.fixture(name="project")
def copy_of_the_project(made: Project, tmp_path: Path) -> Project:
    """A test may change its own copy."""
    folder = tmp_path / "project"
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("*.log", "__pycache__"))
    return Project(folder, made.shell | {"SENT": f"order-{uuid.uuid4().hex}"})


@pytest.mark.part("adoption", short=True)
async def test_the_quick_start_ships_an_order(project: Project) -> None:
    """A workflow operation and a sync operation, with the page's files and commands. `doctor` finds nothing wrong."""
    async with project.terminal(HANDLER) as handler, project.terminal(WORKER) as worker:
        done = await project.run(ORDER)
        assert done.returncode == 0, done.stderr + handler.text + worker.text
        assert "parcel 7 is on its way for 6.50" in done.stdout
        for command in (CALLER_DOCTOR, HANDLER_DOCTOR):
            doctor = await project.run(command)
            assert doctor.returncode == 0, doctor.stdout + doctor.stderr


@dataclass(frozen=True)
class Failure:
    """What goes wrong, what runs, and what a person sees."""

    runs: tuple[str, ...]
    """Commands, each in a terminal of its own."""
    sees: tuple[tuple[str, tuple[str, ...]], ...]
    """Commands, of those that run or further ones, and what one line of their output has."""
    edits: tuple[tuple[str, str, str], ...] = ()
    """File, text, and what stands in its place."""
    adds: dict[str, str] = field(default_factory=dict)
    """Files of the newcomer."""


SKEWED = "import asyncio\nimport time\n\nreal = time.time\ntime.time = lambda: real() + 600\n"
"""Python's clock, ten minutes ahead."""
NO_NAMESPACE = (
    ("caller.toml", 'namespace = "order-prod"\n', ""),
    ("handler.toml", 'namespace = "shipping-prod"\n', ""),
)

FAILURES = {
    "no plugin on the caller's worker": Failure(
        runs=(HANDLER, WORKER, SEND),
        edits=(("order_worker.py", "plugins=[plugin]", "plugins=[]"),),
        sees=(
            (WORKER, ("bridge.no_caller_plugin", "task queue order-queue: Worker(..., plugins=[CallerPlugin()])")),
            (CALLER_DOCTOR, ("wrong", "order-queue has no CallerPlugin", "add it: Worker(")),
        ),
    ),
    "no plugin on the handler's worker": Failure(
        runs=(SERVICE, "python plain_worker.py"),
        sees=(
            (SERVICE, ("bridge.workers_not_ready", "shipping-queue has no HandlerPlugin", "add it: Worker(")),
            (HANDLER_DOCTOR, ("wrong", "shipping-queue has no HandlerPlugin")),
        ),
    ),
    "wrong endpoint name": Failure(
        runs=(HANDLER, WORKER, ORDER),
        edits=(("orders.py", 'endpoint="shipping"', 'endpoint="shiping"'),),
        sees=((ORDER, ("no endpoint 'shiping' in the caller's settings (known: shipping)",)),),
    ),
    "wrong input type": Failure(
        runs=(HANDLER, WORKER, ORDER),
        edits=(("orders.py", "(ShippingService.ship, parcel)", "(ShippingService.ship, 7)"),),
        sees=((ORDER, ("the input is not a Parcel",)),),
    ),
    "wrong start key": Failure(
        runs=(HANDLER, WORKER, SEND),
        edits=(("caller.toml", "start_keys", "start_keys"),),
        sees=(
            (WORKER, ("endpoint_not_ready", "shipping: signed answer", "compare keys, key ids and clocks")),
            (DESCRIBE, ("answered 401", "compare keys, key ids and clocks")),
            (CALLER_DOCTOR, ("wrong", "shipping: signed answer", "compare keys")),
        ),
    ),
    "wrong completion key": Failure(
        runs=(HANDLER, WORKER),
        edits=(("caller.toml", "completion_keys", "completion_keys"),),
        sees=(
            (WORKER, ("endpoint_not_ready", "shipping: way back", "compare keys, key ids and clocks")),
            (HANDLER_DOCTOR, ("wrong", "order-prod: way back", "compare keys")),
        ),
    ),
    "handler service down": Failure(
        runs=(WORKER, SEND),
        sees=(
            (WORKER, ("endpoint_not_ready", "shipping: connection", "cannot connect", "is the peer up")),
            (DESCRIBE, ("not reached", "cannot connect")),
        ),
    ),
    "receiver down": Failure(
        runs=(HANDLER, WORKER),
        edits=(("order_worker.py", "serve_receiver=True", "serve_receiver=False"),),
        sees=(
            (WORKER, ("endpoint_not_ready", "shipping: way back", "cannot connect")),
            (CALLER_DOCTOR, ("wrong", "shipping: way back", "cannot connect")),
        ),
    ),
    "receiver in the wrong namespace": Failure(
        runs=(f"TEMPORAL_NAMESPACE=shipping-prod {RECEIVER}",),
        sees=(
            (
                f"TEMPORAL_NAMESPACE=shipping-prod {RECEIVER}",
                ("connected to namespace shipping-prod, but `namespace`",),
            ),
        ),
    ),
    "receiver in the wrong namespace, which the settings do not name": Failure(
        runs=(HANDLER, f"TEMPORAL_NAMESPACE=shipping-prod {RECEIVER}", WORKER),
        edits=(*NO_NAMESPACE[:1], ("order_worker.py", "serve_receiver=True", "serve_receiver=False")),
        sees=((WORKER, ("endpoint_not_ready", "the receiver serves namespace shipping-prod, but the calls are in")),),
    ),
    "namespace missing": Failure(
        runs=(HANDLER, f"BRIDGE_NAMESPACE=order-pord {RECEIVER}"),
        edits=(("handler.toml", 'namespace = "shipping-prod"', 'namespace = "shipping-test"'),),
        sees=(
            (HANDLER, ("namespace shipping-test does not exist", "temporal operator namespace create")),
            (f"BRIDGE_NAMESPACE=order-pord {RECEIVER}", ("namespace order-pord does not exist",)),
        ),
    ),
    "handler service in the wrong namespace": Failure(
        runs=(f"TEMPORAL_NAMESPACE=order-prod {SERVICE}",),
        sees=((f"TEMPORAL_NAMESPACE=order-prod {SERVICE}", ("connected to namespace order-prod, but `namespace`",)),),
    ),
    "handler service in the wrong namespace, which the settings do not name": Failure(
        runs=("python plain_worker.py", f"TEMPORAL_NAMESPACE=order-prod {SERVICE}"),
        edits=NO_NAMESPACE,
        sees=(
            (
                f"TEMPORAL_NAMESPACE=order-prod {SERVICE}",
                ("bridge.workers_not_ready", "no worker polls task queue shipping-queue in namespace order-prod"),
            ),
        ),
    ),
    "clock ten minutes off": Failure(
        runs=(HANDLER, WORKER, SEND),
        edits=(("order_worker.py", "import asyncio\n", SKEWED),),
        sees=(
            (WORKER, ("endpoint_not_ready", "shipping: signed answer", "clocks")),
            (HANDLER, ("bridge.http_request", "clock", "600")),
            (DESCRIBE, ("clocks",)),
        ),
    ),
    "an own handler.py next to the program": Failure(
        runs=(HANDLER, "python plain_handler.py"),
        adds={"handler.py": "print('mine')\n", "plain_handler.py": "from handler import HandlerPlugin\n"},
        sees=(
            (HANDLER, ('"service": "handler"',)),
            ("python plain_handler.py", ("cannot import name 'HandlerPlugin' from 'handler'", "project/handler.py")),
        ),
    ),
    "typos in settings and variables": Failure(
        runs=(HANDLER, f"BRIDGE_RECIEVER__PORT=1 {WORKER}"),
        edits=(("handler.toml", "task_queue", "taskqueue"),),
        sees=(
            (HANDLER, ("taskqueue: unknown name; did you mean task_queue?",)),
            (
                f"BRIDGE_RECIEVER__PORT=1 {WORKER}",
                ("did you mean BRIDGE_RECEIVER__PORT?", "variable BRIDGE_RECIEVER__PORT"),
            ),
        ),
    ),
}


@pytest.mark.part("adoption")
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
async def test_a_failure_is_named_where_the_person_looks(project: Project, failure: Failure) -> None:
    """What is wrong, where, and what to do, while the processes of the page run."""
    for name, old, new in failure.edits:
        path = project.folder / name
        text = path.read_text()
        assert old in text
        if old == new:
            lines = text.splitlines()
            key_set = f'{old} = {{ signing = "k1", keys = {{ k1 = "{new_key()}" }} }}'
            text = "\n".join(key_set if each.startswith(old) else each for each in lines)
        path.write_text(text.replace(old, new))
    for name, text in failure.adds.items():
        (project.folder / name).write_text(text)
    async with contextlib.AsyncExitStack() as stack:
        terminals = {}
        for command in failure.runs:
            terminals[command] = await stack.enter_async_context(project.terminal(command))
            if "serve" in command:
                await terminals[command].starts()
        for command, parts in failure.sees:
            if command in terminals:
                await terminals[command].shows(*parts)
            else:
                await shown(command, parts, project)


async def shown(command: str, parts: tuple[str, ...], project: Project) -> None:
    """Wait until the output of *command*, run again and again, has all *parts* in one line."""

    async def check() -> None:
        done = await project.run(command)
        lines = (done.stdout + done.stderr).splitlines()
        assert any(all(part in line for part in parts) for line in lines), done.stdout + done.stderr

    await assert_eventually(check)
