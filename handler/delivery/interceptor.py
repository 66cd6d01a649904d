"""The small interceptor: when a target has ended, tell its caller, and change nothing about the ending.

It announces only what is committed: delivery is a normal activity, so the outcome is durable in history before anyone
is told. Delivery is shielded from a cancel that comes after the function has ended, and every error of it is caught.
A target that carries no call in its memo goes on untouched.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, NoReturn

from temporalio import exceptions, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.common import RawValue, WorkflowIDReusePolicy
from temporalio.converter import FailureConverter
from temporalio.worker import (
    ContinueAsNewInput,
    ExecuteWorkflowInput,
    HandleUpdateInput,
    Interceptor,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)

from bridge.protocol.outcome import CANCELED_MESSAGE, too_large
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_MEMO_KEY, MEMO_KEY, CallMemo, Delivery, milliseconds
from handler.delivery.workflow import (
    ATTEMPT_TIMEOUT,
    CANCEL_ORPHAN_ACTIVITY,
    DELIVER_ACTIVITY,
    DELIVERY_WORKFLOW,
    RETRY_POLICY,
    WATCH_CALLERS_ACTIVITY,
    WATCH_TIMEOUT,
)

DELIVERY_BUDGET = timedelta(seconds=10)
"""How long a target stays open for its delivery; after that a workflow of its own carries on."""

MAX_CALLS = 500
"""Calls that one run tells: their records must fit one payload where they are carried over or watched."""
MAX_DELIVERIES_AT_ONCE = 50
MAX_BATCH_BYTES = 2 * 1024 * 1024

_FAILURE_TYPE = b"temporal.api.failure.v1.Failure"


class DeliveryInterceptor(Interceptor):
    """Puts delivery around every workflow of a worker."""

    def __init__(self, *, failure_converter: FailureConverter, max_outcome_bytes: int, budget: timedelta) -> None:
        """*max_outcome_bytes*: a larger outcome is told as a failure.

        A command that passes the server's limit terminates the workflow (1.29) or fails its task for ever (1.31).
        """
        self._failure_converter = failure_converter
        self._max_outcome_bytes = max_outcome_bytes
        self._budget = budget

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor]:
        """The SDK makes the instance itself, so what it needs rides on a class of its own."""
        del input
        converter, limit, budget = self._failure_converter, self._max_outcome_bytes, self._budget

        class Inbound(_Inbound):
            failure_converter: ClassVar[FailureConverter] = converter
            max_outcome_bytes: ClassVar[int] = limit
            delivery_budget: ClassVar[timedelta] = budget

        return Inbound


class _Inbound(WorkflowInboundInterceptor):
    failure_converter: ClassVar[FailureConverter]
    max_outcome_bytes: ClassVar[int]
    delivery_budget: ClassVar[timedelta]

    _has_ended = False

    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        """Register the attaching of calls: here, because a signal may be accepted before the first workflow task."""
        self._calls: dict[str, CallMemo] = {}
        super().init(_Outbound(outbound, self._calls))
        workflow.set_signal_handler(ATTACH_SIGNAL, self._attach)

    def _attach(self, call: CallMemo) -> None:
        # The first callback of a call counts: those of its renewals name the same wait. Beyond the bound the renewals
        # are what finds the outcome.
        if len(self._calls) < MAX_CALLS:
            self._calls.setdefault(call.request_id, call)

    async def execute_workflow(self, input: ExecuteWorkflowInput) -> Any:  # noqa: A002
        own = _own_call()
        for call in [*([own] if own is not None else []), *_carried_calls()]:
            self._attach(call)
        # Decided by the call that started the run: one that somebody else started is not ours to cancel.
        if own is not None and own.on_orphaned == "cancel":
            # Held, or the loop might forget it; it ends with the run.
            self._watching = asyncio.create_task(self._cancel_when_orphaned())
        try:
            result = await super().execute_workflow(input)
        except (Exception, asyncio.CancelledError) as error:
            # Continue-as-new is a BaseException and passes by: it is no ending. Nor is a run that its worker lets go
            # of, which looks like a cancellation; there the SDK refuses whatever could change something.
            workflow.random()
            state = _state_of(error)
            if state is None or not self._calls:
                raise
            failure = self._failure_of(error)
            if state == "canceled":
                await self._tell(state, _failure_payload(_canceled()))
            elif not _may_be_retried():
                await self._tell(state, _failure_payload(failure))
            if state == "failed" and exceptions.is_cancelled_exception(error):
                # Told as failed; a cancel that came meanwhile must not turn this very error into a cancellation.
                raise exceptions.FailureError(failure.message, failure=failure) from error
            raise
        if self._calls:
            [payload] = workflow.payload_converter().to_payloads([result])
            await self._tell("succeeded", payload)
        return result

    async def handle_update_handler(self, input: HandleUpdateInput) -> Any:  # noqa: A002
        # Here and not in the validator, which does not run for updates without one.
        if self._has_ended:
            message = "the workflow has ended"
            raise exceptions.ApplicationError(message, type="bridge.WorkflowEnded", non_retryable=True)
        return await super().handle_update_handler(input)

    async def _cancel_when_orphaned(self) -> None:
        """Ask our own run to cancel once none of its calls waits any more, also of those attached meanwhile."""
        watched: list[CallMemo] = []
        while len(watched) < len(self._calls):
            watched = list(self._calls.values())
            await workflow.execute_activity(
                WATCH_CALLERS_ACTIVITY,
                args=[watched],
                start_to_close_timeout=WATCH_TIMEOUT,
                retry_policy=RETRY_POLICY,
                cancellation_type=workflow.ActivityCancellationType.ABANDON,
                summary="does anybody wait?",
            )
        if not self._has_ended:
            await workflow.execute_activity(
                CANCEL_ORPHAN_ACTIVITY, start_to_close_timeout=ATTEMPT_TIMEOUT, summary="nobody waits"
            )

    async def _tell(self, state: str, content: Payload) -> None:
        """Tell every call of this run, also those that attach while others are being told."""
        self._has_ended = True
        if content.ByteSize() > self.max_outcome_bytes:
            told = too_large(content.ByteSize(), self.max_outcome_bytes).failure or Failure()
            state, content = "failed", _failure_payload(told)
        close_time = workflow.now()
        # While others have to be told the run stays open, and a start may not be held as long as that.
        told_calls = _told_by_answer() if len(self._calls) == 1 else set()
        while untold := [call for request_id, call in self._calls.items() if request_id not in told_calls]:
            told_calls.update(call.request_id for call in untold)
            deliveries = [_delivery(call, state, close_time) for call in untold if call.callback_url is not None]
            # In batches: the commands of one task, each with its copy of the outcome, must fit one gRPC message.
            size = max(1, min(MAX_DELIVERIES_AT_ONCE, MAX_BATCH_BYTES // max(content.ByteSize(), 1)))
            for first in range(0, len(deliveries), size):
                await _shielded([self._deliver(each, content) for each in deliveries[first : first + size]])

    async def _deliver(self, delivery: Delivery, content: Payload) -> None:
        try:
            await workflow.execute_activity(
                DELIVER_ACTIVITY,
                args=[delivery, RawValue(content)],
                result_type=str,
                schedule_to_close_timeout=self.delivery_budget,
                start_to_close_timeout=min(ATTEMPT_TIMEOUT, self.delivery_budget),
                retry_policy=RETRY_POLICY,
                summary=f"{delivery.state} to {delivery.caller}",
            )
        except Exception as error:  # noqa: BLE001 - whatever became of the delivery, the target closes as it would
            workflow.logger.info("bridge.delivery_handed_over", extra={"bridge.error": type(error).__name__})
        else:
            return
        try:
            # The start is awaited: a child commanded in the closing task is never started.
            _ = await workflow.start_child_workflow(
                DELIVERY_WORKFLOW,
                args=[delivery, RawValue(content)],
                id=delivery.workflow_id_of_delivery,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                cancellation_type=workflow.ChildWorkflowCancellationType.ABANDON,
                static_summary=f"{delivery.state} to {delivery.caller}",
            )
        except exceptions.WorkflowAlreadyStartedError:
            # Another run of this closing got as far: handed over.
            return
        except Exception as error:  # noqa: BLE001 - as above; the caller's renewal will find the outcome
            workflow.logger.warning("bridge.delivery_lost", extra={"bridge.error": type(error).__name__})

    def _failure_of(self, error: BaseException) -> Failure:
        if isinstance(error, asyncio.CancelledError):
            error = exceptions.CancelledError(str(error))
        failure = Failure()
        self.failure_converter.to_failure(error, workflow.payload_converter(), failure)
        return failure


class _Outbound(WorkflowOutboundInterceptor):
    def __init__(self, next: WorkflowOutboundInterceptor, calls: dict[str, CallMemo]) -> None:  # noqa: A002
        super().__init__(next)
        self._calls = calls

    def continue_as_new(self, input: ContinueAsNewInput) -> NoReturn:  # noqa: A002
        """Carry the calls over. Without a memo in the command the server carries the old one, and with one nothing."""
        raw_memo = workflow.info().raw_memo
        own, own_call = raw_memo.get(MEMO_KEY), _own_call()
        started_by = own_call.request_id if own_call is not None else None
        now_ms = milliseconds(workflow.now())
        attached = [
            call for request_id, call in self._calls.items() if request_id != started_by and call.deadline_ms > now_ms
        ]
        if input.memo is not None or attached:
            kept = {name: RawValue(value) for name, value in raw_memo.items()} if input.memo is None else input.memo
            ours: dict[str, Any] = {ATTACHED_MEMO_KEY: attached} if attached else {}
            input.memo = {**kept, **ours, **({MEMO_KEY: RawValue(own)} if own is not None else {})}
        super().continue_as_new(input)


def _own_call() -> CallMemo | None:
    """The call that started this run; None if no call did, or the memo under our name is somebody else's."""
    if MEMO_KEY not in workflow.info().raw_memo:
        return None
    try:
        return workflow.memo_value(MEMO_KEY, type_hint=CallMemo)
    except Exception as error:  # noqa: BLE001 - whatever the converter raises on a foreign value
        workflow.logger.warning("bridge.memo_unreadable", extra={"bridge.error": type(error).__name__})
        return None


