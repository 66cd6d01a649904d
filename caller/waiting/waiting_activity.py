"""The waiting activity: start the operation, wait for its callback, ask again if no callback comes.

Attempt 1 POSTs the start and then waits asynchronously. Its start-to-close timeout is only the first lease. Each later
attempt POSTs the same start again, and the handler answers with the outcome or with "still running". The call therefore
ends even if a message is lost, and the attempts add no events to the caller's history.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta

from nexusrpc import HandlerError
from temporalio import activity
from temporalio.common import RawValue

from bridge.errors import BridgeError, bad_request
from bridge.protocol.start import Running, StartRequest
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.workflow.call import START_OPERATION_ACTIVITY, STILL_RUNNING, OperationCall, Transport
from bridge.workflow.pending_call import timed_out
from caller.endpoint_client import Endpoints, NotStartedError, ResolvedEndpoint, explain
from caller.waiting.attempt import CLOCK_DIFFERENCE, Attempt
from caller.waiting.callback_urls import CallbackUrls
from caller.waiting.renewals import renewal_step, unreached_step
from caller.waiting.started_operation import StartedOperation

HANDLER_NOT_REACHED = "bridge.HandlerNotReached"

_DETAILS_DELAY = timedelta(seconds=1)
"""Delay before an attempt records the target's name. A call that ends earlier costs the server no write."""

_log = event_logger(__name__)


