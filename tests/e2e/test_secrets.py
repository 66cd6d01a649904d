"""Secrets are planted in real processes, and looked for wherever something leaves a process."""

import asyncio
import contextlib
import os
import re
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from multidict import CIMultiDict
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle

from bridge.security.keys import new_key
from bridge.security.signatures import MessageKind, MessageSigner
from bridge.temporal.executions import describe
from handler.delivery.calls import read_memo
from scripts.environment.server import Server, free_ports
from scripts.environment.stack import ROOT, write_local_settings
from tests.support.callers import CallingWorkflow, CallPlan
from tests.support.commands import BRIDGE
from tests.support.helpers import CALLER, HANDLER, assert_eventually, key_set
from tests.support.targets import Ask, Reply

INPUT = "planted-input-4111111111111111"
"""In inputs, results and failure messages. Histories hold it, as every value that is not encrypted."""
GUESS = "planted-guess-of-a-bearer-secret"


class Processes:
    """Receiver, handler service with its worker, and the caller's worker, each with its whole output in a file."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.running: list[asyncio.subprocess.Process] = []

    async def start(self, name: str, *command: str, namespace: str, side: str, **environment: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "TEMPORAL_ADDRESS": self.server.address,
                    "TEMPORAL_NAMESPACE": namespace,
                    "BRIDGE_CONFIG": str(self.folder / f"{side}.toml"),
                    **environment,
                },
                stdout=log,
                stderr=log,
            )
        self.running.append(process)

        async def is_ready() -> None:
            assert process.returncode is None, self.log(name)
            assert '"ready"' in self.log(name) or '"url"' in self.log(name)

        await assert_eventually(is_ready, within=60)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    async def stop(self) -> None:
        for process in self.running:
            if process.returncode is None:
                process.terminate()
        for process in self.running:
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()


@contextlib.asynccontextmanager
async def running(folder: Path, server: Server, urls: dict[str, str], queues: list[str]) -> AsyncIterator[Processes]:
    processes = Processes(folder, server)
    debug = ("--log-level", "debug")
    try:
        await asyncio.gather(
            processes.start(
                "receiver",
                *(*BRIDGE, "receiver", "serve", *debug),
                namespace=CALLER,
                side="caller",
                BRIDGE_METRICS_ADDRESS=urls["receiver metrics"],
            ),
            processes.start(
                "handler",
                *(*BRIDGE, "handler", "serve", "--module", "tests.support.targets", "--with-worker", *debug),
                namespace=HANDLER,
                side="handler",
                BRIDGE_METRICS_ADDRESS=urls["handler metrics"],
                BRIDGE_TASK_QUEUE=queues[1],
            ),
            processes.start(
                "caller",
                *(sys.executable, "-m", "tests.support.calling_worker", queues[0], "--debug"),
                namespace=CALLER,
                side="caller",
            ),
        )
        yield processes
    finally:
        await processes.stop()


def processes_of_the_machine() -> str:
    """The command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


async def history_of(handle: WorkflowHandle[Any, Any], client: Client) -> str:
    """Every byte that Temporal keeps of a run."""
    described = await describe(client, handle.id)
    assert described is not None
    events = [event.SerializeToString() async for event in handle.fetch_history_events()]
    return b"\n".join([described.SerializeToString(), *events]).decode(errors="replace")


def leaked(secrets: dict[str, str], texts: dict[str, str]) -> list[str]:
    """Which secret is where, without the secret."""
    return [f"{name} in {where}" for name, secret in secrets.items() for where, text in texts.items() if secret in text]


class Calls:
    """Calls of every kind, made by the caller's worker."""

    def __init__(self, server: Server, queue: str) -> None:
        self.server, self.queue = server, queue
        self.id = uuid.uuid4().hex[:8]
        kinds = ("return", "fail", "wait", "refused", "cleanup")
        self.asks = {kind: Ask(f"{self.id}-{kind.partition(' ')[0]}", kind, INPUT) for kind in kinds}
        self.callers: Client
        self.handlers: Client

    async def make(self, processes: Processes) -> str:
        """Make them, and wait until all have ended. Returns the callback URL of one of them."""
        self.callers = await Client.connect(self.server.address, namespace=CALLER)
        self.handlers = await Client.connect(self.server.address, namespace=HANDLER)
        handles = {
            kind: await self.callers.start_workflow(
                CallingWorkflow.run,
                args=[ask, CallPlan(first_lease=1, renewal=1)],
                id=f"calling-{ask.key}",
                task_queue=self.queue,
            )
            for kind, ask in self.asks.items()
        }
        await (await self._until_started("cleanup")).cancel()
        target = await self._until_started("wait")
        memo = await read_memo(self.handlers.data_converter, (await target.describe()).raw_info)
        assert memo is not None
        assert memo.callback_url is not None

        async def is_renewed() -> None:
            assert '"bridge.attempt": 2' in processes.log("handler")

        await assert_eventually(is_renewed)
        await target.signal("say", INPUT)
        for kind, handle in handles.items():
            if kind in {"return", "wait"}:
                assert await handle.result() == Reply(INPUT)
            else:
                with pytest.raises(WorkflowFailureError):
                    await handle.result()
        return memo.callback_url

    async def _until_started(self, kind: str) -> WorkflowHandle[Any, Any]:
        handle = self.handlers.get_workflow_handle(f"probe-{self.asks[kind].key}")

        async def found() -> None:
            assert await describe(self.handlers, handle.id) is not None

        await assert_eventually(found)
        return handle

    async def histories(self) -> dict[str, str]:
        """All that Temporal keeps of the runs of both sides, by workflow id."""
        found = {}
        for kind, ask in self.asks.items():
            sides = [(self.callers, f"calling-{ask.key}"), (self.handlers, f"probe-{ask.key}")]
            for client, workflow_id in sides[: 1 if kind == "refused" else 2]:
                found[workflow_id] = await history_of(client.get_workflow_handle(workflow_id), client)
        return found


