"""A contract whose target behaves as the test's input requests, and a workflow that calls it."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import nexusrpc
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue, RetryPolicy, VersioningBehavior
from temporalio.exceptions import ApplicationError, NexusOperationError

import bridge
from bridge.workflow.call import MAX_INPUT_BYTES, Transport
from bridge.workflow.client import MAX_CALLS_IN_FLIGHT
from bridge.workflow.targets import Target


@dataclass(frozen=True)
class Ask:
    """The requested behaviour of the target."""

    key: str
    """The workflow id is made from it."""
    behaviour: str = "return"
    text: str = ""
    size: int = 0


@dataclass(frozen=True)
class Reply:
    text: str
    blob: str = ""


@nexusrpc.service
class ProbeService:
    probe: nexusrpc.Operation[Ask, Reply]
    nothing: nexusrpc.Operation[None, None]
    shared: nexusrpc.Operation[Ask, Reply]
    minded: nexusrpc.Operation[Ask, Reply]
    flaky: nexusrpc.Operation[Ask, Reply]
    foreign: nexusrpc.Operation[Ask, Reply]
    strict: nexusrpc.Operation[Ask, Reply]
    pinned: nexusrpc.Operation[Ask, Reply]
    breaking: nexusrpc.Operation[Ask, Reply]


def check(ask: Ask) -> None:
    if ask.behaviour == "refused":
        message = "the check says no"
        raise ValueError(message)
    if ask.behaviour == "buggy check":
        raise KeyError(ask.key)


def workflow_id(ask: Ask) -> str:
    return "x" * 1001 if ask.behaviour == "long id" else f"probe-{ask.key}"


@bridge.emits_callback(service=ProbeService, operation=ProbeService.probe, workflow_id=workflow_id, check=check)
@workflow.defn
class ProbeWorkflow:
    def __init__(self) -> None:
        self._said: list[str] = []
        self._count = 0

    @workflow.signal
    def say(self, text: str) -> None:
        self._said.append(text)

    @workflow.update
    async def change(self, text: str) -> str:
        self._said.append(text)
        return text

    @workflow.query
    def said(self) -> list[str]:
        return self._said

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        match ask.behaviour:
            case "return":
                return Reply(ask.text, "b" * ask.size)
            case "fail":
                self._fail(ask)
            case "wait":
                await workflow.wait_condition(lambda: bool(self._said))
                match self._said[0]:
                    case "fail":
                        self._fail(ask)
                    case "big":
                        return Reply("big", "b" * ask.size)
                    case text:
                        return Reply(text)
            case "cleanup":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(0.1)
                    raise
            case "slow cleanup":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(3600)
            case "swallow cancel":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    return Reply("went on all the same")
            case "self-canceled failure":
                # After a cancellation without a request the workflow ends as failed.
                raise asyncio.CancelledError
            case "continue once":
                memo = {"mine": "kept"} if ask.text == "own memo" else None
                workflow.continue_as_new(Ask(key=ask.key, behaviour="return", text="second run"), memo=memo)
            case "continue on signal":
                await workflow.wait_condition(lambda: bool(self._said))
                behaviour = "wait" if self._said[0] == "and wait" else "return"
                workflow.continue_as_new(Ask(key=ask.key, behaviour=behaviour, text="second run"))
            case "bug once":
                if not workflow.unsafe.is_replaying() and workflow.info().get_current_history_length() < 5:
                    message = "a bug, not an ending"
                    raise KeyError(message)
                return Reply("mended")
            case _:
                pass
        return Reply("end")

    def _fail(self, ask: Ask) -> None:
        inner = ApplicationError("the inner reason", 1, type="Inner", non_retryable=True)
        message = ask.text or "the outer reason"
        raise ApplicationError(message, {"key": ask.key}, "two", type="Outer") from inner


@bridge.emits_callback(
    service=ProbeService,
    operation=ProbeService.shared,
    workflow_id=lambda ask: f"shared-{ask.key}",
    attach_across_callers=True,
    bounded=True,
)
@workflow.defn
class SharedWorkflow:
    def __init__(self) -> None:
        self._said: list[str] = []

    @workflow.signal
    def say(self, text: str) -> None:
        self._said.append(text)

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: bool(self._said))
        return Reply(self._said[0])


@bridge.emits_callback(
    service=ProbeService,
    operation=ProbeService.minded,
    workflow_id=lambda ask: f"minded-{ask.key}",
    caller_close_policy="request_cancel",
)
@workflow.defn
class MindedWorkflow:
    """Is canceled when no caller waits any more, and reports its progress."""

    def __init__(self) -> None:
        self._said: list[str] = []

    @workflow.signal
    def say(self, text: str) -> None:
        self._said.append(text)
        unreadable = RawValue(Payload(metadata={"encoding": b"made/up"}, data=b"x"))
        bridge.report_progress(unreadable if text == "unreadable" else {"said": text})

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: "done" in self._said)
        return Reply("done")


@bridge.emits_callback(service=ProbeService, operation=ProbeService.nothing, workflow_id=lambda _: "probe-nothing")
@workflow.defn
class NothingWorkflow:
    @workflow.run
    async def run(self) -> None:
        """Has no result."""


@bridge.emits_callback(
    service=ProbeService,
    operation=ProbeService.flaky,
    workflow_id=workflow_id,
    retry_policy=RetryPolicy(initial_interval=timedelta(milliseconds=200), maximum_attempts=3),
)
@workflow.defn
class FlakyWorkflow:
    """Has three attempts."""

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        attempt = workflow.info().attempt
        if ask.behaviour == "wait":
            await workflow.wait_condition(lambda: False)
        if ask.behaviour == "fail" or attempt < 3:
            message = f"attempt {attempt} failed"
            raise ApplicationError(message, type="Flaky")
        return Reply(f"attempt {attempt}")


@bridge.emits_callback(
    service=ProbeService, operation=ProbeService.strict, workflow_id=workflow_id, on_input_mismatch="refuse"
)
@workflow.defn
class StrictWorkflow:
    """Accepts one input for one id."""

    def __init__(self) -> None:
        self._said: list[str] = []

    @workflow.signal
    def say(self, text: str) -> None:
        self._said.append(text)

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: bool(self._said))
        return Reply(ask.text)


@bridge.emits_callback(service=ProbeService, operation=ProbeService.breaking, workflow_id=workflow_id)
@workflow.defn
class BreakingWorkflow:
    """Fails outside its run function."""

    @workflow.init
    def __init__(self, ask: Ask) -> None:
        if ask.behaviour == "init":
            self.fail()

    @workflow.signal
    def fail(self) -> None:
        message = "not in the run function"
        raise ApplicationError(message, type="Broken")

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        if ask.behaviour == "unwritable":
            return object()  # type: ignore[return-value] # the intended bug
        await workflow.wait_condition(lambda: False)
        return Reply("never")


@bridge.emits_callback(service=ProbeService, operation=ProbeService.pinned, workflow_id=workflow_id)
@workflow.defn(versioning_behavior=VersioningBehavior.PINNED)
class PinnedWorkflow:
    """A target for versioned workers."""

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        return Reply(ask.text)


@workflow.defn(name="foreign-type", sandboxed=False)
class ForeignWorkflow:
    """Another team's target, on a worker without the bridge."""

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        match ask.behaviour:
            case "wait":
                await workflow.wait_condition(lambda: False)
            case "fail":
                message = "card declined"
                raise ApplicationError(message, {"code": 51}, type="Declined")
            case _:
                pass
        return Reply(ask.text, "b" * ask.size)


