"""What tests read of a workflow that called: why it failed, its waiting activities, and whether it replays."""

from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import CancelledError, NexusOperationError
from temporalio.worker import Replayer

from caller.plugin import CallerPlugin
from tests.support.callers import CALLERS
from tests.support.helpers import Keys, caller_settings


async def failure_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    """Why the call of a workflow failed, which fails the workflow."""
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    assert isinstance(raised.value.cause, NexusOperationError)
    return raised.value.cause.cause


async def cause_of(handle: WorkflowHandle[Any, Any]) -> BaseException | None:
    """Why the call of a workflow failed, or the cancellation of the workflow itself."""
    with pytest.raises(WorkflowFailureError) as raised:
        await handle.result()
    error = raised.value.cause
    if isinstance(error, CancelledError):
        # The workflow itself was canceled.
        return error
    assert isinstance(error, NexusOperationError)
    return error.cause


async def scheduled(handle: WorkflowHandle[Any, Any]) -> list[str]:
    """The ids of the waiting activities, in order."""
    return [
        event.activity_task_scheduled_event_attributes.activity_id
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    ]


async def replay(handle: WorkflowHandle[Any, Any]) -> None:
    """Replay the history of *handle* like a restarted worker.

    Raises:
        temporalio.workflow.NondeterminismError: Today's code issues other commands.
    """
    url = "http://127.0.0.1:1"
    plugin = CallerPlugin(caller_settings(Keys(), receiver_url=url, endpoint_url=url))
    await Replayer(workflows=CALLERS, plugins=[plugin]).replay_workflow(await handle.fetch_history())
