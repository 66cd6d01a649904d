"""The same workflow ends the same way over the bridge and over native Nexus on the same server."""

import asyncio
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError
from temporalio.exceptions import FailureError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.worker import Interceptor
from temporalio.workflow import NexusOperationCancellationType as CancellationType

from bridge.workflow.call import Transport
from scripts.environment import temporal_cli
from scripts.environment.server import Server, running_server
from tests.support.callers import CallingWorkflow
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.targets import Ask
from tests.support.team_interceptors import MapsErrors, RetriesInside, SetsRetries, SetsTimeouts, TimesOut, WrapsHandles
from tests.support.world import World, running_world

TEAM: list[type[Interceptor]] = [MapsErrors, RetriesInside, TimesOut, SetsRetries, SetsTimeouts, WrapsHandles]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workflow with one call, and the words for how both end."""

    ends: str
    """The status of the workflow, or the chain of its failure's causes."""
    target: str | None = None
    """The status of the target; None for a call that its timeout may end before the target has started."""
    behaviour: str = "wait"
    says: str | None = None
    """A signal for the target, as soon as it runs."""
    cancels: CancellationType | None = None
    """Cancel the call with this type, as soon as the workflow knows that the operation runs."""
    plan: dict[str, Any] = field(default_factory=dict)
    workflow: dict[str, Any] = field(default_factory=dict)


SECONDS = timedelta(seconds=1)
CANCELED = "CancelledError"

CASES = {
    "run timeout": Case(ends="TIMED_OUT", workflow={"run_timeout": 3 * SECONDS}),
    "execution timeout": Case(ends="TIMED_OUT", workflow={"execution_timeout": 3 * SECONDS}),
    "task timeout": Case(ends="in time", target="COMPLETED", says="in time", workflow={"task_timeout": 30 * SECONDS}),
    "run timeout beyond the outcome": Case(
        ends="in time", target="COMPLETED", says="in time", workflow={"run_timeout": 60 * SECONDS}
    ),
    "schedule to close": Case(ends="NexusOperationError, TimeoutError SCHEDULE_TO_CLOSE", plan={"deadline": 3}),
    "declined": Case(
        ends="NexusOperationError, ApplicationError Outer, ApplicationError Inner", target="FAILED", says="fail"
    ),
    "wait completed": Case(
        ends=CANCELED, target="CANCELED", behaviour="cleanup", cancels=CancellationType.WAIT_COMPLETED
    ),
    "wait completed, and the operation goes on": Case(
        ends="went on all the same",
        target="COMPLETED",
        behaviour="swallow cancel",
        cancels=CancellationType.WAIT_COMPLETED,
    ),
    "wait requested": Case(
        ends=CANCELED, target="CANCELED", behaviour="cleanup", cancels=CancellationType.WAIT_REQUESTED
    ),
    "try cancel": Case(ends=CANCELED, target="CANCELED", behaviour="cleanup", cancels=CancellationType.TRY_CANCEL),
    "abandon": Case(ends=CANCELED, target="RUNNING", behaviour="cleanup", cancels=CancellationType.ABANDON),
}

NEWER_CASES = {
    "schedule to start": Case(
        ends="NexusOperationError, TimeoutError SCHEDULE_TO_START", plan={"schedule_to_start": 3}
    ),
    "start to close": Case(
        ends="NexusOperationError, TimeoutError START_TO_CLOSE", target="RUNNING", plan={"start_to_close": 3}
    ),
}
"""Timeouts that native Nexus knows on the newest server only."""


async def ending(world: World, case: Case, transport: Transport) -> tuple[str, str | None]:
    """How the workflow and the target of *case* end over *transport*."""
    ask = Ask(world.key(), case.behaviour)
    # After a cancel the workflow must stay open until the cancel has been sent. It returns the name of the cause.
    more = {"cancellation": int(case.cancels), "catch": True} if case.cancels is not None else {}
    plan = world.plan(transport, first_lease=2, renewal=2, **more, **case.plan)
    call = await world.call(ask, plan, **case.workflow)
    if case.target is None:
        return await _how(call), None
    target = await world.until_started(ask)
    if case.says is not None:
        await target.signal("say", case.says)
    if case.cancels is not None:
        await assert_eventually(partial(_knows_that_it_runs, call, transport))
        await call.signal(CallingWorkflow.cancel_call)
    how = await _how(call)

    async def status() -> None:
        described = await target.describe()
        assert described.status is not None
        assert described.status.name == case.target

    await assert_eventually(status)
    return how, case.target


async def _knows_that_it_runs(call: Any, transport: Transport) -> None:
    described = (await call.describe()).raw_description
    if transport == "nexus":
        assert described.pending_nexus_operations[0].operation_token
    else:
        assert described.pending_activities[0].heartbeat_details.payloads


async def _how(call: Any) -> str:
    try:
        return str((await call.result()).text)
    except WorkflowFailureError as error:
        described = await call.describe()
        if described.status is WorkflowExecutionStatus.FAILED:
            return ", ".join(_chain(error.cause))
        return str(described.status.name)


def _chain(error: BaseException | None) -> list[str]:
    if not isinstance(error, FailureError):
        return []
    detail = getattr(error, "type", None)
    if isinstance(error, TemporalTimeoutError):
        detail = error.type.name if error.type is not None else None
    return [" ".join(filter(None, (type(error).__name__, detail))), *_chain(error.cause)]


async def assert_equal_endings(world: World, cases: dict[str, Case]) -> None:
    await world.create_nexus_endpoint()
    both: tuple[Transport, ...] = ("callback", "nexus")
    found = await asyncio.gather(*(ending(world, case, each) for case in cases.values() for each in both))
    named = dict(zip([(name, each) for name in cases for each in both], found, strict=True))
    assert named == {(name, each): (case.ends, case.target) for name, case in cases.items() for each in both}


def native(world: World) -> None:
    world.handler_options = {"nexus": True}


@pytest.mark.part("native nexus", short=True)
@pytest.mark.parametrize("kinds", [[], TEAM, TEAM[::-1]], ids=["plain", "team interceptors", "reversed"])
async def test_a_call_ends_as_over_native_nexus(server: Server, kinds: list[type[Interceptor]]) -> None:
    """Three timeouts of the workflow, the call's deadline, a failure, and four cancellation types."""

    def prepare(world: World) -> None:
        native(world)
        world.caller_worker_options = {"interceptors": [kind() for kind in kinds]}

    async with running_world(server, prepare=prepare) as world:
        await assert_equal_endings(world, CASES)


@pytest.mark.part("native nexus")
async def test_the_timeouts_of_start_and_operation_end_a_call_as_over_native_nexus() -> None:
    """Native Nexus has these two timeouts on newer servers."""
    async with (
        running_server(namespaces=[CALLER, HANDLER], choice=temporal_cli.NEWEST) as newest,
        running_world(newest, prepare=native) as world,
    ):
        cases = {name: case for name, case in NEWER_CASES.items() if case.target is not None}
        await assert_equal_endings(world, cases)
        await world.service.stop()
        await world.stop_worker("handler")
        [case] = [case for case in NEWER_CASES.values() if case.target is None]
        assert await ending(world, case, "nexus") == (case.ends, None)
        # The bridge also names the reason.
        assert await ending(world, case, "callback") == (
            f"{case.ends}, ApplicationError bridge.HandlerNotReached",
            None,
        )
