"""The caller catches a target's failure as over native Nexus: the same chain of errors, compared case by case.

Each case runs the same target behind five handlers and callers at once. The reference is the SDK on both sides, without
code of ours. Our targets over native Nexus and the bridge's transports are compared with it. A poll is answered like a
held start, a second later; therefore only the fewer cases of the encrypted world include it.
"""

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import pytest_asyncio
from google.protobuf.json_format import MessageToJson
from temporalio.api.nexus.v1 import EndpointSpec, EndpointTarget
from temporalio.api.operatorservice.v1 import CreateNexusEndpointRequest
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import DataConverter, DefaultFailureConverterWithEncodedAttributes
from temporalio.exceptions import ApplicationError
from temporalio.exceptions import TimeoutError as TemporalTimeoutError
from temporalio.service import RPCError
from temporalio.worker import Worker

from caller import CallerPlugin
from caller.waiting.waiting_activity import HANDLER_NOT_REACHED
from handler import HandlerPlugin
from scripts.environment.server import Server
from tests.support import failing
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler
from tests.support.failing import Answers, BoundedWorkflow, CatchingWorkflow, Trial, Trials, Way
from tests.support.helpers import HANDLER, assert_eventually
from tests.support.targets import Ask
from tests.support.world import World, events, running_world

By = Literal["sdk", "nexus", "callback", "wait", "poll"]
Error = dict[str, str]
Act = Literal["", "cancel the call", "cancel the target", "terminate the target"]

BRIDGE: tuple[By, ...] = ("callback", "wait", "poll")


def _prepare(world: World) -> None:
    world.handler_options = {"nexus": True}
    world.peer_options = {"operations": ["TrialService/*", "AnswerService/*"]}
    world.endpoint_options = {"poll_interval_s": 0.2, "wait_s": 1}
    world.targets = [*failing.TARGETS]
    world.services = [Answers()]


@contextlib.asynccontextmanager
async def _trying(server: Server, converter: DataConverter) -> AsyncIterator[World]:
    """A world whose targets are served by our handler and by a worker with the SDK only."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(
            running_world(server, without=("caller", "handler"), converters=(converter, converter), prepare=_prepare)
        )
        await world.create_nexus_endpoint()
        target = EndpointTarget(worker=EndpointTarget.Worker(namespace=HANDLER, task_queue=f"sdk-{world.id}"))
        spec = EndpointSpec(name=f"sdk-{world.id}", target=target)
        await world.caller_client.operator_service.create_nexus_endpoint(CreateNexusEndpointRequest(spec=spec))
        of_targets: dict[str, Any] = {"workflows": failing.TARGETS, "activities": [failing.fail]}
        # The plugin adds its name to the identity, which is part of an activity's error.
        of_targets["identity"] = "payments bridge.HandlerPlugin"
        for worker in (
            Worker(
                world.handler_client,
                task_queue=world.payment_queue,
                nexus_service_handlers=[Answers()],
                plugins=[HandlerPlugin(world.handler_settings)],
                **of_targets,
            ),
            Worker(
                world.handler_client,
                task_queue=target.worker.task_queue,
                nexus_service_handlers=[Trials(), Answers()],
                **of_targets,
            ),
            Worker(
                world.caller_client,
                task_queue=world.order_queue,
                workflows=[CatchingWorkflow],
                plugins=[CallerPlugin(world.caller_settings)],
            ),
        ):
            await stack.enter_async_context(worker)
        yield world


# All cases share one world, because no case leaves a state that another case could see.
@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with _trying(server, DataConverter.default) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def encrypted_world(server: Server) -> AsyncIterator[World]:
    converter = DataConverter(
        payload_codec=Scrambler(), failure_converter_class=DefaultFailureConverterWithEncodedAttributes
    )
    async with _trying(server, converter) as made:
        yield made


@dataclass(frozen=True)
class Case:
    """One failure to provoke."""

    behaviour: str
    operation: str = "fail"
    act: Act = ""
    """The act of the test when the target runs."""
    deadline: float = 30.0
    lease: float = 30.0
    differs: Callable[[list[Error]], list[Error]] = list
    """Turns the errors of native Nexus into those of the bridge, for known differences."""

    def __str__(self) -> str:
        timed = self.deadline < Case.deadline and "until the deadline"
        own = self.operation == "bounded" and "until its own timeout"
        return ", ".join(each for each in (self.behaviour, self.act, timed, own) if each)


def reported_once(native: list[Error]) -> list[Error]:
    """Servers before 1.31 report a handler's error twice, first in their own text. The bridge reports it once.

    The handler's stack stays with the handler: a caller with a wrong or forbidden request must not see its code.
    """
    operation, error, *causes = native
    assert error["class"] == "HandlerError"
    if causes and causes[0]["class"] == "HandlerError":
        wrapper, error, *causes = error, *causes
        kind = re.sub(r".*'(.*)'>", r"\1", error["type"])
        assert wrapper["text"] in {f"handler error ({kind}): {text}" for text in (error["text"], "Encoded failure")}
    return [operation, error | {"has_stack": "False"}, *causes]


def in_our_words(text: str) -> Callable[[list[Error]], list[Error]]:
    """As `reported_once`, with *text* in place of the SDK's text about its own parts."""

    def differ(native: list[Error]) -> list[Error]:
        operation, error, *causes = reported_once(native)
        return [operation, error | {"text": text, "message": repr(text)}, *causes]

    return differ


