"""The commands as a user runs them: real processes, refused settings, a graceful stop, demo and up."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client, WorkflowExecutionStatus

from bridge.security.keys import new_key
from bridge.security.signatures import MessageSigner
from examples.payments.order import Order, OrderReceipt
from examples.payments.orders import OrderWorkflow
from scripts.environment.server import DEV_SERVER, Server, free_ports, require_free, running_server
from scripts.environment.stack import ROOT, write_local_settings
from scripts.environment.temporal_cli import NoServerError
from tests.support.commands import BRIDGE, process, run
from tests.support.helpers import CALLER, HANDLER, assert_eventually, paused
from tests.support.peer import send, start
from tests.support.targets import Ask, Reply
from tests.support.world import World


@pytest.fixture(name="settings")
def written_settings(tmp_path: Path) -> Path:
    receiver, service = free_ports(2)
    write_local_settings(
        tmp_path, receiver_url=f"http://127.0.0.1:{receiver}", service_url=f"http://127.0.0.1:{service}"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("side", "old", "new", "field"),
    [
        pytest.param("caller", r'k1 = "[^"]*"', 'k1 = "short"', "callback_keys", id="short key"),
        pytest.param("caller", "allow_insecure = true", "", "receiver", id="http receiver"),
        pytest.param("caller", 'handler = "payment-prod"', 'handler = "unknown"', "endpoints.payments", id="handler"),
        pytest.param("caller", 'signing = "k1"', 'signing = "k2"', "signing", id="signing key"),
        pytest.param("caller", r"\[endpoints.payments\][^\[]*", "", "endpoints", id="no endpoint"),
        pytest.param("handler", r'hash_key = "[^"]*"', 'hash_key = "short"', "hash_key", id="short hash key"),
        pytest.param("handler", "task_queue = .*", "", "task_queue", id="no task queue"),
        pytest.param("handler", "port = .*", "port = 70000", "service.port", id="port"),
        pytest.param("handler", "name = ", "name = = ", "TOML", id="broken file"),
    ],
)
def test_bad_settings_refuse_to_start_and_name_the_field(
    settings: Path, side: str, old: str, new: str, field: str
) -> None:
    """The settings are checked before any connection is made; the message quotes no key."""
    path = settings / f"{side}.toml"
    text = path.read_text()
    path.write_text(re.sub(old, new, text, count=1, flags=re.MULTILINE))
    serve = ["receiver", "serve"]
    if side == "handler":
        serve = ["handler", "serve", "--module", "examples.payments.payments"]
    done = run(*serve, BRIDGE_CONFIG=str(path))
    assert done.returncode == 2
    assert field in done.stderr
    assert "Traceback" not in done.stderr
    for key in re.findall(r'"([\w-]{43})"', text):
        assert key not in done.stderr + done.stdout


def test_a_public_listener_is_refused_if_the_network_is_the_only_proof(settings: Path) -> None:
    """A public address on the command line is refused as well."""
    path = settings / "handler.toml"
    path.write_text(
        re.sub("^(start|completion)_keys = .*\n", "", path.read_text(), flags=re.MULTILINE) + 'auth = "none"\n'
    )
    done = run(
        *("handler", "serve", "--module", "examples.payments.payments", "--host", "0.0.0.0"),
        BRIDGE_CONFIG=str(path),
        TEMPORAL_ADDRESS="127.0.0.1:1",
    )
    assert done.returncode == 2
    assert f'callers.{CALLER}.auth: "none" needs a private listener, service.host is 0.0.0.0' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--module", "no.such.module"], "cannot import no.such.module", id="no module"),
        pytest.param(["--module", "examples/payments/payments.py"], "use examples.payments.payments", id="a file"),
        pytest.param(["--module", "./payments.py"], "use payments", id="a file here"),
        pytest.param(["--module", "examples.payments.contract"], "no workflow decorated", id="no target"),
    ],
)
def test_a_module_that_serves_nothing_is_refused(settings: Path, arguments: list[str], says: str) -> None:
    """The message names the remedy."""
    done = run("handler", "serve", *arguments, BRIDGE_CONFIG=str(settings / "handler.toml"))
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("def charge(): ...\nactivities = [charge]\n", "Activity charge missing attributes, was it decorated"),
        ("activities = 7\n", "must be an iterable"),
    ],
)
def test_a_module_of_which_no_worker_can_be_made_is_refused(
    server: Server, settings: Path, more: str, says: str
) -> None:
    """The SDK's reason is in the message, without a traceback."""
    (settings / "mine.py").write_text(f"from tests.support.targets import ProbeWorkflow\n\n{more}")
    done = run(
        *("handler", "serve", "--module", "mine", "--with-worker", "--port", "0"),
        cwd=settings,
        BRIDGE_CONFIG=str(settings / "handler.toml"),
        TEMPORAL_ADDRESS=server.address,
    )
    assert done.returncode == 2
    assert "no worker can be made of mine: " in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("side", ["receiver", "handler"])
