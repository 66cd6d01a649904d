"""A contract whose target does what the test asks for, and a workflow that calls it."""

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import nexusrpc
from temporalio import workflow
from temporalio.exceptions import ApplicationError, NexusOperationError

import bridge


@dataclass(frozen=True)
class Ask:
    """What the target should do."""

    key: str
    """Makes the workflow id."""
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
    hidden: nexusrpc.Operation[Ask, Reply]


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
            case "swallow cancel":
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    return Reply("went on all the same")
            case "self-canceled failure":
                # Fails with a cancellation that nobody asked for: the workflow ends as failed.
                raise asyncio.CancelledError
            case "continue once":
                memo = {"mine": "kept"} if ask.text == "own memo" else None
                workflow.continue_as_new(Ask(key=ask.key, behaviour="return", text="second run"), memo=memo)
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


@bridge.emits_callback(service=ProbeService, operation=ProbeService.nothing, workflow_id=lambda _: "probe-nothing")
@workflow.defn
class NothingWorkflow:
    @workflow.run
    async def run(self) -> None:
        """Gives nothing."""


@dataclass(frozen=True)
class CallPlan:
    """How the calling workflow calls."""

    first_lease: float = 30.0
    renewal: float = 60.0
    deadline: float = 600.0
    endpoint: str = "payments"
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds to go on after the call, so that the run stays open."""


@workflow.defn
class CallingWorkflow:
    @workflow.run
    async def run(self, ask: Ask, plan: CallPlan) -> Reply:
        client = bridge.create_client(
            service=ProbeService,
            endpoint=plan.endpoint,
            first_lease=timedelta(seconds=plan.first_lease),
            renewals=bridge.Renewals(initial=timedelta(seconds=plan.renewal), maximum=timedelta(seconds=3600)),
        )
        try:
            reply = await client.execute_operation(
                ProbeService.probe,
                ask,
                schedule_to_close_timeout=timedelta(seconds=plan.deadline),
                headers=plan.headers,
            )
        except NexusOperationError:
            if plan.after:
                await workflow.wait_condition(lambda: False, timeout=plan.after)
            raise
        if plan.after:
            await workflow.sleep(plan.after)
        return reply


@workflow.defn
class NothingCaller:
    @workflow.run
    async def run(self) -> str:
        client = bridge.create_client(service=ProbeService, endpoint="payments")
        handle: bridge.OperationHandle[Any] = await client.start_operation(ProbeService.nothing, None)
        assert handle.operation_token is None
        return repr(await handle)


TARGETS = [ProbeWorkflow, NothingWorkflow]
CALLERS = [CallingWorkflow, NothingCaller]