def foreign_target(task_queue: str) -> Target:
    return bridge.external_target(
        service=ProbeService,
        operation=ProbeService.foreign,
        workflow_type="foreign-type",
        workflow_id=lambda ask: f"probe-{ask.key}",
        task_queue=task_queue,
    )


@dataclass(frozen=True)
class CallPlan:
    """The options of the calling workflow's call."""

    operation: str = "probe"
    first_lease: float = 30.0
    renewal: float = 60.0
    deadline: float = 600.0
    endpoint: str = "payments"
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds to go on after the call, so that the run stays open."""
    cancellation: int = int(workflow.NexusOperationCancellationType.WAIT_COMPLETED)
    schedule_to_start: float = 0.0
    start_to_close: float = 0.0
    transport: Transport | None = None
    cancel_after: bool = False
    """Cancel the call, not the workflow, on the signal `cancel_call`."""
    max_input_bytes: int | None = MAX_INPUT_BYTES
    max_calls_in_flight: int = MAX_CALLS_IN_FLIGHT
    catch: bool = False
    """After an error wait for a second, and end successfully with the error's name."""


def _maybe_seconds(seconds: float) -> timedelta | None:
    return timedelta(seconds=seconds) if seconds else None


@workflow.defn
class CallingWorkflow:
    def __init__(self) -> None:
        self._reported = ""
        self._call: bridge.OperationHandle[Reply] | None = None

    @workflow.signal
    def cancel_call(self) -> None:
        assert self._call is not None
        self._call.cancel()

    @workflow.query
    def reported(self) -> str:
        return self._reported

    @workflow.run
    async def run(self, ask: Ask, plan: CallPlan) -> Reply:
        client = bridge.create_client(
            service=ProbeService,
            endpoint=plan.endpoint,
            transport=plan.transport,
            first_lease=timedelta(seconds=plan.first_lease),
            renewals=bridge.Renewals(initial=timedelta(seconds=plan.renewal), maximum=timedelta(seconds=3600)),
            max_input_bytes=plan.max_input_bytes,
            max_calls_in_flight=plan.max_calls_in_flight,
        )
        try:
            self._call = await client.start_operation(
                getattr(ProbeService, plan.operation),
                ask,
                schedule_to_close_timeout=timedelta(seconds=plan.deadline),
                schedule_to_start_timeout=_maybe_seconds(plan.schedule_to_start),
                start_to_close_timeout=_maybe_seconds(plan.start_to_close),
                cancellation_type=workflow.NexusOperationCancellationType(plan.cancellation),
                headers=plan.headers,
            )
            reply = await self._call
        except NexusOperationError as error:
            self._reported = type(error.cause).__name__
            if plan.catch:
                await workflow.sleep(1)
                return Reply(self._reported)
            if plan.after:
                await workflow.wait_condition(lambda: False, timeout=plan.after)
            raise
        if plan.after:
            await workflow.sleep(plan.after)
        return reply


