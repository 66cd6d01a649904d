"""Operations without a workflow: the team's own nexusrpc service handlers, behind the handler service's route."""

import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import nexusrpc
import pytest
import pytest_asyncio
from nexusrpc import HandlerError, HandlerErrorType
from nexusrpc.handler import StartOperationContext, service_handler, sync_operation
from temporalio import nexus, workflow
from temporalio.api.workflowservice.v1 import DescribeNamespaceRequest
from temporalio.client import WorkflowFailureError, WorkflowHandle
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, CancelledError, NexusOperationError
from temporalio.worker import Worker

import bridge
from bridge.protocol.payload import MAX_PAYLOAD_BYTES
from bridge.runtime.settings import SettingsError
from bridge.security.signatures import MessageSigner
from bridge.workflow.call import Transport
from bridge.workflow.targets import Targets
from caller import CallerPlugin
from handler.delivery.operation_token import OperationToken
from handler.user_code.sync_operations import SyncOperations, service_handlers_in
from scripts.environment.server import Server
from tests.support import services
from tests.support.callers import CallingWorkflow, ServiceCaller
from tests.support.codec import Scrambler
from tests.support.helpers import CALLER, HANDLER, assert_eventually
from tests.support.peer import Answered, Message, Spoil, send, start
from tests.support.services import Probes, Quotes, QuoteService
from tests.support.targets import TARGETS, Ask, ProbeWorkflow, Reply
from tests.support.world import EVENTS_OF_A_CALL, World, clock, events, running_world, with_codec

OPERATIONS = ["QuoteService/quote", "QuoteService/lookup"]
"""Operations with an `async def` and with a plain `def`."""


class Quoting:
    """A world with two service handlers, without a worker for targets and without a receiver."""

    def __init__(self, world: World, quotes: Quotes) -> None:
        self.world = world
        self.quotes = quotes

    async def call(self, operation: str, ask: Ask, **headers: str) -> WorkflowHandle[ServiceCaller, Reply]:
        return await self.world.caller_client.start_workflow(
            ServiceCaller.run,
            args=[operation, ask, headers],
            id=f"asking-{self.world.key()}",
            task_queue=self.world.order_queue,
        )

    async def failure(self, operation: str, ask: Ask) -> BaseException | None:
        """Return the cause inside the error that the calling workflow catches."""
        handle = await self.call(operation, ask)
        with pytest.raises(WorkflowFailureError) as raised:
            await handle.result()
        assert isinstance(raised.value.cause, NexusOperationError)
        return raised.value.cause.cause

    async def send(self, operation: str, ask: dict[str, Any] | None, *spoil: Spoil, signed: bool = True) -> Answered:
        message = start(self.world, ask or {}, request_id="r-1")
        message.url = message.url.replace("ProbeService/probe", operation)
        message.before_signing.extend(spoil)
        return await send(message, MessageSigner(self.world.keys.start) if signed else None)


@pytest_asyncio.fixture(loop_scope="session", name="quoting", params=[None, Scrambler()], ids=["plain", "scrambled"])
async def quoting_with_and_without_codec(server: Server, request: Any) -> AsyncIterator[Quoting]:
    async for each in _quoting(server, with_codec(request.param)):
        yield each


@pytest_asyncio.fixture(loop_scope="session", scope="module")
async def quiet(server: Server) -> AsyncIterator[Quoting]:
    async for each in _quoting(server, DataConverter.default, "caller"):
        yield each


