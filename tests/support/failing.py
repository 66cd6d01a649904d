"""A target that fails in every possible way, its handlers, and a workflow that returns the errors it caught."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import nexusrpc
from nexusrpc import HandlerError, HandlerErrorType, OperationError, OperationErrorState
from nexusrpc.handler import StartOperationContext, service_handler, sync_operation
from temporalio import activity, exceptions, nexus, workflow
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import RetryState, TimeoutType
from temporalio.api.failure.v1 import Failure
from temporalio.common import RetryPolicy

import bridge
from bridge.workflow.call import Transport

OWN_TIMEOUT = timedelta(seconds=2)
"""The timeout of the target of `bounded`."""

UNPOLLED = "a task queue without a worker"


@dataclass(frozen=True)
class Trial:
    """The failure that the target shall show."""

    key: str
    """The workflow id is made from it."""
    behaviour: str


@dataclass(frozen=True)
class Way:
    """The options of one call."""

    transport: Transport | None
    """None: the SDK's own Nexus client, without code of ours."""
    endpoint: str
    operation: str = "fail"
    deadline: float = 30.0
    lease: float = 30.0
    cancels: bool = False
    """Cancel the call on the signal `cancel_call`, when the target runs."""


@nexusrpc.service
class TrialService:
    fail: nexusrpc.Operation[Trial, str]
    bounded: nexusrpc.Operation[Trial, str]
    unserved: nexusrpc.Operation[Trial, str]


@nexusrpc.service
class AnswerService:
    """An operation that ends while its start is answered."""

    answer: nexusrpc.Operation[Trial, str]


def check(trial: Trial) -> None:
    if trial.behaviour == "refused":
        message = "the amount is negative"
        raise ValueError(message)


def workflow_id(trial: Trial) -> str:
    return f"trial-{trial.key}"


@activity.defn
async def fail(behaviour: str) -> None:
    match behaviour:
        case "hang":
            activity.heartbeat({"done": 3}, "of 7")
            await asyncio.Event().wait()
        case "benign":
            raise exceptions.ApplicationError(
                "come again", type="Busy", category=exceptions.ApplicationErrorCategory.BENIGN, non_retryable=True
            )
        case _:
            inner = KeyError("the innermost")
            raise exceptions.ApplicationError("the card was declined", {"code": 7}, type="Declined") from inner


def foreign() -> Failure:
    """A failure as a Go worker writes it: attributes encoded, with causes that no Python worker would raise."""
    failure = Failure(message="Encoded failure", source="GoSDK", stack_trace="goroutine 7 [running]:\nmain.Charge()")
    failure.encoded_attributes.CopyFrom(Payload(metadata={"encoding": b"json/plain"}, data=b'{"message":"pst"}'))
    info = failure.application_failure_info
    info.type = "*errors.errorString"
    info.details.payloads.add(metadata={"encoding": b"json/plain", "go": b"\xff\x00"}, data=b"[1,2]")
    activity_failure = failure.cause
    activity_failure.message, activity_failure.source = "activity error", "GoSDK"
    activity_info = activity_failure.activity_failure_info
    activity_info.scheduled_event_id, activity_info.started_event_id = 5, 6
    activity_info.identity, activity_info.activity_type.name, activity_info.activity_id = "7@go@", "Charge", "5"
    activity_info.retry_state = RetryState.RETRY_STATE_MAXIMUM_ATTEMPTS_REACHED
    timeout = activity_failure.cause
    timeout.message, timeout.source = "activity Heartbeat timeout", "Server"
    timeout.timeout_failure_info.timeout_type = TimeoutType.TIMEOUT_TYPE_HEARTBEAT
    timeout.timeout_failure_info.last_heartbeat_details.payloads.add(
        metadata={"encoding": b"json/plain"}, data=b'{"done":3}'
    )
    nested = timeout.cause
    nested.message, nested.source = "nexus operation completed unsuccessfully", "Server"
    operation = nested.nexus_operation_execution_failure_info
    operation.scheduled_event_id, operation.endpoint, operation.service = 9, "bank", "Bank"
    operation.operation, operation.operation_token = "debit", "token"
    refused = nested.cause
    refused.message = "no such account"
    refused.nexus_handler_failure_info.type = "NOT_FOUND"
    last = refused.cause
    last.message, last.source = "PHP says no", "PhpSDK"
    last.server_failure_info.non_retryable = True
    last.cause.message = "a failure that says nothing more"
    return failure