@workflow.defn
class ManyCalls:
    """Awaits many calls at once; counts how they end."""

    @workflow.run
    async def run(self, asks: list[Ask], plan: CallPlan) -> dict[str, int]:
        client = bridge.create_client(
            service=ProbeService,
            endpoint=plan.endpoint,
            transport=plan.transport,
            first_lease=timedelta(seconds=plan.first_lease),
            max_calls_in_flight=plan.max_calls_in_flight,
        )
        calls: list[bridge.OperationHandle[Reply]] = [
            await client.start_operation(
                ProbeService.probe,
                ask,
                schedule_to_close_timeout=timedelta(seconds=plan.deadline),
                cancellation_type=workflow.NexusOperationCancellationType(plan.cancellation),
            )
            for ask in asks
        ]
        endings = [asyncio.create_task(_ending(each)) for each in calls]
        with contextlib.suppress(asyncio.CancelledError):
            # A canceled workflow still waits until each call has ended.
            await asyncio.gather(*endings)
        return dict(Counter(each.result() for each in endings))


async def _ending(call: "bridge.OperationHandle[Reply]") -> str:
    try:
        await call
    except NexusOperationError as error:
        cause = error.cause
        return cause.type.name if isinstance(cause, nexusrpc.HandlerError) else type(cause).__name__
    return "result"


@workflow.defn
class ParentOfCaller:
    """Runs a calling workflow as a child with a timeout."""

    @workflow.run
    async def run(self, ask: Ask, plan: CallPlan, timeout_s: float) -> Reply:
        return await workflow.execute_child_workflow(
            CallingWorkflow.run, args=[ask, plan], run_timeout=timedelta(seconds=timeout_s)
        )


@workflow.defn
class EndlessCaller:
    """Waits for the longest duration."""

    @workflow.run
    async def run(self, ask: Ask, plan: CallPlan) -> Reply:
        client = bridge.create_client(
            service=ProbeService,
            endpoint=plan.endpoint,
            transport=plan.transport,
            first_lease=timedelta.max,
            renewals=bridge.Renewals(initial=timedelta.max, maximum=timedelta.max, coefficient=1000),
        )
        reply: Reply = await client.execute_operation(
            ProbeService.probe,
            ask,
            # The SDK's protobuf duration is limited to 10 000 years.
            schedule_to_close_timeout=timedelta(days=9_000 * 365) if plan.transport == "nexus" else timedelta.max,
        )
        return reply


@workflow.defn
class HastyCaller:
    """Cancels a call in the workflow task that makes it."""

    @workflow.run
    async def run(self, ask: Ask) -> str:
        client = bridge.create_client(service=ProbeService, endpoint="payments")
        call: bridge.OperationHandle[Reply] = await client.start_operation(ProbeService.probe, ask)
        assert call.cancel()
        try:
            await call
        except NexusOperationError as error:
            return type(error.cause).__name__
        return "result"


@workflow.defn
class LeavingCaller:
    """Continues as new while it waits, and calls again in its second run."""

    def __init__(self) -> None:
        self._leaves = False

    @workflow.signal
    def leave(self) -> None:
        self._leaves = True

    @workflow.run
    async def run(self, ask: Ask, is_second: bool) -> Reply:
        client = bridge.create_client(service=ProbeService, endpoint="payments", first_lease=timedelta(seconds=600))
        call: bridge.OperationHandle[Reply] = await client.start_operation(ProbeService.probe, ask)
        if not is_second:
            await workflow.wait_condition(lambda: self._leaves)
            workflow.continue_as_new(args=[ask, True])
        return await call


@workflow.defn
class NothingCaller:
    @workflow.run
    async def run(self) -> str:
        client = bridge.create_client(service=ProbeService, endpoint="payments")
        handle: bridge.OperationHandle[Any] = await client.start_operation(ProbeService.nothing, None)
        assert handle.operation_token is None
        return repr(await handle)


@workflow.defn
class ServiceCaller:
    @workflow.run
    async def run(self, operation: str, ask: Ask, headers: dict[str, str]) -> Reply:
        service, _, name = operation.partition("/")
        client: bridge.OperationClient[Any] = bridge.create_client(service=service, endpoint="payments")
        reply: Reply = await client.execute_operation(name, ask, output_type=Reply, headers=headers)
        return reply


TARGETS = [
    ProbeWorkflow,
    SharedWorkflow,
    MindedWorkflow,
    NothingWorkflow,
    FlakyWorkflow,
    StrictWorkflow,
    BreakingWorkflow,
]
CALLERS = [
    CallingWorkflow,
    ManyCalls,
    ParentOfCaller,
    EndlessCaller,
    HastyCaller,
    LeavingCaller,
    NothingCaller,
    ServiceCaller,
]