async def _quoting(server: Server, converter: DataConverter, *without: str) -> AsyncIterator[Quoting]:
    quotes = Quotes()

    def prepare(world: World) -> None:
        world.services = [quotes, Probes()]

    left_out = ("handler", *without)
    async with running_world(server, without=left_out, converters=(converter, converter), prepare=prepare) as world:
        yield Quoting(world, quotes)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_operation_is_answered_with_its_result(quoting: Quoting, operation: str) -> None:
    """A call is one HTTP request and eleven events. It has no target and no callback."""
    handle = await quoting.call(operation, Ask("k", text="12.50"), tenant="north")

    assert await handle.result() == Reply("12.50")
    assert quoting.world.service.statuses == [200]
    assert quoting.world.receiver.requests == []
    assert await events(handle) == EVENTS_OF_A_CALL
    [(context, ask)] = quoting.quotes.calls
    assert ask == Ask("k", text="12.50")
    scheduled = (await handle.fetch_history()).events[4]
    assert context.request_id == scheduled.activity_task_scheduled_event_attributes.activity_id
    assert dict(context.headers) == {"tenant": "north"}
    assert (context.service, context.operation) == tuple(operation.split("/"))
    assert [handle.id in link.url for link in context.inbound_links] == [True]
    assert context.request_deadline is not None
    assert scheduled.event_time.ToDatetime(UTC) < context.request_deadline <= datetime.now(UTC) + timedelta(seconds=10)


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_failed_operation_arrives_with_its_cause_chain(quoting: Quoting, operation: str) -> None:
    """A failure is an outcome. It arrives once, and the activity is not retried."""
    outer = await quoting.failure(operation, Ask("k", "fail"))

    assert isinstance(outer, ApplicationError)
    assert (outer.message, outer.type, outer.non_retryable) == ("no such rate", "OperationError", True)
    inner = outer.cause
    assert isinstance(inner, ApplicationError)
    assert (inner.message, inner.type, list(inner.details)) == ("the inner reason", "Inner", [1])
    assert isinstance(inner.cause, ApplicationError)
    assert (inner.cause.message, inner.cause.type) == ("the innermost", "ValueError")
    assert quoting.world.service.statuses == [424]
    assert quoting.world.receiver.requests == []


async def test_a_canceled_operation_is_a_cancellation(quoting: Quoting) -> None:
    """The caller gets the cancellation that the operation raised."""
    cause = await quoting.failure("QuoteService/quote", Ask("k", "cancel"))
    assert isinstance(cause, CancelledError)
    assert cause.message == "withdrawn"


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
async def test_a_failure_whose_text_is_not_valid_unicode_arrives(quoting: Quoting, state: str) -> None:
    """The operation has failed. A repeat would run it again."""
    cause = await quoting.failure("QuoteService/quote", Ask("k", "half a character", text=state))
    assert isinstance(cause, ApplicationError | CancelledError)
    assert cause.message == "no rate for ?"
    assert quoting.world.service.statuses == [424]


async def test_a_failure_arrives_without_a_cause_that_cannot_be_converted(quoting: Quoting) -> None:
    """The operation has failed. A repeat would run it again."""
    cause = await quoting.failure("QuoteService/quote", Ask("k", "unwritable failure"))
    assert isinstance(cause, ApplicationError)
    assert (cause.message, cause.cause) == ("no such rate", None)
    assert quoting.world.service.statuses == [424]


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_a_refused_request_arrives_as_the_handler_error_it_was(quoting: Quoting, operation: str) -> None:
    """The call fails at once."""
    cause = await quoting.failure(operation, Ask("k", "refuse"))

    assert isinstance(cause, HandlerError)
    assert (cause.type, cause.message) == (HandlerErrorType.BAD_REQUEST, "the amount is negative")
    assert quoting.world.service.statuses == [400]


async def test_a_service_may_have_workflows_and_plain_operations(server: Server) -> None:
    """In one contract `probe` is a workflow and `hidden` is a plain operation."""

    def prepare(world: World) -> None:
        world.services = [Probes()]

    async with running_world(server, prepare=prepare) as world:
        assert await (await world.call(Ask(world.key(), text="a workflow"))).result() == Reply("a workflow")
        hidden = await Quoting(world, Quotes()).call("ProbeService/hidden", Ask("k", text="rate"))
        assert await hidden.result() == Reply("hidden rate")
        assert world.service.statuses == [201, 200]


@workflow.defn(sandboxed=False)
class MethodCaller:
    """Names the operation by its handler method, as a native Nexus client may."""

    @workflow.run
    async def run(self, transport: Transport, endpoint: str, ask: Ask) -> Reply:
        client = bridge.create_client(service=QuoteService, endpoint=endpoint, transport=transport)
        with pytest.raises(ValueError, match="is not a Nexus operation"):
            await client.execute_operation(len, ask)
        reply: Reply = await client.execute_operation(Quotes.quote, ask)
        return reply