@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        pytest.param(["--port", "70000"], {}, 'Invalid value "70000" for --port', id="port of the command line"),
        pytest.param([], {"TEMPORAL_ADDRESS": "127.0.0.1:70000"}, "invalid port number", id="port of Temporal"),
        pytest.param([], {"TEMPORAL_PROFILE": "nowhere"}, "Profile 'nowhere' not found", id="profile"),
        pytest.param(
            [],
            {"TEMPORAL_TLS_CLIENT_CERT_PATH": "/no/cert.pem", "TEMPORAL_TLS_CLIENT_KEY_PATH": "/no/key.pem"},
            "/no/cert.pem: No such file",
            id="certificate",
        ),
        pytest.param([], {"BRIDGE_CONFIG": "/tmp"}, "BRIDGE_CONFIG=/tmp: a folder", id="folder"),
    ],
)
def test_a_users_mistake_is_named_without_a_traceback(
    settings: Path, side: str, arguments: list[str], environment: dict[str, str], says: str
) -> None:
    """The exit code is 2 and there is one message, for a mistake in any source."""
    module = ["--module", "examples.payments.payments"] if side == "handler" else []
    file = settings / ("handler.toml" if side == "handler" else "caller.toml")
    chosen = {"BRIDGE_CONFIG": str(file), **environment}
    done = run(side, "serve", *module, *arguments, cwd=None, **chosen)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_server_is_a_clear_error(settings: Path) -> None:
    """The command prints no traceback."""
    done = run("receiver", "serve", BRIDGE_CONFIG=str(settings / "caller.toml"), TEMPORAL_ADDRESS="127.0.0.1:1")
    assert done.returncode == 2
    assert "cannot connect to Temporal at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


async def test_a_service_finishes_what_runs_before_it_stops(settings: Path) -> None:
    """After SIGTERM there are no new connections, the running request is answered, and the exit code is 0."""
    async with (
        running_server(namespaces=[CALLER]) as own,
        process(
            *(*BRIDGE, "receiver", "serve", "--port", "0"),
            BRIDGE_CONFIG=str(settings / "caller.toml"),
            TEMPORAL_ADDRESS=own.address,
            TEMPORAL_NAMESPACE=CALLER,
        ) as (service, ready),
    ):
        port = int(ready["url"].rpartition(":")[2])
        async with paused(own.parts[DEV_SERVER].pid):
            # Temporal does not answer. Therefore the readiness request runs for a while.
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n")
            # The 100 is sent just before the route runs: from here on the request counts as running.
            assert b"100 Continue" in await reader.readline()
            await reader.readline()
            _, second = await asyncio.open_connection("127.0.0.1", port)
            service.send_signal(signal.SIGTERM)

            async def closed() -> None:
                try:
                    _, third = await asyncio.open_connection("127.0.0.1", port)
                except ConnectionError:
                    return
                third.close()
                await third.wait_closed()
                message = "still accepting"
                raise AssertionError(message)

            await assert_eventually(closed)
            assert service.returncode is None
            assert b"503" in await reader.readline()
        assert await asyncio.wait_for(service.wait(), 30) == 0
        for each in (writer, second):
            each.close()
            await each.wait_closed()


def fit(settings: Path, world: World, service: str) -> None:
    """Write the keys, queue and addresses of *world* to the handler's file; the caller may start *service* only."""
    text = (settings / "handler.toml").read_text()
    for old, new in (
        ("start_keys = .*", f"start_keys = {key_set_text(world.keys.start)}"),
        ("completion_keys = .*", f"completion_keys = {key_set_text(world.keys.completion)}"),
        ('task_queue = ".*"', f'task_queue = "{world.payment_queue}"'),
        (r"PaymentService/\*", f"{service}/*"),
        ("^url = .*", f'url = "{world.service.url}"'),
        ('url = "[^"]*/callbacks"', f'url = "{world.receiver.url}/callbacks"'),
    ):
        text = re.sub(old, new, text, flags=re.MULTILINE)
    (settings / "handler.toml").write_text(text)


