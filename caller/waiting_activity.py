"""The waiting activity: start the operation, wait for its callback, ask again when none has come.

Attempt 1 POSTs the start and goes asynchronous; its start-to-close timeout is only the first lease. Each later attempt
POSTs the same start again, and the handler answers with the outcome or with "still running". So whatever is lost on the
way, the call still ends, and the caller's history grows by nothing.
"""

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NoReturn

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import Payload, Payloads
from temporalio.api.workflowservice.v1 import RecordActivityTaskHeartbeatRequest
from temporalio.client import Client
from temporalio.common import RawValue
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory, TimeoutType
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError

from bridge.errors import OutcomeUnknownError, ToldHandlerError, bad_request
from bridge.protocol.link import WorkflowRef
from bridge.protocol.payload import MAX_PAYLOAD_BYTES
from bridge.protocol.start import Finished, Running, StartRequest
from bridge.workflow.call import (
    OPERATION_UNSUCCESSFUL,
    START_OPERATION_ACTIVITY,
    STILL_RUNNING,
    UNSUCCESSFUL_MESSAGE,
    OperationCall,
    Transport,
    poll_delay,
    renewal_delay,
    unreached_delay,
)
from bridge.workflow.progress import MAX_PROGRESS_BYTES
from caller.callback_urls import CallbackUrls, WaitingAttempt
from caller.completer import Completer, Wait
from caller.endpoints import Endpoints, NotStartedError, Place
from caller.started_operation import Known, describe_target

HANDLER_NOT_REACHED = "bridge.HandlerNotReached"

_DETAILS_DELAY = timedelta(seconds=1)
"""How long the target's name is kept back: of a call that ends sooner the server has nothing to write."""

_log = logging.getLogger(__name__)