@bridge.emits_callback(service=TrialService, operation=TrialService.fail, workflow_id=workflow_id, check=check)
@workflow.defn(sandboxed=False)
class FailingWorkflow:
    @workflow.run
    async def run(self, trial: Trial) -> str:
        await self._behave(trial)
        return "did not fail"

    async def _behave(self, trial: Trial) -> None:  # noqa: PLR0915 - one case for each way to fail
        match trial.behaviour:
            case "application error with everything":
                inner = exceptions.ApplicationError("the inner reason", 1, type="Inner")
                inner.__cause__ = ValueError("the innermost")
                raise exceptions.ApplicationError(
                    *("declined", {"code": 7}, "two", b"three", None),
                    type="Declined",
                    non_retryable=True,
                    next_retry_delay=timedelta(seconds=13, milliseconds=500),
                    category=exceptions.ApplicationErrorCategory.BENIGN,
                ) from inner
            case "application error with nothing":
                raise exceptions.ApplicationError("plain")
            case "application error without words":
                raise exceptions.ApplicationError("", type="Speechless")
            case "unrequested cancellation":
                raise exceptions.CancelledError("withdrawn", {"by": "the bank"}, "today")
            case "timeout of its own":
                await workflow.wait_condition(lambda: False, timeout=0.1)
            case "timeout with details":
                raise exceptions.TimeoutError(
                    "too late", type=exceptions.TimeoutType.HEARTBEAT, last_heartbeat_details=[{"done": 3}, "of 7"]
                )
            case "termination as an error":
                raise exceptions.TerminatedError("ended by the bank")
            case "server error":
                raise exceptions.ServerError("the server says no", non_retryable=True)
            case "handler error in the chain":
                inner_error = HandlerError("too many", type=HandlerErrorType.RESOURCE_EXHAUSTED)
                raise exceptions.ApplicationError("could not debit", type="Debit") from inner_error
            case "failure from another language":
                raise exceptions.FailureError("foreign", failure=foreign())
            case "activity fails":
                await self._activity("fail", schedule_to_close=5.0)
            case "activity fails for good":
                await self._activity("benign", schedule_to_close=5.0)
            case "activity runs too long":
                await self._activity("hang", start_to_close=0.2)
            case "activity falls silent":
                await self._activity("hang", start_to_close=5.0, heartbeat=0.5)
            case "activity is out of time":
                await self._activity("hang", schedule_to_close=0.3)
            case "activity is never taken":
                await self._activity("fail", schedule_to_start=0.1, schedule_to_close=5.0, task_queue=UNPOLLED)
            case "child fails":
                await self._child("application error with everything", trial)
            case "child's activity fails":
                await self._child("activity fails", trial)
            case "child is out of time":
                await self._child("wait", trial, execution_timeout=timedelta(seconds=1))
            case "child is canceled":
                child = await workflow.start_child_workflow(
                    FailingWorkflow.run, self._part(trial, "wait"), id=f"child-{trial.key}"
                )
                child.cancel()
                await child
            case "waits for an activity":
                await self._activity("hang", start_to_close=60.0)
            case "answers a cancel with another failure":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise exceptions.ApplicationError("too late to cancel", type="TooLate") from None
            case "answers a cancel in its own words":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    raise exceptions.CancelledError("undone", {"refunded": 5}) from None
            case _:
                await asyncio.Event().wait()

    async def _activity(
        self,
        behaviour: str,
        *,
        start_to_close: float | None = None,
        schedule_to_close: float | None = None,
        schedule_to_start: float | None = None,
        heartbeat: float | None = None,
        task_queue: str | None = None,
    ) -> None:
        given = (None if each is None else timedelta(seconds=each) for each in (start_to_close, schedule_to_close))
        start_to_close_timeout, schedule_to_close_timeout = given
        await workflow.execute_activity(
            fail,
            behaviour,
            task_queue=task_queue,
            start_to_close_timeout=start_to_close_timeout,
            schedule_to_close_timeout=schedule_to_close_timeout,
            schedule_to_start_timeout=None if schedule_to_start is None else timedelta(seconds=schedule_to_start),
            heartbeat_timeout=None if heartbeat is None else timedelta(seconds=heartbeat),
            retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=10), maximum_attempts=2)
            if behaviour == "fail"
            else RetryPolicy(maximum_attempts=1),
        )

    async def _child(self, behaviour: str, trial: Trial, *, execution_timeout: timedelta | None = None) -> None:
        await workflow.execute_child_workflow(
            FailingWorkflow.run,
            self._part(trial, behaviour),
            id=f"child-{trial.key}",
            execution_timeout=execution_timeout,
        )

    def _part(self, trial: Trial, behaviour: str) -> Trial:
        return Trial(key=f"{trial.key}-child", behaviour=behaviour)


@bridge.emits_callback(
    service=TrialService, operation=TrialService.bounded, workflow_id=workflow_id, attach_across_callers=True
)
@workflow.defn(sandboxed=False)
class BoundedWorkflow:
    """Never ends by itself."""

    @workflow.run
    async def run(self, trial: Trial) -> str:
        await asyncio.Event().wait()
        return "did not fail"


TARGETS = [FailingWorkflow, BoundedWorkflow]