@pytest.mark.parametrize("transport", ["callback", "nexus"])
async def test_a_handlers_method_may_be_called_as_the_operation(server: Server, transport: Transport) -> None:
    """Native clients accept a method too. Over both transports the result has the method's type."""

    def prepare(world: World) -> None:
        world.services = [Quotes()]
        world.worker_options = {"nexus_service_handlers": [Quotes()], "nexus_task_executor": ThreadPoolExecutor(1)}

    async with running_world(server, prepare=prepare) as world:
        await world.create_nexus_endpoint()
        endpoint, queue = world.plan(transport).endpoint, f"methods-{world.id}"
        plugins = [CallerPlugin(world.caller_settings)]
        async with Worker(world.caller_client, task_queue=queue, workflows=[MethodCaller], plugins=plugins):
            reply = await world.caller_client.execute_workflow(
                MethodCaller.run, args=[transport, endpoint, Ask("k", text="9")], id=world.key(), task_queue=queue
            )
        assert reply == Reply("9")


def _body(text: bytes) -> Spoil:
    def spoil(message: Message) -> None:
        message.body = text

    return spoil


def _header(name: str, value: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.headers[name] = value

    return spoil


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("ask", "status", "kind", "is_retryable", "says"),
    [
        pytest.param(
            {"key": 1}, 400, "BAD_REQUEST", False, "the input is not a Ask: key (TypeError)", id="another input"
        ),
        pytest.param({"behaviour": "refuse"}, 400, "BAD_REQUEST", False, "the amount is negative", id="refused"),
        pytest.param({"behaviour": "not yet"}, 500, "INTERNAL", True, "rates not loaded", id="retryable"),
        pytest.param({"behaviour": "never"}, 500, "INTERNAL", False, "rates were withdrawn", id="non-retryable"),
        pytest.param({"behaviour": "started"}, 500, "INTERNAL", False, "Workflow execution already", id="started"),
        pytest.param({"behaviour": "bug"}, 500, "INTERNAL", True, "internal error", id="bug"),
        pytest.param({"behaviour": "exit"}, 500, "INTERNAL", True, "internal error", id="exit"),
        pytest.param({"behaviour": "exhausted"}, 500, "INTERNAL", True, "internal error", id="exhausted iterator"),
        pytest.param({"behaviour": "own cancellation"}, 500, "INTERNAL", True, "internal error", id="own cancellation"),
        pytest.param({"behaviour": "own timeout"}, 500, "INTERNAL", True, "internal error", id="own timeout"),
        pytest.param({"behaviour": "unwritable"}, 500, "INTERNAL", False, "result, a object, cannot", id="unwritable"),
        pytest.param(
            {"behaviour": "unwritable refusal"}, 500, "INTERNAL", False, "rates were withdrawn", id="unwritable details"
        ),
        pytest.param({"behaviour": "coroutine"}, 500, "INTERNAL", False, "result, a coroutine, cannot", id="coroutine"),
        *(
            pytest.param({"behaviour": "temporal", "text": text}, status, kind, is_retryable, text, id=text)
            for text, status, kind, is_retryable in [
                ("INVALID_ARGUMENT", 400, "BAD_REQUEST", False),
                ("NOT_FOUND", 404, "NOT_FOUND", False),
                ("ALREADY_EXISTS", 500, "INTERNAL", False),
                ("PERMISSION_DENIED", 500, "INTERNAL", True),
                ("RESOURCE_EXHAUSTED", 429, "RESOURCE_EXHAUSTED", True),
                ("UNAVAILABLE", 503, "UNAVAILABLE", True),
                ("UNIMPLEMENTED", 501, "NOT_IMPLEMENTED", False),
                ("DEADLINE_EXCEEDED", 520, "UPSTREAM_TIMEOUT", True),
            ]
        ),
    ],
)
async def test_every_error_is_answered_by_its_kind(
    quiet: Quoting,
    caplog: pytest.LogCaptureFixture,
    operation: str,
    ask: dict[str, Any],
    status: int,
    kind: str,
    is_retryable: bool,
    says: str,
) -> None:
    """The answers equal those of Temporal's worker, but a result that cannot be converted is final."""
    answer = await quiet.send(operation, {"key": "secret", **ask})

    assert (answer.status, answer.type) == (status, kind)
    assert answer.failure["details"]["retryableOverride"] is is_retryable
    assert says in answer.message
    assert "secret" not in answer.body.decode() + caplog.text
    assert quiet.world.receiver.requests == []