def of_its_kind(native: list[Error]) -> list[Error]:
    """The server leaves out the kind of the timeout; the bridge names the timeout of the operation's run."""
    operation, timeout = native
    assert timeout["type"] == "None"
    return [operation, timeout | {"type": "<TimeoutType.START_TO_CLOSE: 1>"}]


CASES = [
    Case("application error with everything"),
    Case("application error with nothing"),
    Case("application error without words"),
    Case("unrequested cancellation"),
    Case("timeout of its own"),
    Case("timeout with details"),
    Case("termination as an error"),
    Case("server error"),
    Case("handler error in the chain"),
    Case("failure from another language"),
    Case("activity fails"),
    Case("activity fails for good"),
    Case("activity runs too long"),
    Case("activity falls silent"),
    Case("activity is out of time"),
    Case("activity is never taken"),
    Case("child fails"),
    Case("child's activity fails"),
    Case("child is out of time"),
    Case("child is canceled"),
    # The close event of a canceled target keeps no message of the target. Therefore no transport delivers one.
    Case("waits", act="cancel the call"),
    Case("waits", act="cancel the target"),
    Case("waits for an activity", act="cancel the call"),
    Case("waits for an activity", act="cancel the target"),
    Case("answers a cancel in its own words", act="cancel the call"),
    Case("answers a cancel with another failure", act="cancel the call"),
    Case("waits", act="terminate the target", lease=1.0),
    Case("waits", operation="bounded", lease=1.0, differs=of_its_kind),
    Case("waits", deadline=2.0),
    # The request itself failed, without an outcome.
    Case("refused", differs=reported_once),
    Case("returns", operation="unserved", differs=in_our_words("no such operation")),
    # Operations that need no workflow.
    Case("operation fails", operation="answer"),
    Case("operation fails for a reason", operation="answer"),
    Case("operation is canceled", operation="answer"),
    Case("operation is canceled for a reason", operation="answer"),
    Case("handler refuses", operation="answer", differs=reported_once),
    Case("handler refuses for a reason", operation="answer", differs=reported_once),
    Case("handler gives up", operation="answer", differs=reported_once),
    Case("application error for good", operation="answer", differs=in_our_words("rates were withdrawn")),
]

SECRET_CASES = [
    case
    for case in CASES
    if case.behaviour
    in {
        *("application error with everything", "failure from another language", "activity fails", "child fails"),
        *("operation fails for a reason", "handler refuses for a reason", "answers a cancel in its own words"),
    }
]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_the_caller_catches_what_it_would_catch_over_native_nexus(world: World, case: Case) -> None:
    """Class, message, type, details, retryability and all causes are equal; event ids are the target's."""
    await _catches_the_same(world, case, ("callback", "wait"))


@pytest.mark.parametrize("case", SECRET_CASES, ids=str)
async def test_it_catches_the_same_where_failures_are_encrypted(encrypted_world: World, case: Case) -> None:
    """The failure converter encrypts messages and stacks too; each side's codec decodes only its own payloads."""
    await _catches_the_same(encrypted_world, case, BRIDGE)