def _told_by_answer() -> set[str]:
    """The call that started this run, while its start is held open to answer with the outcome.

    Both times are the server's. Should the answer be lost, the caller asks again.
    """
    info, own = workflow.info(), _own_call()
    if own is None or info.run_id != info.first_execution_run_id:
        return set()
    age = workflow.now() - info.workflow_start_time
    return {own.request_id} if age < timedelta(milliseconds=own.held_ms) else set()


def _carried_calls() -> list[CallMemo]:
    """The calls that were attached to the runs before this one."""
    if ATTACHED_MEMO_KEY not in workflow.info().raw_memo:
        return []
    try:
        return workflow.memo_value(ATTACHED_MEMO_KEY, type_hint=list[CallMemo])
    except Exception as error:  # noqa: BLE001 - as above
        workflow.logger.warning("bridge.memo_unreadable", extra={"bridge.error": type(error).__name__})
        return []


def _delivery(call: CallMemo, state: str, close_time: datetime) -> Delivery:
    info = workflow.info()
    return Delivery.of(
        call,
        state=state,
        workflow_id=info.workflow_id,
        run_id=info.run_id,
        start_time=info.workflow_start_time,
        close_time=close_time,
    )


def _state_of(error: BaseException) -> str | None:
    """How *error* will close the workflow, by the rules of the SDK's worker; None if it fails only the task."""
    if workflow.cancellation_reason() is not None and exceptions.is_cancelled_exception(error):
        return "canceled"
    is_failure = isinstance(error, asyncio.CancelledError) or workflow.is_failure_exception(error)
    return "failed" if is_failure else None


def _may_be_retried() -> bool:
    """Whether another run may follow a failed one. Only its closing event tells, so a sweep or a renewal does."""
    info = workflow.info()
    return info.retry_policy is not None or bool(info.cron_schedule)


async def _shielded(delivering: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all to their ends, however often the workflow is canceled meanwhile: the outcome stands."""
    tasks = [asyncio.create_task(each) for each in delivering]
    for task in tasks:
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                continue
        # Canceled itself only when the worker lets go of the run; then the run must go too.
        task.result()


def _canceled() -> Failure:
    failure = Failure(message=CANCELED_MESSAGE)
    failure.canceled_failure_info.SetInParent()
    return failure


def _failure_payload(failure: Failure) -> Payload:
    return Payload(
        metadata={"encoding": b"binary/protobuf", "messageType": _FAILURE_TYPE},
        data=failure.SerializeToString(deterministic=True),
    )
