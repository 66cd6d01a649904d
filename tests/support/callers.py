"""Workflows that call the targets of the tests."""

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import nexusrpc
from temporalio import workflow
from temporalio.exceptions import NexusOperationError

import bridge
from bridge.workflow.call import MAX_INPUT_BYTES, Transport
from bridge.workflow.client import MAX_CALLS_IN_FLIGHT
from tests.support.targets import Ask, ProbeService, Reply


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
    details: str = ""
    """What the workflow sets as its current details."""
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
    async def cancel_call(self) -> None:
        await workflow.wait_condition(lambda: self._call is not None)
        assert self._call is not None
        self._call.cancel()

    @workflow.query
    def reported(self) -> str:
        return self._reported

    @workflow.run
    async def run(self, ask: Ask, plan: CallPlan) -> Reply:
        workflow.set_current_details(plan.details)
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
        endings = [asyncio.create_task(_ending(client, ask, plan)) for ask in asks]
        with contextlib.suppress(asyncio.CancelledError):
            # A canceled workflow still waits until each call has ended.
            await asyncio.gather(*endings)
        return dict(Counter(each.result() for each in endings))


async def _ending(client: bridge.OperationClient, ask: Ask, plan: CallPlan) -> str:
    try:
        await client.execute_operation(
            ProbeService.probe,
            ask,
            schedule_to_close_timeout=timedelta(seconds=plan.deadline),
            cancellation_type=workflow.NexusOperationCancellationType(plan.cancellation),
        )
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
    """Cancels a call, or the task that awaits it, in the workflow task that makes it, or is canceled before."""

    @workflow.run
    async def run(self, ask: Ask, canceled: str) -> str:
        client = bridge.create_client(service=ProbeService, endpoint="payments")
        call: Any
        if canceled in {"call", "sleep"}:
            call = await client.start_operation(ProbeService.probe, ask)
            if canceled == "sleep":
                with contextlib.suppress(asyncio.CancelledError):
                    await workflow.sleep(3600)
            assert call.cancel()
        else:
            call = client.execute_operation(ProbeService.probe, ask)
        if canceled == "task":
            call = asyncio.create_task(call)
            await asyncio.sleep(0)
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
        client: bridge.OperationClient = bridge.create_client(service=service, endpoint="payments")
        reply: Reply = await client.execute_operation(name, ask, output_type=Reply, headers=headers)
        return reply


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