async def test_a_handler_that_hosts_the_worker_starts_eagerly(world: World, settings: Path) -> None:
    """With `--with-worker` the first workflow task goes to the worker in the same process, without a task queue."""
    await world.stop_worker("handler")
    await world.service.stop()
    fit(settings, world, "ProbeService")
    async with process(
        *(*BRIDGE, "handler", "serve", "--module", "tests.support.targets", "--with-worker"),
        *("--port", str(world.service.port)),
        BRIDGE_CONFIG=str(settings / "handler.toml"),
        TEMPORAL_ADDRESS=world.server.address,
        TEMPORAL_NAMESPACE=HANDLER,
    ) as (service, _):
        ask = Ask(key=world.key(), text="eager")
        assert await (await world.call(ask)).result() == Reply("eager")
        first = (await world.target(ask).fetch_history()).events[0]
        assert first.workflow_execution_started_event_attributes.eager_execution_accepted
        service.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.wait(), 30) == 0


async def test_a_service_may_have_operations_with_and_without_a_workflow(
    world: World, settings: Path, tmp_path: Path
) -> None:
    """The module in docs/processes.md is served from the current directory as it is printed there."""
    await world.stop_worker("handler")
    await world.service.stop()
    fit(settings, world, "PaymentService")
    page = (ROOT / "docs" / "processes.md").read_text().partition("## What a module offers")[2].partition("\n## ")[0]
    [module] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "payments.py").write_text(module)
    signer, payment = MessageSigner(world.keys.start), {"order_id": world.key(), "amount": 100}
    async with process(
        *(*BRIDGE, "handler", "serve", "--module", "payments", "--with-worker", "--port", "0"),
        cwd=tmp_path,
        BRIDGE_CONFIG=str(settings / "handler.toml"),
        TEMPORAL_ADDRESS=world.server.address,
        TEMPORAL_NAMESPACE=HANDLER,
    ) as (_, ready):
        answers = {}
        for operation in ("quote", "process"):
            message = start(world, payment)
            message.url = message.url.replace("ProbeService/probe", f"PaymentService/{operation}")
            message.url = message.url.replace(world.service.url, ready["url"])
            answers[operation] = await send(message, signer)
        assert (answers["quote"].status, answers["quote"].body) == (200, b"103.0")
        assert answers["process"].status == 201
        target = world.handler_client.get_workflow_handle(f"payment-{payment['order_id']}")
        assert await target.result() == "paid 100.0"


async def test_a_module_may_have_operations_without_workflows_only(server: Server, settings: Path) -> None:
    """The service then starts no workflow, and serves the operations."""
    async with process(
        *(*BRIDGE, "handler", "serve", "--module", "tests.support.services", "--port", "0"),
        BRIDGE_CONFIG=str(settings / "handler.toml"),
        TEMPORAL_ADDRESS=server.address,
        TEMPORAL_NAMESPACE=HANDLER,
    ) as (service, ready):
        assert ready["service"] == "handler"
        service.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.wait(), 30) == 0


def key_set_text(key_set: Any) -> str:
    return f'{{ signing = "k1", keys = {{ k1 = "{key_set.keys["k1"].get_secret_value()}" }} }}'