@pytest.mark.parametrize(
    ("operation", "spoil", "status", "says"),
    [
        pytest.param("QuoteService/quote", _body(b"{"), 400, "the input is not a Ask", id="malformed JSON"),
        *(
            pytest.param(operation, spoil, 400, says, id=f"{says} {operation}")
            for operation in OPERATIONS
            for spoil, says in [
                (_header("Content-Type", "application/octet-stream"), "it is bytes"),
                (
                    _header("Content-Type", 'application/x-protobuf; message-type="temporal.api.common.v1.Header"'),
                    "Ask: ",
                ),
                (_body(b""), "the input is not a Ask"),
                (_body(b"null"), "the input is not a Ask"),
                (_body(b'{"key": "\\ud800"}'), "key (not valid Unicode)"),
            ]
        ),
        pytest.param("QuoteService/quote", _header("Request-Timeout", "soon"), 400, "Request-Timeout", id="timeout"),
        pytest.param("QuoteService/other", _body(b"{}"), 404, "no such operation", id="unknown operation"),
        pytest.param("OtherService/quote", _body(b"{}"), 404, "no such service", id="unknown service"),
        pytest.param("QuoteService/later", _body(b'{"key": "k"}'), 501, "must be a workflow", id="asynchronous"),
    ],
)
async def test_bad_requests_are_refused(quiet: Quoting, operation: str, spoil: Spoil, status: int, says: str) -> None:
    """The answer is a Failure with the reason."""
    calls = len(quiet.quotes.calls)
    answer = await quiet.send(operation, None, spoil)
    assert answer.status == status
    assert says in answer.message
    assert len(quiet.quotes.calls) == calls


async def test_strangers_and_altered_bodies_reach_no_operation(quiet: Quoting) -> None:
    """The checks are the same as for every start."""
    calls = len(quiet.quotes.calls)
    unsigned = await quiet.send("QuoteService/quote", {"key": "k"}, signed=False)
    assert (unsigned.status, unsigned.type) == (401, "UNAUTHENTICATED")
    message = start(quiet.world, {"key": "k"})
    message.url = message.url.replace("ProbeService/probe", "QuoteService/quote")
    message.after_signing.append(_body(b'{"key": "other"}'))
    assert (await send(message, MessageSigner(quiet.world.keys.start))).status == 401
    assert len(quiet.quotes.calls) == calls


async def test_a_caller_that_may_not_use_the_service_gets_403(server: Server) -> None:
    """A caller is authorized for single operations, as for targets."""

    def prepare(world: World) -> None:
        world.services = [Quotes()]
        peers = {
            name: peer.model_copy(update={"operations": ("ProbeService/*",)})
            for name, peer in world.handler_settings.callers.items()
        }
        world.override_handler_settings(world.handler_settings.model_copy(update={"callers": peers}))

    without = ("caller", "handler", "receiver")
    async with running_world(server, without=without, prepare=prepare) as world:
        answer = await Quoting(world, world.services[0]).send("QuoteService/quote", {"key": "k"})
        assert (answer.status, answer.type) == (403, "UNAUTHORIZED")
        assert world.services[0].calls == []


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_an_operation_ends_with_its_request(quiet: Quoting, operation: str) -> None:
    """The answer is 408 when the time is out, and the function sees the cancellation, also in a thread."""
    quiet.quotes.was_cancelled.clear()
    late = _header("Request-Timeout", "50ms")
    answer = await quiet.send(operation, {"key": "k", "behaviour": "hang"}, late)
    assert (answer.status, answer.type) == (408, "REQUEST_TIMEOUT")

    async def canceled() -> None:
        assert quiet.quotes.was_cancelled.is_set()

    await assert_eventually(canceled)


async def test_no_time_is_not_the_default_time(quiet: Quoting) -> None:
    """The function sees that its sender no longer waits."""
    quiet.quotes.calls.clear()
    await quiet.send("QuoteService/quote", {"key": "k"}, _header("Request-Timeout", "0ms"))
    [(context, _)] = quiet.quotes.calls
    assert context.request_deadline is not None
    assert context.request_deadline <= datetime.now(UTC)