async def answers_to_forgeries(url: str, callback_url: str, bearer: str) -> list[tuple[int, str]]:
    """Requests that each fail in another way, most of them with a secret; the status and the text of each answer."""
    body = b'{"key": "forged", "text": "%s", "behaviour": "refused"}' % INPUT.encode()
    unreadable = b'{"key": 1, "text": "%s"}' % INPUT.encode()
    plain = {"Nexus-Request-Id": "r", "Content-Type": "application/json"}
    signed, of_the_signer = CIMultiDict(plain), url.replace("proxy", CALLER)
    MessageSigner(key_set()).sign(MessageKind.START, of_the_signer, signed, body)
    answers = []
    async with aiohttp.ClientSession() as session:
        for to, headers, content in (
            (url, plain | {"Authorization": f"Bearer {bearer}"}, body),
            (url, plain | {"Authorization": f"Bearer {bearer}"}, unreadable),
            (url, plain | {"Authorization": f"Bearer {GUESS}"}, body),
            (of_the_signer, signed, body),
            (callback_url, plain, body),
            (callback_url.replace("sig=", "sig=x"), plain, body),
        ):
            async with session.post(to, headers=headers, data=content) as response:
                answers.append((response.status, await response.text()))
    return answers


@pytest.mark.part("secrets", short=True)
async def test_no_planted_secret_leaves_a_process(server: Server, tmp_path: Path) -> None:
    """Calls that succeed, fail, renew, are refused, canceled and forged, with all logs at DEBUG."""
    ports = [f"127.0.0.1:{port}" for port in free_ports(4)]
    urls = dict(zip(("receiver", "service", "receiver metrics", "handler metrics"), ports, strict=True))
    write_local_settings(tmp_path, receiver_url=f"http://{urls['receiver']}", service_url=f"http://{urls['service']}")
    bearer, path = new_key(), tmp_path / "handler.toml"
    entry = '[callers.proxy]\nauth = "bearer"\noperations = ["ProbeService/*"]\n'
    entry += f'bearer_keys = {{ signing = "b1", keys = {{ b1 = "{bearer}" }} }}\n'
    path.write_text(path.read_text().replace("PaymentService/*", "ProbeService/*") + entry)
    keys = set(re.findall(r'"([\w-]{43})"', path.read_text() + (tmp_path / "caller.toml").read_text()))
    assert len(keys) == 5
    calls = Calls(server, queue=f"secret-orders-{uuid.uuid4().hex[:8]}")
    async with running(tmp_path, server, urls, [calls.queue, f"secret-payments-{calls.id}"]) as processes:
        callback_url = await calls.make(processes)
        answers = await answers_to_forgeries(
            f"http://{urls['service']}/c/proxy/ProbeService/probe", callback_url, bearer
        )
        command_lines, histories = processes_of_the_machine(), await calls.histories()
        metrics = {}
        async with aiohttp.ClientSession() as session:
            for side in ("receiver metrics", "handler metrics"):
                async with session.get(f"http://{urls[side]}/metrics") as response:
                    metrics[side] = await response.text()
    logs = {name: processes.log(name) for name in ("receiver", "handler", "caller")}

    # The places hold what they should, so that a secret would be found.
    assert [status for status, _ in answers] == [400, 400, 401, 401, 401, 401]
    assert calls.queue in command_lines
    assert "bridge.http_request" in logs["handler"]
    assert "bridge.http_request" in logs["receiver"]
    assert '"level": "debug"' in logs["caller"]
    assert "bridge_starts" in metrics["handler metrics"]
    assert "bridge_completions" in metrics["receiver metrics"]
    assert INPUT in histories[f"probe-{calls.asks['return'].key}"]

    token = callback_url.partition("sig=")[2]
    assert len(token) > 100
    secrets = {f"key {number}": key for number, key in enumerate(sorted(keys))}
    secrets |= {"callback token": token, "a guess": GUESS}
    outside = {**logs, **metrics, "answers": repr(answers), "process list": command_lines}
    assert not leaked(secrets, outside | histories)
    assert not leaked({"an input": INPUT, "a task token": "TaskToken(", "a signature": "keyid="}, outside)