@pytest.mark.part("stack", short=True)
async def test_the_demo_does_the_main_job(server: Server) -> None:
    """Five orders through one process for each team end as expected; an ordinary call takes two HTTP requests."""
    done = await asyncio.to_thread(
        subprocess.run,
        [str(ROOT / "scripts" / "demo"), "--json"],
        env={**os.environ, "TEMPORAL_ADDRESS": server.address},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["ok"]
    orders = report["orders"]
    assert [each["outcome"] for each in orders] == ["succeeded", "succeeded", "failed", "succeeded", "succeeded"]
    assert orders[2]["error"] == {
        "type": "CardDeclined",
        "message": "card declined",
        "cause": "IssuerRefused: insufficient funds",
    }
    assert [each["http_requests"] for each in orders] == [2, 2, 2, 2, 1]
    assert [each["renewals"] for each in orders] == [0] * 5
    assert orders[0]["target"] == orders[4]["target"]
    assert {each["caller_events"] for each in orders} == {11}
    assert "every order ended as expected" in done.stderr


def up(*options: str) -> list[str]:
    """The command with separate ports, because other tests run it at the same time."""
    return [str(ROOT / "scripts" / "up"), "--port", str(free_port_pair()), "--settlement", "0.5", *options]


def free_port_pair() -> int:
    """A free port; the port of its UI is free too."""
    while True:
        [port] = free_ports(1)
        with contextlib.suppress(NoServerError, OverflowError):
            require_free(port + 1000)
            return port


@pytest.mark.parametrize(
    ("options", "end", "processes"),
    [
        pytest.param([], signal.SIGINT, {"temporal", "orders", "payments"}, id="one process for each team"),
        pytest.param(
            ["--separate", "--handlers", "2"],
            signal.SIGTERM,
            {"temporal", "receiver", "handler-1", "handler-2", "order-worker", "payment-worker"},
            id="separate",
        ),
        pytest.param(
            ["--clusters", "2"], signal.SIGTERM, {"temporal", "temporal-2", "orders", "payments"}, id="two clusters"
        ),
    ],
)
@pytest.mark.part("stack")
@pytest.mark.usefixtures("no_named_server")
async def test_up_keeps_the_stack_up_and_ends_all_of_it(
    options: list[str], end: signal.Signals, processes: set[str]
) -> None:
    """The one line of JSON gives all addresses; after the end no process of the stack runs."""
    async with process(*up(*options)) as (stack, seen):
        caller = seen["caller"]
        client = await Client.connect(caller["temporal"], namespace=caller["namespace"])
        receipt = await client.execute_workflow(
            OrderWorkflow.run, Order("1", 500), id="order-1", task_queue=caller["task_queue"]
        )
        assert receipt == OrderReceipt("1", "p-1", "paid")
        assert set(seen["processes"]) == processes
        assert (caller["temporal"] == seen["handler"]["temporal"]) is ("--clusters" not in options)
        assert {path.name for path in Path(seen["settings"]).glob("*.toml")} == {"caller.toml", "handler.toml"}
        assert (Path(seen["settings"]) / "caller.toml").stat().st_mode & 0o077 == 0
        stack.send_signal(end)
        assert await asyncio.wait_for(stack.wait(), 60) == 0
    for pid in seen["processes"].values():

        async def gone(pid: int = pid) -> None:
            assert not Path(f"/proc/{pid}").exists(), "still running"

        await assert_eventually(gone)


async def shell(command: str) -> str:
    """The standard output of *command*, run as a user runs a copied command."""
    done = await asyncio.to_thread(
        subprocess.run, command, shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.part("stack")
@pytest.mark.usefixtures("no_named_server")
async def test_up_prints_commands_that_work_unchanged() -> None:
    """The copied commands pay one order, let another one wait, and approve its payment in the other namespace."""
    port = free_port_pair()
    started = await asyncio.create_subprocess_exec(
        *(str(ROOT / "scripts" / "up"), "--port", str(port)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert started.stderr is not None
    said: list[str] = []
    try:
        while "Ctrl-C stops everything." not in said:
            line = await asyncio.wait_for(started.stderr.readline(), 60)
            assert line, said
            said.append(line.decode().rstrip())
        drain = asyncio.create_task(started.stderr.read())
        assert f"Temporal's UI: http://127.0.0.1:{port + 1000}" in said
        execute, start, approve = (line.strip() for line in said if line.startswith("  "))
        assert "COMPLETED" in await shell(execute)
        await shell(start)
        client = await Client.connect(f"127.0.0.1:{port}", namespace=HANDLER)

        async def waits() -> None:
            rows = [row async for row in client.list_workflows('WorkflowId = "payment-8"')]
            assert [row.status for row in rows] == [WorkflowExecutionStatus.RUNNING]

        await assert_eventually(waits)
        await shell(approve)
        assert (await client.get_workflow_handle("payment-8").result())["status"] == "approved"
        started.terminate()
        await drain
    finally:
        if started.returncode is None:
            started.terminate()
        assert await asyncio.wait_for(started.wait(), 60) == 0


@pytest.mark.usefixtures("no_named_server")
def test_up_refuses_a_port_that_is_in_use() -> None:
    """The command does not attach silently to another program's server."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [str(ROOT / "scripts" / "up"), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(["--temporal", "127.0.0.1:1", "--clusters", "2"], "--clusters can only be 1", id="two clusters"),
        pytest.param(["--receivers", "2"], "need --separate", id="counts"),
        pytest.param(["--server", "0.9.9"], "there is no such version; choose 1.29.1", id="unknown version"),
    ],
)
@pytest.mark.usefixtures("no_named_server")
def test_up_refuses_options_that_contradict_each_other(arguments: list[str], says: str) -> None:
    """Before anything is started."""
    done = subprocess.run(
        [str(ROOT / "scripts" / "up"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_settings_files_hold_keys_of_their_own(settings: Path) -> None:
    """Each side's file holds only what that side may know."""
    texts = {side: (settings / f"{side}.toml").read_text() for side in ("caller", "handler")}
    keys = {side: set(re.findall(r'"([\w-]{43})"', text)) for side, text in texts.items()}
    assert len(keys["caller"]) == 3
    assert len(keys["handler"]) == 3
    assert len(keys["caller"] & keys["handler"]) == 2
    assert new_key() not in keys["caller"]
