"""A contract, and targets that behave as the test's input requests."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import nexusrpc
from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue, RetryPolicy, VersioningBehavior
from temporalio.exceptions import ApplicationError

import bridge
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


class ListeningWorkflow:
    """Keeps what a signal says to it."""

    def __init__(self) -> None:
        self._said: list[str] = []

    @workflow.signal
    def say(self, text: str) -> None:
        self._said.append(text)


@workflow.defn
class SuccessorWorkflow(ListeningWorkflow):
    """Goes on in the place of a target, and is no target."""

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: bool(self._said))
        return Reply(self._said[0])


@bridge.emits_callback(service=ProbeService, operation=ProbeService.probe, workflow_id=workflow_id, check=check)
@workflow.defn
class ProbeWorkflow(ListeningWorkflow):
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
            case "pass its memo to a child":
                child = Ask(key=f"{ask.key}-child", text="of the child")
                memo = dict(workflow.memo())
                await workflow.execute_child_workflow(ProbeWorkflow.run, child, id=workflow_id(child), memo=memo)
                return Reply("of the parent")
            case "continue on signal":
                await workflow.wait_condition(lambda: bool(self._said))
                behaviour = "wait" if self._said[0] == "and wait" else "return"
                memo = {"mine": "kept"} if ask.text == "own memo" else None
                workflow.continue_as_new(Ask(key=ask.key, behaviour=behaviour, text="second run"), memo=memo)
            case "continue as another":
                workflow.continue_as_new(ask, workflow=SuccessorWorkflow.run)
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
class SharedWorkflow(ListeningWorkflow):
    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: bool(self._said))
        return Reply(self._said[0])


@bridge.emits_callback(
    service=ProbeService,
    operation=ProbeService.minded,
    workflow_id=lambda ask: f"minded-{ask.key}",
    attach_across_callers=True,
    caller_close_policy="request_cancel",
)
@workflow.defn
class MindedWorkflow(ListeningWorkflow):
    """Is canceled when no caller waits any more, and reports its progress."""

    @workflow.signal
    def say(self, text: str) -> None:
        super().say(text)
        unreadable = RawValue(Payload(metadata={"encoding": b"made/up"}, data=b"x"))
        bridge.report_progress(unreadable if text == "unreadable" else {"said": text})

    @workflow.run
    async def run(self, ask: Ask) -> Reply:
        await workflow.wait_condition(lambda: not {"done", "continue", "fail"}.isdisjoint(self._said))
        if "fail" in self._said:
            message = "an attempt failed"
            raise ApplicationError(message)
        if "continue" in self._said:
            workflow.continue_as_new(ask)
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
    service=ProbeService,
    operation=ProbeService.strict,
    workflow_id=workflow_id,
    on_input_mismatch="refuse",
    attach_across_callers=True,
)
@workflow.defn
class StrictWorkflow(ListeningWorkflow):
    """Accepts one input for one id."""

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


TARGETS = [
    ProbeWorkflow,
    SharedWorkflow,
    MindedWorkflow,
    NothingWorkflow,
    FlakyWorkflow,
    StrictWorkflow,
    BreakingWorkflow,
]