async def test_no_operation_has_longer_than_two_minutes(quiet: Quoting) -> None:
    """The limit applies even if the sender would wait a year."""
    quiet.quotes.calls.clear()
    answer = await quiet.send("QuoteService/quote", {"key": "k"}, _header("Request-Timeout", "8760h"))
    assert answer.status == 200
    [(context, _)] = quiet.quotes.calls
    assert context.request_deadline is not None
    assert context.request_deadline - datetime.now(UTC) <= timedelta(minutes=2)


async def test_a_renewal_runs_no_operation(quiet: Quoting) -> None:
    """The operation was a workflow when the call was started. The callback of that workflow ends the call."""
    quiet.quotes.calls.clear()
    described = await quiet.world.handler_client.workflow_service.describe_namespace(
        DescribeNamespaceRequest(namespace=HANDLER)
    )
    token = OperationToken(described.namespace_info.id, "r-1", "quote-1").encode()
    answer = await quiet.send("QuoteService/quote", {"key": "k"}, _header("Nexus-Operation-Token", token))
    assert (answer.status, answer.is_signed) == (421, True)
    assert json.loads(answer.body)["metadata"]["bridge"] == "wrong-handler"
    assert quiet.quotes.calls == []


async def test_links_of_the_operation_reach_the_caller(quiet: Quoting) -> None:
    """Links that cannot be read are left out."""
    answer = await quiet.send("QuoteService/quote", {"key": "k", "behaviour": "link"})
    assert answer.status == 200
    assert answer.headers["Nexus-Link"] == '<https://rates.example/7>; type="rates.Rate"'
    assert answer.headers["Nexus-Operation-State"] == "succeeded"
    assert "Nexus-Link" not in (await quiet.send("QuoteService/quote", {"key": "k"})).headers


async def test_none_crosses_as_no_content(quiet: Quoting) -> None:
    """This holds for the input and the result."""

    def bare(message: Message) -> None:
        message.body = b""
        del message.headers["Content-Type"]

    answer = await quiet.send("QuoteService/nothing", None, bare)
    assert (answer.status, answer.body) == (200, b"")
    assert "Content-Type" not in answer.headers


async def test_a_result_over_the_limit_is_a_failure_that_says_so(quiet: Quoting) -> None:
    """The same limit holds for a target's result."""
    answer = await quiet.send("QuoteService/lookup", {"key": "k", "size": MAX_PAYLOAD_BYTES})
    assert answer.status == 424
    assert "over the limit" in json.loads(answer.body)["message"]


def _operations(*handlers: Any, targets: Sequence[type]) -> SyncOperations:
    return SyncOperations(
        handlers,
        targets=Targets(targets),
        converters={CALLER: DataConverter.default},
        threads={CALLER: ThreadPoolExecutor(1)},
        clock=clock,
    )


@service_handler(name="ProbeService")
class _ProbesAgain:
    @sync_operation
    def probe(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        return Reply(ask.text)


@service_handler(name="NativeService")
class _Native:
    @nexus.workflow_run_operation
    async def probe(self, ctx: nexus.WorkflowRunOperationContext, ask: Ask) -> nexus.WorkflowHandle[Reply]:
        return await ctx.start_workflow(ProbeWorkflow.run, ask, id=ask.key)


@pytest.mark.parametrize(
    ("handlers", "says"),
    [
        pytest.param([_ProbesAgain()], "ProbeService/probe is claimed by ProbeWorkflow and a service", id="a target's"),
        pytest.param([Quotes(), Quotes()], "registered.*; put all its operations in one class", id="a service twice"),
        pytest.param([Quotes], "got a class", id="a class"),
        pytest.param(
            [_Native()], "NativeService/probe starts a workflow.*emits_callback", id="one of Temporal's worker"
        ),
        pytest.param([object()], "service_handler", id="undecorated"),
        pytest.param([object.__new__(QuoteService)], "instance of the contract", id="a contract"),
    ],
)
def test_claims_that_contradict_each_other_are_refused_at_once(handlers: list[Any], says: str) -> None:
    """The error comes before an operation is served."""
    with pytest.raises(SettingsError, match=says):
        _operations(*handlers, targets=TARGETS)


def test_service_handlers_of_a_module_are_found_once() -> None:
    """Their names in the module do not matter. Classes and contracts do not count."""
    assert service_handlers_in(services) == [services.quotes]
    assert ("QuoteService", "lookup") in _operations(services.quotes, targets=[ProbeWorkflow]).names
    assert nexusrpc.get_service_definition(CallingWorkflow) is None
