"""The cancels of one workflow run: sent in batches, and again until each was taken or its call has ended.

A local activity sends them, one at a time for each endpoint: it needs no place among the workflow's pending activities,
and one handler that does not answer holds up no other's cancels. A timer comes before each, so that the commands of the
task in which a call is canceled reach the server first.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import nexusrpc
from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy

from bridge.workflow.call import CANCEL_OPERATIONS_ACTIVITY, CancelAnswer, CancelOrder
from bridge.workflow.own_activity import start_own_activity

MAX_BATCH = 50

_FIRST_DELAY = timedelta(milliseconds=1)
_RETRY_DELAY = timedelta(seconds=1)
"""At least; a tenth of the time since the cancel was asked for, so that a long outage makes few events."""

_TIMEOUT = timedelta(seconds=15)


@dataclass(kw_only=True)
class _Cancel:
    order: CancelOrder
    is_over: Callable[[], bool]
    asked: datetime = field(default_factory=workflow.now)
    due: datetime = field(default_factory=lambda: workflow.now() + _FIRST_DELAY)
    answer: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Cancellations:
    """The cancels of one workflow run through one endpoint."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._open: list[_Cancel] = []
        self._is_changed = False
        self._sender: asyncio.Task[None] | None = None

    def request(self, order: CancelOrder, *, is_over: Callable[[], bool]) -> "asyncio.Future[None]":
        """Ask the handler to cancel a call, until it has taken the cancel or *is_over* holds.

        The future is done once the handler has taken the cancel; it holds a `nexusrpc.HandlerError` where the handler
        refused it for good.
        """
        cancel = _Cancel(order=order, is_over=is_over)
        cancel.answer.add_done_callback(asyncio.Future.exception)
        self._open.append(cancel)
        self.wake()
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send(), name=f"cancels: {self._endpoint}")
        return cancel.answer

    def wake(self) -> None:
        """Look at the cancels again: one was added, or its call has ended."""
        self._is_changed = True

    async def _send(self) -> None:
        while self._open:
            self._is_changed, now = False, workflow.now()
            if due := [each for each in self._open if each.due <= now][:MAX_BATCH]:
                for cancel, answer in zip(due, await self._answers(due), strict=True):
                    _settle(cancel, answer)
            else:
                try:
                    pause = min(each.due for each in self._open) - now
                    await workflow.wait_condition(lambda: self._is_changed, timeout=pause)
                except TimeoutError:
                    pass
            self._open = [each for each in self._open if not each.answer.done() and not each.is_over()]

    async def _answers(self, cancels: list[_Cancel]) -> list[CancelAnswer]:
        calls = "1 call" if len(cancels) == 1 else f"{len(cancels)} calls"
        try:
            answers: list[CancelAnswer] = await start_own_activity(
                workflow.start_local_activity,
                CANCEL_OPERATIONS_ACTIVITY,
                args=[[each.order for each in cancels]],
                result_type=list[CancelAnswer],
                schedule_to_close_timeout=_TIMEOUT,
                retry_policy=RetryPolicy(maximum_attempts=1),
                summary=f"cancel {self._endpoint}: {calls}",
            )
        except exceptions.ActivityError as error:
            workflow.logger.warning("bridge.cancels_not_sent", extra={"bridge.reason": str(error.cause or error)})
            return [CancelAnswer() for _ in cancels]
        return answers


def _settle(cancel: _Cancel, answer: CancelAnswer) -> None:
    if answer.is_requested:
        cancel.answer.set_result(None)
    elif answer.refusal is not None:
        kind = nexusrpc.HandlerErrorType[answer.refusal_type]
        cancel.answer.set_exception(nexusrpc.HandlerError(answer.refusal, type=kind))
    else:
        now = workflow.now()
        cancel.due = now + max(_RETRY_DELAY, (now - cancel.asked) / 10)