class OperationActivities:
    """The caller's activities, for one worker."""

    def __init__(
        self,
        *,
        client: Client,
        endpoints: Endpoints,
        callbacks: CallbackUrls | None,
        completer: Completer,
        clock: Callable[[], datetime],
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),  # noqa: S311 - spreads load, keeps no secret
    ) -> None:
        """*callbacks*: None where we have no receiver."""
        self._client = client
        self._endpoints = endpoints
        self._callbacks = callbacks
        self._completer = completer
        self._clock = clock
        self._jitter = jitter
        self._pending_details: dict[str, asyncio.Task[None]] = {}
        self._is_closing = asyncio.Event()

    @activity.defn(name=START_OPERATION_ACTIVITY)
    async def start_operation(self, call: OperationCall, operation_input: RawValue) -> RawValue:
        """One attempt. It never returns: the outcome completes the activity from outside.

        Raises:
            ApplicationError: Non-retryable where the call failed for good; otherwise with the delay until the next
                attempt, and a message for whoever looks at the pending activity.
        """
        info = activity.info()
        workflow_id, run_id = info.workflow_id or "", info.workflow_run_id or ""
        known = Known.from_details(info.heartbeat_details)
        remaining = call.deadline - self._clock()
        if remaining <= timedelta(0):
            activity.raise_complete_async()
        poll: timedelta | None = None
        try:
            place = self._endpoints.place(call.endpoint)
            transport = _transport(call, place, known)
            poll = place.endpoint.poll_interval if transport == "poll" else None
            request = self._request(call, info, place, transport, is_known=known is not None)
            payload = await self._encoded(operation_input, place)
            answer = await self._endpoints.start(call.endpoint, request, payload, remaining=remaining)
        except HandlerError as error:
            # Our own settings, or our own size.
            self._answer_not_started(call, info, NotStartedError(error, retry_after=None), known=known, poll=poll)
        except NotStartedError as error:
            await self._explain(error.reason)
            self._answer_not_started(call, info, error, known=known, poll=poll)
        match answer:
            case Finished():
                wait = Wait(
                    workflow_id=workflow_id, run_id=run_id, request_id=info.activity_id, task_token=info.task_token
                )
                await self._completer.complete(wait, answer.outcome.fitted(), answer.target)
            case Running():
                now = self._clock()
                until = call.close_deadline(now if known is None else known.started or call.scheduled_time)
                if until <= now < call.deadline:
                    _fail(_timed_out(TimeoutType.START_TO_CLOSE))
                told = Known.from_answer(answer, transport=transport, started=now) if known is None else None
                if info.attempt == 1 and poll is None:
                    self._tell_later(info.activity_id, info.task_token, told)
                    activity.raise_complete_async()
                await self._tell(info.task_token, told or known, progress=answer.progress)
                if poll is not None:
                    delay = poll_delay(call, now=now, interval=poll, until=until)
                else:
                    delay = renewal_delay(call, now=now, jitter=self._jitter(), until=until)
                if delay is not None:
                    message = f"still running: {describe_target(answer.target)}"
                    raise ApplicationError(
                        message,
                        type=STILL_RUNNING,
                        category=ApplicationErrorCategory.BENIGN,
                        next_retry_delay=delay,
                    )
        activity.raise_complete_async()

    async def close(self) -> None:
        """Tell now what was to be told a little later."""
        self._is_closing.set()
        await asyncio.gather(*self._pending_details.values(), return_exceptions=True)

    def forget(self, request_id: str) -> None:
        """Keep to ourselves what was to be told of a call that has ended. For any thread, as workflows have theirs."""
        if (task := self._pending_details.get(request_id)) is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)

    def _request(
        self, call: OperationCall, info: activity.Info, place: Place, transport: Transport, *, is_known: bool
    ) -> StartRequest:
        workflow_id, run_id = info.workflow_id or "", info.workflow_run_id or ""
        now = self._clock()
        caller = WorkflowRef(namespace=self._client.namespace, workflow_id=workflow_id, run_id=run_id)
        callback, wait = None, None
        # Of a renewal no callback counts: it may be left out where there is no receiver any more.
        if transport != "poll" and not (is_known and self._callbacks is None):
            callback = self._mint(call, info, place, now=now)
        if transport == "wait" and not is_known:
            # Once it is known to run, a renewal has no reason to hold anything. The answer must come while this attempt
            # may run, and in time to say that the operation was taken on.
            lease = info.start_to_close_timeout or timedelta(milliseconds=call.first_lease_ms)
            rooms = [lease / 2] if call.start_deadline is None else [lease / 2, (call.start_deadline - now) / 2]
            wait = min(timedelta(seconds=place.endpoint.wait_s), *rooms)
        return StartRequest(
            service=call.service,
            operation=call.operation,
            request_id=info.activity_id,
            callback_url=callback,
            headers=call.headers,
            links=[caller.to_link()],
            operation_timeout=call.close_deadline(now) - now,
            scheduled_time=call.scheduled_time,
            attempt=info.attempt,
            wait=wait if wait and wait >= timedelta(seconds=1) else None,
        )

    def _mint(self, call: OperationCall, info: activity.Info, place: Place, *, now: datetime) -> str:
        if self._callbacks is None:
            message = 'the settings have no receiver: only transport="poll" works without one'
            raise bad_request(message)
        attempt = WaitingAttempt(
            handler=place.endpoint.handler,
            operation=f"{call.service}/{call.operation}",
            workflow_id=info.workflow_id or "",
            run_id=info.workflow_run_id or "",
            request_id=info.activity_id,
            attempt=info.attempt,
            deadline=call.deadline,
        )
        try:
            return self._callbacks.mint(attempt, now=now)
        except ValueError as error:
            raise bad_request(str(error)) from None

    async def _encoded(self, operation_input: RawValue, place: Place) -> Payload:
        # The worker has undone our codec, and fetched the input where it was stored away; it is encoded again to cross.
        converter = self._client.data_converter
        if not place.peer.shares_storage:
            converter = dataclasses.replace(converter, external_storage=None)
        [payload] = await converter.encode([operation_input])
        if payload.ByteSize() > MAX_PAYLOAD_BYTES:
            message = f"the operation's input of {payload.ByteSize()} bytes is over the limit of {MAX_PAYLOAD_BYTES}"
            raise bad_request(message)
        return payload

    async def _explain(self, reason: Exception) -> None:
        """Chain what the handler told of its reason, decoded: our worker encodes it anew."""
        if not isinstance(reason, ToldHandlerError) or reason.told_cause is None:
            return
        try:
            reason.__cause__ = await self._client.data_converter.decode_failure(reason.told_cause)
        except Exception as error:  # noqa: BLE001 - whatever our own converter and codec raise on the peer's value
            _log.info("bridge.cause_unreadable", extra={"bridge.error": type(error).__name__})

    def _answer_not_started(
        self,
        call: OperationCall,
        info: activity.Info,
        error: NotStartedError,
        *,
        known: Known | None,
        poll: timedelta | None,
    ) -> NoReturn:
        reason = error.reason
        if isinstance(reason, OutcomeUnknownError):
            _fail(reason)
        # Once the operation is known to run, no other answer is about the operation: a key rolled out wrongly, or a
        # proxy's 404, must not fail a healthy payment.
        if isinstance(reason, HandlerError) and not reason.retryable and known is None:
            _fail(reason)
        _log.warning(
            "bridge.handler_not_reached",
            extra={
                "bridge.request_id": info.activity_id,
                "bridge.endpoint": call.endpoint,
                "bridge.attempt": info.attempt,
                "bridge.reason": type(reason).__name__,
            },
        )
        now = self._clock()
        if poll is not None:
            # Its attempts count polls, not failures; and no callback will come instead.
            interval = max(poll, error.retry_after or timedelta(0))
            delay = poll_delay(call, now=now, interval=interval, until=call.deadline)
        else:
            delay = unreached_delay(info.attempt, retry_after=error.retry_after, remaining=call.deadline - now)
        if known is None and call.start_deadline is not None:
            if now >= call.start_deadline:
                _fail(_timed_out(TimeoutType.SCHEDULE_TO_START))
            delay = min(filter(None, (delay, call.start_deadline - now)))
        if known is not None and call.start_to_close_ms is not None:
            until = call.close_deadline(known.started or call.scheduled_time)
            if until <= now < call.deadline:
                _fail(_timed_out(TimeoutType.START_TO_CLOSE))
            delay = min(filter(None, (delay, until - now)))
        if delay is None:
            activity.raise_complete_async()
        raise ApplicationError(
            f"handler not reached: {error}"[:1000],
            type=HANDLER_NOT_REACHED,
            category=ApplicationErrorCategory.BENIGN,
            next_retry_delay=delay,
        ) from None

    def _tell_later(self, request_id: str, task_token: bytes, known: Known | None) -> None:
        async def later() -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_closing.wait(), _DETAILS_DELAY.total_seconds())
            await self._tell(task_token, known)

        def drop(task: asyncio.Task[None]) -> None:
            # A nudged activity begins again with attempt 1, perhaps while this one still tells.
            if self._pending_details.get(request_id) is task:
                del self._pending_details[request_id]

        self._pending_details[request_id] = asyncio.create_task(later())
        self._pending_details[request_id].add_done_callback(drop)

    async def _tell(self, task_token: bytes, known: Known | None, *, progress: Payload | None = None) -> None:
        """Make a 201 known: to people as details of the pending activity, to later attempts as proof of it."""
        if known is None:
            return
        try:
            details = await self._client.data_converter.encode([known])
            # The progress stays as the target's converter and codec made it.
            await self._client.workflow_service.record_activity_task_heartbeat(
                RecordActivityTaskHeartbeatRequest(
                    namespace=self._client.namespace,
                    task_token=task_token,
                    identity=self._client.identity,
                    details=Payloads(payloads=[*details, *await self._readable(progress)]),
                ),
                retry=True,
            )
        except RPCError:
            # Completed meanwhile, most often. Losing the details loses nothing else.
            return

    async def _readable(self, progress: Payload | None) -> list[Payload]:
        """The progress, if the next attempt's worker will be able to decode it: details it cannot fail the activity."""
        if progress is None or progress.ByteSize() > MAX_PROGRESS_BYTES:
            return []
        try:
            await self._client.data_converter.decode([progress])
        except Exception as error:  # noqa: BLE001 - whatever our own converter and codec raise on the target's value
            _log.info("bridge.progress_unreadable", extra={"bridge.error": type(error).__name__})
            return []
        return [progress]


def _transport(call: OperationCall, place: Place, known: Known | None) -> Transport:
    """A call keeps the transport with which it was taken on, whatever the settings say since."""
    return (known and known.transport) or call.transport or place.endpoint.transport


def _timed_out(kind: TimeoutType) -> TemporalTimeoutError:
    return TemporalTimeoutError("operation timed out", type=kind, last_heartbeat_details=[])


def _fail(reason: HandlerError | TemporalTimeoutError) -> NoReturn:
    """End the call: nothing was started, nobody knows any more, or a time is out."""
    # Its traceback would tell the history about our code, not about the caller's fault.
    raise ApplicationError(
        UNSUCCESSFUL_MESSAGE,
        type=OPERATION_UNSUCCESSFUL,
        non_retryable=True,
        category=ApplicationErrorCategory.BENIGN,
    ) from reason.with_traceback(None)
