"""The calls of one workflow run: which of them wait, and which are to be canceled.

Cancels are sent in batches. A cancel is sent again until the handler has accepted it or its call has ended. A local
activity sends the cancels, because at the limit of pending activities the server would refuse any other activity. The
first request waits for no timer, because the server rounds the shortest timer up to a second.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import ClassVar
from weakref import WeakKeyDictionary

from nexusrpc import HandlerError, HandlerErrorType
from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy

from bridge.workflow.call import CALL_ENDED, CANCEL_OPERATIONS_ACTIVITY, CancelAnswer, CancelOrder
from bridge.workflow.own_activity import start_own_activity

MAX_BATCH = 100

_RETRY_DELAY = timedelta(seconds=1)
"""Least delay before a cancel is sent again. The delay is a tenth of the time since the first request, so that a long
outage adds few events to history."""


@dataclass(kw_only=True)
class _Cancel:
    """A cancel that the handler has not accepted yet."""

    order: CancelOrder
    """What to send."""
    is_over: Callable[[], bool]
    """Whether the call has ended, so that the cancel need not be sent any more."""
    first_requested: datetime = field(default_factory=workflow.now)
    """When the cancel was first requested, workflow time."""
    due: datetime = field(default_factory=workflow.now)
    """When to send the cancel next, workflow time."""
    answer: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when the handler has accepted or refused the cancel."""

    def settle(self, answer: CancelAnswer) -> None:
        """Record the answer to one attempt."""
        if answer.is_requested:
            self.answer.set_result(None)
        elif answer.refusal is not None:
            self.answer.set_exception(HandlerError(answer.refusal, type=HandlerErrorType[answer.refusal_type]))
        else:
            self.due = workflow.now() + max(_RETRY_DELAY, (workflow.now() - self.first_requested) / 10)


class RunCalls:
    """The calls of one workflow run. `present` returns the instance of the run whose code is running."""

    _of_runs: ClassVar["WeakKeyDictionary[asyncio.AbstractEventLoop, RunCalls]"] = WeakKeyDictionary()

    def __init__(self) -> None:
        self.waiting: set[str] = set()
        """Request ids of the calls that have a pending activity."""
        self._cancels: list[_Cancel] = []
        self._is_changed = False
        self._sender: asyncio.Task[None] | None = None

    @classmethod
    def present(cls) -> "RunCalls":
        """The calls of the run whose code is running. The key is the event loop, because every run has its own."""
        run = asyncio.get_running_loop()
        if run not in cls._of_runs:
            cls._of_runs[run] = cls()
            if CALL_ENDED not in workflow.extern_functions():
                workflow.logger.warning(
                    "bridge.no_caller_plugin: this worker has no CallerPlugin. The calls of its workflows wait until a "
                    "worker with the plugin polls task queue %s: Worker(..., plugins=[CallerPlugin()])",
                    workflow.info().task_queue,
                )
        return cls._of_runs[run]

    def ended(self, request_id: str) -> None:
        """Record that the activity of a call is not pending any more."""
        self.waiting.discard(request_id)
        self._is_changed = True

    def cancel(self, order: CancelOrder, *, is_over: Callable[[], bool]) -> "asyncio.Future[None]":
        """Ask the handler to cancel a call, repeatedly, until it has accepted the cancel or *is_over* returns true.

        The future is done when the handler has accepted the cancel. If the handler refuses it permanently, the future
        holds a `nexusrpc.HandlerError`.
        """
        cancel = _Cancel(order=order, is_over=is_over)
        cancel.answer.add_done_callback(asyncio.Future.exception)
        self._cancels.append(cancel)
        self._is_changed = True
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name="cancels")
        return cancel.answer

    async def _send(self) -> None:
        while self._cancels:
            # The SDK checks conditions when no task of the run can go on. Every task has then requested its cancels.
            await workflow.wait_condition(lambda: True)
            self._is_changed, now = False, workflow.now()
            if due := [each for each in self._cancels if each.due <= now][:MAX_BATCH]:
                for cancel, answer in zip(due, await _answers(due), strict=True):
                    cancel.settle(answer)
            else:
                pause = min(each.due for each in self._cancels) - now
                with contextlib.suppress(TimeoutError):
                    await workflow.wait_condition(lambda: self._is_changed, timeout=pause)
            self._cancels = [each for each in self._cancels if not each.answer.done() and not each.is_over()]


async def _answers(cancels: list[_Cancel]) -> list[CancelAnswer]:
    try:
        answers: list[CancelAnswer] = await start_own_activity(
            workflow.start_local_activity,
            CANCEL_OPERATIONS_ACTIVITY,
            args=[[each.order for each in cancels]],
            result_type=list[CancelAnswer],
            schedule_to_close_timeout=timedelta(seconds=15),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )
    except exceptions.ActivityError as error:
        workflow.logger.warning("bridge.cancels_not_sent: they are sent again: %s", error.cause or error)
        return [CancelAnswer()] * len(cancels)
    return answers
