"""The log of the SDK's core, as the commands set it up: readable, and without task tokens."""

import asyncio
import logging
import uuid
from datetime import timedelta

import pytest
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from bridge.temporal.connection import connect
from scripts.environment.server import Server
from tests.support.helpers import CALLER, assert_eventually


@workflow.defn
class Working:
    @workflow.run
    async def run(self) -> None:
        await workflow.execute_activity("work", start_to_close_timeout=timedelta(minutes=1))


async def test_the_core_logs_a_terminated_activity_without_its_token(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The warning is a line of Python's log, and standard output stays empty for the line that a command announces."""
    monkeypatch.setenv("TEMPORAL_ADDRESS", server.address)
    monkeypatch.setenv("TEMPORAL_NAMESPACE", CALLER)
    monkeypatch.setattr(logging.getLogger("temporalio"), "level", logging.NOTSET)
    started, released = asyncio.Event(), asyncio.Event()
    tokens: list[bytes] = []

    @activity.defn
    async def work() -> None:
        tokens.append(activity.info().task_token)
        started.set()
        await released.wait()

    client: Client = await connect()
    queue = f"core-log-{uuid.uuid4().hex[:8]}"
    runner = UnsandboxedWorkflowRunner()
    caplog.set_level(logging.WARNING)
    async with Worker(client, task_queue=queue, workflows=[Working], activities=[work], workflow_runner=runner):
        handle = await client.start_workflow(Working.run, id=queue, task_queue=queue)
        await started.wait()
        await handle.terminate()
        released.set()

        async def is_logged() -> str:
            lines = [each.getMessage() for each in caplog.records if each.name.startswith("temporalio.core")]
            assert any("Activity not found on completion" in line for line in lines)
            return "\n".join(lines)

        text = await assert_eventually(is_logged)
    assert "task_token" in text
    assert "TaskToken…" in text
    assert "already completed" in text, "the reason is lost"
    assert tokens
    assert capfd.readouterr().out == ""