@pytest.mark.parametrize("by", BRIDGE)
async def test_no_history_shows_what_is_encrypted(encrypted_world: World, by: By) -> None:
    """No history of either side and no detail of the pending activity shows the plain text."""
    trial, handle = await _call(encrypted_world, Case("application error with everything"), by)
    assert (await handle.result())[1]["text"] == "Declined: declined"
    target = encrypted_world.handler_client.get_workflow_handle(failing.workflow_id(trial))
    with contextlib.suppress(WorkflowFailureError):
        await target.result()
    for each in (handle, target):
        history = "".join(MessageToJson(event) for event in (await each.fetch_history()).events)
        assert "Encoded failure" in history
        assert "declined" not in history
        assert "the inner reason" not in history


async def test_a_call_out_of_time_names_what_kept_it_from_the_handler(server: Server) -> None:
    """Native Nexus shows the last error only while the operation is pending; the bridge keeps it as the cause."""
    async with running_world(server, without=("service", "handler")) as world:
        handle = await world.call(Ask(world.key()), CallPlan(deadline=3.0))
        with pytest.raises(WorkflowFailureError) as caught:
            await handle.result()
    timeout = caught.value.cause.__cause__
    assert isinstance(timeout, TemporalTimeoutError)
    assert isinstance(timeout.cause, ApplicationError)
    assert timeout.cause.type == HANDLER_NOT_REACHED


async def _catches_the_same(world: World, case: Case, transports: tuple[By, ...]) -> None:
    ways: tuple[By, ...] = ("sdk", "nexus", *transports)
    caught = dict(zip(ways, await asyncio.gather(*(_catch(world, case, by) for by in ways)), strict=True))
    native = caught.pop("sdk")
    assert len(native) > 1, "nothing was caught"
    assert caught == {"nexus": native} | dict.fromkeys(transports, case.differs(native))


async def _catch(world: World, case: Case, by: By) -> list[Error]:
    trial, handle = await _call(world, case, by)
    if case.act:
        target = world.handler_client.get_workflow_handle(failing.workflow_id(trial))
        await assert_eventually(partial(_runs, target, case))
        match case.act:
            case "cancel the call":
                await handle.signal(CatchingWorkflow.cancel_call)
            case "cancel the target":
                await target.cancel()
            case "terminate the target":
                await target.terminate(reason="out of paper")
    return [_comparable(error, trial) for error in await handle.result()]


async def _call(
    world: World, case: Case, by: By
) -> tuple[Trial, WorkflowHandle[CatchingWorkflow, list[dict[str, str]]]]:
    trial = Trial(key=f"{by}-{uuid.uuid4().hex}", behaviour=case.behaviour)
    endpoints = {"sdk": f"sdk-{world.id}", "nexus": world.nexus_endpoint}
    way = Way(
        transport=None if by == "sdk" else by,
        endpoint=endpoints.get(by, "payments"),
        operation=case.operation,
        deadline=case.deadline,
        lease=case.lease,
        cancels=case.act == "cancel the call",
    )
    if case.operation == "bounded" and by != "sdk":
        # The bridge sets no other timeout on a target than the caller's; this target was started by hand.
        await world.handler_client.start_workflow(
            BoundedWorkflow.run,
            trial,
            id=failing.workflow_id(trial),
            task_queue=world.payment_queue,
            execution_timeout=failing.OWN_TIMEOUT,
        )
    return trial, await world.caller_client.start_workflow(
        CatchingWorkflow.run, args=[trial, way], id=f"catching-{trial.key}", task_queue=world.order_queue
    )


async def _runs(target: WorkflowHandle[Any, Any], case: Case) -> None:
    try:
        seen = await events(target)
    except RPCError as error:
        raise AssertionError from error
    assert ("ACTIVITY_TASK_SCHEDULED" if "activity" in case.behaviour else "WORKFLOW_TASK_COMPLETED") in seen


def _comparable(error: Error, trial: Trial) -> Error:
    """*error* without the values that differ from call to call: ids and workers' identities."""

    def neutral(text: str) -> str:
        text = re.sub(r"\b\d+@[\w.-]+", "WORKER", text.replace(trial.key, "KEY"))
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "RUN", text)

    return {name: neutral(text) for name, text in error.items()}
