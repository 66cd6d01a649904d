"""What becomes of a target when no caller waits for it any more (`caller_close_policy` of the operation).

With "abandon" the target goes on. With "request_cancel" one activity watches the calls of the target. Each attempt asks
the receivers of these calls, and then names the delay until the next attempt. The watch therefore costs one event of
history, and one small request per call and interval. If no call waits, the target requests its own cancellation.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from temporalio import activity, workflow
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory

from bridge.errors import BridgeError
from bridge.protocol import headers as wire
from bridge.protocol.answers import Meaning, Sent
from handler.delivery.callback_client import CallbackClient
from handler.delivery.records import CallMemo
from handler.delivery.workflow import start_activity

WATCH_CALLERS_ACTIVITY = "bridge.watch_callers"
CANCEL_ABANDONED_ACTIVITY = "bridge.cancel_abandoned"
CALLER_WAITS = "bridge.CallerWaits"
"""Error type of an attempt after which a caller still waits, or may wait."""
MAX_WATCHED = 500
"""Maximum number of calls that one run watches. Their records must fit into one payload."""

_WATCH_TIMEOUT = timedelta(minutes=5)
"""Timeout of one attempt to ask for all calls of a target."""
_MAX_STEP = timedelta(hours=1)


async def cancel_when_abandoned(watched: Mapping[tuple[str, str], CallMemo]) -> None:
    """Request cancellation of this run once none of *watched* waits any more. Runs inside the target.

    Calls that attach later are added to *watched* meanwhile.
    """
    seen: list[CallMemo] = []
    while len(seen) < len(watched):
        seen = list(watched.values())
        await start_activity(
            *(WATCH_CALLERS_ACTIVITY, seen),
            attempt=_WATCH_TIMEOUT,
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary="does any caller wait?",
        )
    await start_activity(CANCEL_ABANDONED_ACTIVITY, summary="no caller")


class CallerWatch:
    """The activities of the watch, for one worker."""

    def __init__(self, *, callbacks: CallbackClient, first: timedelta) -> None:
        """*first* is the time until a target's callers are asked for the first time."""
        self._callbacks = callbacks
        self._first = first

    @activity.defn(name=WATCH_CALLERS_ACTIVITY)
    async def watch_callers(self, calls: list[CallMemo]) -> None:
        """Ask once whether a caller waits. Returns when none of *calls* waits any more.

        Raises:
            ApplicationError: A caller waits, or may wait. The delay until the next attempt doubles up to an hour.
        """
        # The time is the server's, because a worker's clock that is ahead would abandon calls that wait.
        attempt, now = activity.info().attempt, activity.info().started_time
        step = min(self._first * 2.0 ** min(attempt - 1, 20), _MAX_STEP)
        # The first attempt begins with the target's start, when its caller certainly waits.
        if attempt > 1 and not await self._any_waits(calls, now):
            return
        last = max(datetime.fromtimestamp(call.deadline_ms / 1000, UTC) for call in calls)
        message = "a caller waits for this target"
        raise ApplicationError(
            message,
            type=CALLER_WAITS,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=max(min(step, last - now), timedelta(seconds=1)),
        )

    async def _any_waits(self, calls: list[CallMemo], now: datetime) -> bool:
        # One that waits is enough. Hundreds of calls whose receiver hangs would hold the worker's slot for hours.
        for call in calls:
            if await self._waits(call, now):
                return True
        return False

    async def _waits(self, call: CallMemo, now: datetime) -> bool:
        """Whether *call* still waits *now*. If that is unknown, it counts as waiting."""
        if now.timestamp() * 1000 >= call.deadline_ms:
            return False
        if call.callback_url is None:
            # There is no receiver to ask. The caller polls until its deadline.
            return True
        # Send the headers of a completion: they may include the callback's own token.
        headers = call.callback_headers | {wire.OPERATION_STATE: wire.OperationState.RUNNING.value}
        try:
            answer = await self._callbacks.post(
                Sent.QUESTION, call.caller, call.callback_url, headers, b"", more=call.callback_headers
            )
        except BridgeError:
            return True
        return answer.meaning is not Meaning.GONE

    @activity.defn(name=CANCEL_ABANDONED_ACTIVITY)
    async def cancel_abandoned(self) -> None:
        """Request cancellation of the workflow that runs this activity."""
        info = activity.info()
        await activity.client().get_workflow_handle(info.workflow_id or "", run_id=info.workflow_run_id).cancel()