@service_handler(name="TrialService")
class Trials:
    """The same operations, served by the SDK alone, as the reference."""

    @nexus.workflow_run_operation
    async def fail(self, ctx: nexus.WorkflowRunOperationContext, trial: Trial) -> nexus.WorkflowHandle[str]:
        if trial.behaviour == "refused":
            raise HandlerError("the amount is negative", type=HandlerErrorType.BAD_REQUEST)
        return await ctx.start_workflow(FailingWorkflow.run, trial, id=workflow_id(trial))

    @nexus.workflow_run_operation
    async def bounded(self, ctx: nexus.WorkflowRunOperationContext, trial: Trial) -> nexus.WorkflowHandle[str]:
        return await ctx.start_workflow(
            BoundedWorkflow.run, trial, id=workflow_id(trial), execution_timeout=OWN_TIMEOUT
        )


@service_handler(service=AnswerService)
class Answers:
    """Plain nexusrpc operations, run by the handler service and by the SDK's worker."""

    @sync_operation
    async def answer(self, ctx: StartOperationContext, trial: Trial) -> str:
        inner = exceptions.ApplicationError("the inner reason", {"code": 1}, type="Inner")
        inner.__cause__ = ValueError("the innermost")
        match trial.behaviour:
            case "operation fails for a reason":
                raise OperationError("no such rate", state=OperationErrorState.FAILED) from inner
            case "operation fails":
                raise OperationError("no such rate", state=OperationErrorState.FAILED)
            case "operation is canceled":
                raise OperationError("withdrawn", state=OperationErrorState.CANCELED)
            case "operation is canceled for a reason":
                raise OperationError("withdrawn", state=OperationErrorState.CANCELED) from inner
            case "handler refuses":
                raise HandlerError("the amount is negative", type=HandlerErrorType.BAD_REQUEST)
            case "handler refuses for a reason":
                raise HandlerError("the amount is negative", type=HandlerErrorType.BAD_REQUEST) from inner
            case "handler gives up":
                raise HandlerError("gone", type=HandlerErrorType.INTERNAL, retryable_override=False)
            case "application error for good":
                raise exceptions.ApplicationError("rates were withdrawn", {"code": 1}, type="Gone", non_retryable=True)
            case _:
                return "did not fail"


@workflow.defn(sandboxed=False)
class CatchingWorkflow:
    """Makes one call and returns the errors that it caught."""

    def __init__(self) -> None:
        self._cancels = False

    @workflow.signal
    def cancel_call(self) -> None:
        self._cancels = True

    @workflow.run
    async def run(self, trial: Trial, way: Way) -> list[dict[str, str]]:
        service = AnswerService if way.operation == "answer" else TrialService
        deadline = timedelta(seconds=way.deadline)
        try:
            client: Any
            if way.transport is None:
                client = workflow.create_nexus_client(service=service, endpoint=way.endpoint)
            else:
                lease = timedelta(seconds=way.lease)
                renewals = bridge.Renewals(initial=lease, maximum=timedelta(seconds=60))
                client = bridge.create_client(
                    service=service,
                    endpoint=way.endpoint,
                    transport=way.transport,
                    first_lease=lease,
                    renewals=renewals,
                )
            call = await client.start_operation(
                way.operation, trial, output_type=str, schedule_to_close_timeout=deadline
            )
            if way.cancels:
                await workflow.wait_condition(lambda: self._cancels)
                call.cancel()
            return [{"class": "none", "text": await call}]
        except exceptions.NexusOperationError as error:
            return [facts_of(each) for each in chain(error)]


def chain(error: BaseException | None) -> list[BaseException]:
    """*error* and its causes."""
    return [] if error is None else [error, *chain(error.__cause__)]


def facts_of(error: BaseException) -> dict[str, str]:
    """All facts that a caller can read from *error*, as text. For a stack trace only its existence."""
    names = ["message"]
    match error:
        case exceptions.NexusOperationError():
            names += ["service", "operation"]
        case exceptions.ApplicationError():
            names += ["type", "details", "non_retryable", "next_retry_delay", "category"]
        case exceptions.CancelledError():
            names += ["details"]
        case exceptions.TimeoutError():
            names += ["type", "last_heartbeat_details"]
        case exceptions.ServerError():
            names += ["non_retryable"]
        case exceptions.ActivityError():
            names += ["scheduled_event_id", "started_event_id", "identity", "activity_type", "activity_id"]
            names += ["retry_state"]
        case exceptions.ChildWorkflowError():
            names += ["namespace", "workflow_id", "run_id", "workflow_type", "initiated_event_id", "started_event_id"]
            names += ["retry_state"]
        case HandlerError():
            names += ["type", "retryable", "retryable_override"]
        case _:
            pass
    facts = {name: repr(getattr(error, name)) for name in names}
    facts |= {"class": type(error).__name__, "text": str(error)}
    if isinstance(error, HandlerError):
        return facts | {"has_stack": str(bool(error.stack_trace))}
    # The transport makes the outermost error; it is not read from a failure.
    raw = error.failure if isinstance(error, exceptions.FailureError) and error.failure is not None else Failure()
    facts |= {"source": raw.source, "has_stack": str(bool(raw.stack_trace))}
    return facts | {"encoded_attributes": str(raw.encoded_attributes.metadata.get("encoding", b""))}
