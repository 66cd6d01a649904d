"""Orphans: targets that nobody waits for any more, found out where the operation wants them canceled.

One activity watches the calls of one target: every attempt asks their receivers, and then names the delay until the
next. So a watch costs one event of history, and a small request per call and interval.
"""

from collections.abc import Callable
from datetime import datetime, timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from bridge.errors import BridgeError
from bridge.protocol import headers as wire
from bridge.protocol.answers import Meaning, Sent
from handler.delivery.callback_client import CallbackClient
from handler.delivery.records import CallMemo
from handler.delivery.workflow import CANCEL_ABANDONED_ACTIVITY, WATCH_CALLERS_ACTIVITY

SOMEBODY_WAITS = "bridge.SomebodyWaits"

_MAX_STEP = timedelta(hours=1)


class AbandonedActivities:
    """The activities behind `caller_close_policy="request_cancel"`, for one worker."""

    def __init__(self, *, callbacks: CallbackClient, first_check: timedelta, clock: Callable[[], datetime]) -> None:
        self._callbacks = callbacks
        self._first_check = first_check
        self._clock = clock

    @activity.defn(name=WATCH_CALLERS_ACTIVITY)
    async def watch_callers(self, calls: list[CallMemo]) -> None:
        """One look. Returns when nobody waits any more.

        Raises:
            ApplicationError: Somebody waits, or may; with the delay until the next look, doubled up to an hour.
        """
        attempt = activity.info().attempt
        step = min(self._first_check * 2.0 ** min(attempt - 1, 20), _MAX_STEP)
        # The first attempt comes with the target's own start: its caller waits.
        if attempt > 1 and not any([await self._waits(call) for call in calls]):
            return
        last = max(datetime.fromtimestamp(call.deadline_ms / 1000, self._clock().tzinfo) for call in calls)
        message = "somebody waits for this target"
        raise ApplicationError(
            message,
            type=SOMEBODY_WAITS,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=max(min(step, last - self._clock()), timedelta(seconds=1)),
        )

    @activity.defn(name=CANCEL_ABANDONED_ACTIVITY)
    async def cancel_abandoned(self) -> None:
        """Ask our own workflow to cancel."""
        info = activity.info()
        await activity.client().get_workflow_handle(info.workflow_id or "", run_id=info.workflow_run_id).cancel()

    async def _waits(self, call: CallMemo) -> bool:
        """Whether *call* still waits. In doubt it does: only a receiver of ours can say no before the deadline."""
        if self._clock().timestamp() * 1000 >= call.deadline_ms:
            return False
        if call.callback_url is None:
            # Cannot be asked; it asks itself, until its deadline.
            return True
        # With the headers of a completion: the callback's proof may be among them.
        headers = call.callback_headers | {wire.OPERATION_STATE: wire.OperationState.RUNNING.value}
        try:
            answer = await self._callbacks.post(
                Sent.QUESTION, call.caller, call.callback_url, headers, b"", more=call.callback_headers
            )
        except BridgeError:
            return True
        return answer.meaning is not Meaning.GONE