class OperationActivities:
    """The waiting activity, for one worker."""

    def __init__(
        self,
        *,
        endpoints: Endpoints,
        callbacks: CallbackUrls | None,
        metrics: Metrics,
        clock: Callable[[], datetime],
        jitter: Callable[[], float] = lambda: random.uniform(-1, 1),  # noqa: S311 - spreads load, keeps no secret
    ) -> None:
        """*callbacks* is None if the settings have no receiver."""
        self._endpoints = endpoints
        self._callbacks = callbacks
        self._metrics = metrics
        self._clock = clock
        self._jitter = jitter
        self._held: dict[str, asyncio.Task[None]] = {}
        self._is_closing = asyncio.Event()
        self._is_clock_reported = False

    @activity.defn(name=START_OPERATION_ACTIVITY)
    async def start_operation(self, call: OperationCall, operation_input: RawValue) -> RawValue:
        """Run one attempt. It returns nothing and raises no error: it reports by task token and ends asynchronously."""
        attempt = Attempt(call, clock=self._clock)
        self._check_clock(attempt)
        remaining = attempt.deadline - attempt.now()
        if (timeout := attempt.passed) is not None:
            await attempt.fail(timed_out(None, timeout))
            activity.raise_complete_async()
        poll, converter = None, attempt.client.data_converter
        try:
            resolved = self._endpoints.resolve(call.endpoint)
            # A call keeps the transport with which it was started, even if the settings have changed since.
            transport = (attempt.known and attempt.known.transport) or call.transport or resolved.endpoint.transport
            poll = timedelta(seconds=resolved.endpoint.poll_interval_s) if transport == "poll" else None
            request = self._request(attempt, resolved, transport)
            answer = await self._endpoints.start(
                call.endpoint, request, operation_input, converter, remaining=remaining
            )
        except (HandlerError, NotStartedError) as error:
            refused = error if isinstance(error, NotStartedError) else _own_fault(error, attempt)
            self._count_renewal(attempt, "not answered", poll=poll)
            await explain(refused.reason, converter)
            await self._end_not_started(attempt, refused, poll=poll)
        else:
            if isinstance(answer, Running):
                self._count_renewal(attempt, "running", poll=poll)
                found = StartedOperation.from_answer(
                    answer, transport=transport, started=attempt.now(), ui_url=resolved.peer.ui_url
                )
                await self._end_running(attempt, answer, found, poll=poll)
            else:
                self._count_renewal(attempt, "outcome", poll=poll)
                await attempt.complete(answer.outcome.within_size_limit(), answer.target)
        activity.raise_complete_async()

    def _count_renewal(self, attempt: Attempt, result: str, *, poll: timedelta | None) -> None:
        if attempt.info.attempt > 1 and poll is None:
            self._metrics.count("bridge_renewals", endpoint=attempt.call.endpoint, result=result)

    async def _end_not_started(self, attempt: Attempt, error: NotStartedError, *, poll: timedelta | None) -> None:
        call, number, known = attempt.call, attempt.info.attempt, attempt.known
        if (reason := error.final_reason(is_refusal_final=known is None)) is not None:
            await attempt.fail(reason)
            return
        # With "poll" the attempt's number counts polls, not failures, and no callback replaces a poll.
        retry_after = error.retry_after or timedelta(0)
        wanted = max(poll, retry_after) if poll else unreached_step(number, retry_after=retry_after)
        request_id = attempt.info.activity_id
        self._endpoints.log_not_reached(call.endpoint, error, request_id=request_id, attempt=number, wanted=wanted)
        await attempt.end(f"handler not reached: {error}", kind=HANDLER_NOT_REACHED, wanted=wanted, known=known)

    async def _end_running(
        self, attempt: Attempt, answer: Running, found: StartedOperation, *, poll: timedelta | None
    ) -> None:
        """Report an attempt that was answered 201 (still running), or hold it open for its lease."""
        call, earlier = attempt.call, attempt.known
        known = earlier if earlier is not None and earlier.operation_token else found
        message = f"still running: {found.target} {found.page}".rstrip()
        if attempt.info.attempt > 1 or poll is not None:
            await attempt.record(known, progress=answer.progress)
            wanted = poll or renewal_step(call, now=attempt.now(), jitter=self._jitter())
            await attempt.end(message, kind=STILL_RUNNING, wanted=wanted, known=known)
            return
        # A nudged attempt (attempt 1 of a known operation) waits until the peer repeats the message of the nudge.
        lease = attempt.lifetime if earlier is not None else timedelta(milliseconds=call.first_lease_ms)
        limit, _ = attempt.limit(known)
        ends = min(attempt.info.started_time + lease, limit or attempt.deadline)

        async def held() -> None:
            await self._pause(min(_DETAILS_DELAY, ends - attempt.now()))
            await attempt.record(known, progress=answer.progress)
            # Temporal accepts a failure only for an open attempt, and the timeout of an attempt is longer than a short
            # lease. The server ends the attempt of a longer lease.
            if ends < attempt.info.started_time + attempt.lifetime:
                await self._pause(ends - attempt.now())
                await attempt.end(message, kind=STILL_RUNNING, wanted=ends - attempt.now(), known=known)

        self._hold(attempt.info.activity_id, held())

    def _check_clock(self, attempt: Attempt) -> None:
        if abs(attempt.clock_difference) < CLOCK_DIFFERENCE or self._is_clock_reported:
            return
        self._is_clock_reported = True
        _log.warning(
            "bridge.clock_differs: this worker's clock is %.0f s ahead of the Temporal server's; "
            "signed messages fail beyond five minutes. Synchronize the clocks",
            attempt.clock_difference.total_seconds(),
        )

    async def close(self) -> None:
        """Record the details of all held attempts, and end those attempts now."""
        self._is_closing.set()
        await asyncio.gather(*self._held.values(), return_exceptions=True)

    def forget(self, request_id: str) -> None:
        """Stop holding an attempt whose call has ended. May be called from any thread, as workflows do."""
        if (task := self._held.get(request_id)) is not None:
            task.get_loop().call_soon_threadsafe(task.cancel)

    def count(self, call: OperationCall, outcome: str, seconds: float) -> None:
        """Count a call whose wait has ended. May be called from any thread, as workflows do."""
        endpoint, transport = "unknown", call.transport
        with contextlib.suppress(HandlerError):
            transport = transport or self._endpoints.resolve(call.endpoint).endpoint.transport
            endpoint = call.endpoint
        labels = {"endpoint": endpoint, "operation": f"{call.service}/{call.operation}"}
        self._metrics.count("bridge_calls", **labels, transport=transport or "unknown", outcome=outcome)
        self._metrics.observe("bridge_call_duration", timedelta(seconds=seconds), **labels)

    def _request(self, attempt: Attempt, resolved: ResolvedEndpoint, transport: Transport) -> StartRequest:
        call, now, is_known = attempt.call, attempt.now(), attempt.known is not None
        callback, wait = None, None
        # The handler ignores the callback of a renewal. If there is no longer a receiver, leave it out.
        if transport != "poll" and self._callbacks is not None:
            callback = self._callbacks.mint(attempt, handler=resolved.endpoint.handler, now=now)
        elif transport != "poll" and not is_known:
            message = 'the settings have no receiver: only transport="poll" works without one'
            raise bad_request(message)
        if transport == "wait" and not is_known:
            # Only the first start is held; a renewal of a running operation is not. The answer must arrive while this
            # attempt may run, within the first half of the lease, and in time to record that the operation was started.
            lease = min(filter(None, (call.first_lease_ms, call.start_to_close_ms)))
            ends = min(attempt.deadline, call.start_deadline or attempt.deadline)
            wait = min(timedelta(seconds=resolved.endpoint.wait_s), timedelta(milliseconds=lease) / 2, (ends - now) / 2)
        return StartRequest(
            service=call.service,
            operation=call.operation,
            request_id=attempt.info.activity_id,
            callback_url=callback,
            headers=call.headers,
            links=[attempt.caller.to_link()],
            operation_timeout=min(call.close_deadline(now), attempt.deadline) - now,
            scheduled_time=call.scheduled_time,
            attempt=max(attempt.info.attempt, 1 if attempt.is_first else 2),
            # A handler service of another namespace, to which the endpoint may point by now, then starts nothing.
            operation_token=(attempt.known.operation_token if attempt.known else "") or None,
            wait=wait if wait and wait >= timedelta(seconds=1) else None,
        )

    def _hold(self, request_id: str, held: Coroutine[None, None, None]) -> None:
        def drop(task: asyncio.Task[None]) -> None:
            # A nudged activity begins again with attempt 1, perhaps while the earlier attempt is still held.
            if self._held.get(request_id) is task:
                del self._held[request_id]

        self._held[request_id] = asyncio.create_task(held)
        self._held[request_id].add_done_callback(drop)

    async def _pause(self, delay: timedelta) -> None:
        """Wait for *delay*, or until the worker stops."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_closing.wait(), delay.total_seconds())


def _own_fault(error: HandlerError, attempt: Attempt) -> NotStartedError:
    """Return *error*, for which no request was sent: the caller's settings or the size of its input are at fault.

    The error ends the call only at its first attempt. An earlier attempt may have started the operation.
    """
    reason = error if attempt.is_first else BridgeError(error.message)
    return NotStartedError(reason, retry_after=None)
