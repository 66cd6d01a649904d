"""Service handlers whose operations behave as the test's input requests."""

import asyncio
import threading

import nexusrpc
from nexusrpc import HandlerError, HandlerErrorType, Link, OperationError, OperationErrorState
from nexusrpc.handler import (
    CancelOperationContext,
    OperationHandler,
    StartOperationContext,
    StartOperationResultAsync,
    operation_handler,
    service_handler,
    sync_operation,
)
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from tests.support.targets import Ask, Reply


@nexusrpc.service
class QuoteService:
    quote: nexusrpc.Operation[Ask, Reply]
    lookup: nexusrpc.Operation[Ask, Reply]
    nothing: nexusrpc.Operation[None, None]
    later: nexusrpc.Operation[Ask, Reply]


class _Later(OperationHandler[Ask, Reply]):
    async def start(self, ctx: StartOperationContext, input: Ask) -> StartOperationResultAsync:  # noqa: A002 - theirs
        return StartOperationResultAsync("token")

    async def cancel(self, ctx: CancelOperationContext, token: str) -> None:
        raise NotImplementedError


@service_handler(service=QuoteService)
class Quotes:
    """A plain nexusrpc handler without the bridge."""

    def __init__(self) -> None:
        self.calls: list[tuple[StartOperationContext, Ask]] = []
        self.was_cancelled = threading.Event()

    @sync_operation
    async def quote(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        if ask.behaviour == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.was_cancelled.set()
        return self._behave(ctx, ask)

    @sync_operation
    def lookup(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        if ask.behaviour == "hang" and ctx.task_cancellation.wait_until_cancelled_sync(30):
            self.was_cancelled.set()
        return self._behave(ctx, ask)

    @sync_operation
    async def nothing(self, ctx: StartOperationContext, nothing: None) -> None:
        assert nothing is None

    @operation_handler
    def later(self) -> OperationHandler[Ask, Reply]:
        return _Later()

    def _behave(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        self.calls.append((ctx, ask))
        match ask.behaviour:
            case "fail":
                inner = ApplicationError("the inner reason", 1, type="Inner")
                inner.__cause__ = ValueError("the innermost")
                raise OperationError("no such rate", state=OperationErrorState.FAILED) from inner
            case "half a character":
                raise OperationError("no rate for \ud83d", state=OperationErrorState[ask.text])
            case "cancel":
                raise OperationError("withdrawn", state=OperationErrorState.CANCELED)
            case "refuse":
                raise HandlerError("the amount is negative", type=HandlerErrorType.BAD_REQUEST)
            case "not yet":
                raise ApplicationError("rates not loaded")
            case "never":
                raise ApplicationError("rates were withdrawn", non_retryable=True)
            case "started":
                raise WorkflowAlreadyStartedError(ask.key, "Secret")
            case "temporal":
                raise RPCError(ask.key, RPCStatusCode[ask.text], b"")
            case "bug":
                raise KeyError(ask.key)
            case "exit":
                raise SystemExit(1)
            case "exhausted":
                raise StopIteration(ask.key)
            case "own cancellation":
                raise asyncio.CancelledError
            case "own timeout":
                raise TimeoutError(ask.key)
            case "unwritable":
                return object()  # type: ignore[return-value] # the intended bug
            case "unwritable failure":
                unwritable = ApplicationError("rates", object())
                raise OperationError("no such rate", state=OperationErrorState.FAILED) from unwritable
            case "unwritable refusal":
                raise ApplicationError("rates were withdrawn", object(), non_retryable=True)
            case "coroutine":
                return asyncio.sleep(0)  # type: ignore[return-value] # like an `async` function behind a plain one
            case "link":
                ctx.outbound_links.extend([Link(url="https://rates.example/7", type="rates.Rate"), Link("not one", "")])
            case _:
                pass
        return Reply(ask.text, "b" * ask.size)


@service_handler(name="ProbeService")
class Probes:
    """The operation of a contract without a workflow."""

    @sync_operation
    async def hidden(self, ctx: StartOperationContext, ask: Ask) -> Reply:
        return Reply(f"hidden {ask.text}")


quotes = Quotes()
same_quotes = quotes
