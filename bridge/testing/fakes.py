"""Fake endpoints: they answer the calls of a caller's workflows as the test says, in the worker's process.

Only the handler is replaced. The workflow side, the waiting activity and the cancel activity are those of production,
so that results, errors, cancels and timeouts are too. A call that has to wait ends its attempt with the delay until it
should ask again, because the time-skipping test server skips the pause between two attempts and not an attempt.
"""

# ruff: noqa: ARG002 - the fakes need fewer facts than real endpoints

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Generic, Self, TypeVar

import nexusrpc
from nexusrpc import HandlerError
from temporalio import activity
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.common import RawValue
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, CancelledError, FailureError
from temporalio.plugin import SimplePlugin
from temporalio.worker import WorkerConfig

from bridge.errors import not_found
from bridge.protocol.cancel import CancelRequest
from bridge.protocol.outcome import CANCELED_MESSAGE, Outcome
from bridge.protocol.start import Finished, Running, StartAnswer, StartRequest
from bridge.runtime.metrics import Metrics
from bridge.security.callback_tokens import CallbackClaims
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageSigner
from bridge.temporal.worker_plugin import share_modules
from bridge.workflow.call import START_OPERATION_ACTIVITY, STILL_RUNNING, OperationCall
from bridge.workflow.client import service_name
from caller.completer import Completer
from caller.endpoint_client import Endpoints, NotStartedError, ResolvedEndpoint, encode_input
from caller.interceptor import CallerInterceptor
from caller.settings import Endpoint, HandlerPeer
from caller.waiting.cancel_activity import CancelActivities
from caller.waiting.renewals import LAST_ATTEMPT
from caller.waiting.waiting_activity import HANDLER_NOT_REACHED, OperationActivities
from handler.user_code.conversion import Conversion

_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")

_AT_ONCE = timedelta(0)
_SHORTEST_PAUSE = timedelta(seconds=1)
"""Longest time until a cancel ends a young call where the server cannot start an attempt early. For an older call it is
a quarter of the age of the call, so that a call of a month takes few attempts."""
_KEYS = KeySet.model_validate({"signing": "fake", "keys": {"fake": new_key()}})
_CANCELED = Finished(outcome=Outcome.canceled(Failure(message=CANCELED_MESSAGE)), target=None)


@dataclass
class RecordedCall(Generic[_InputT]):
    """One call that a fake endpoint has received."""

    endpoint: str
    """Name of the endpoint that the workflow called."""
    service: str
    """Name of the service."""
    operation: str
    """Name of the operation."""
    headers: Mapping[str, str]
    """The Nexus headers that the workflow set, by lower-case names."""
    input: _InputT = field(init=False)
    """The operation's input, as the contract's type."""
    is_canceled: bool = False
    """Whether the workflow has asked to cancel the operation."""


class FakeOperation(Generic[_InputT, _OutputT]):
    """What one operation of a fake endpoint does. The method that was called last decides about later calls."""

    def __init__(self, input_type: type[_InputT] | None) -> None:
        self.calls: list[RecordedCall[_InputT]] = []
        """The calls in the order of their starts. The renewals of a call are not counted."""
        self._input_type = input_type
        self._function: Callable[[_InputT], object] | None = None
        self._after: timedelta | None = _AT_ONCE

    def returns(self, value: _OutputT, *, after: timedelta = _AT_ONCE) -> None:
        """Succeed with *value*. *after* is how long the operation runs, by the clock of the server."""
        self._function, self._after = lambda _: value, after

    def fails(self, error: FailureError | HandlerError, *, after: timedelta = _AT_ONCE) -> None:
        """Fail as the caller sees it: *error* becomes the cause of the workflow's NexusOperationError.

        A FailureError is the operation's outcome; CancelledError means that the operation was canceled. A HandlerError
        is the handler's answer to the start. The caller repeats the start if the error is retryable.
        """
        self._function, self._after = lambda _: error, after

    def runs(self, function: Callable[[_InputT], _OutputT | Awaitable[_OutputT]]) -> None:
        """Run *function* once for each call. It gets the typed input and may raise the errors of `fails`.

        Any other error of *function* fails the call and the test.
        """
        self._function, self._after = function, _AT_ONCE

    def never(self) -> None:
        """Run until the call is canceled or passes its deadline."""
        self._function, self._after = lambda _: None, None

    async def receive(self, call: RecordedCall[_InputT], payload: Payload) -> "_Received":
        """Record *call*, and decide how and when it ends.

        Raises:
            AssertionError: The test did not expect the call, or its function has a mistake.
        """
        converter, began, name = activity.client().data_converter, activity.info().scheduled_time, call.operation
        if self._function is None:
            message = f"unexpected call of {call.service}/{name} through endpoint {call.endpoint!r}: it has no fake"
            raise AssertionError(message)
        try:
            try:
                call.input = Conversion(converter).value(payload, self._input_type)
                self.calls.append(call)
                value = self._function(call.input)
                value = await value if inspect.isawaitable(value) else value
            except (HandlerError, FailureError) as error:
                value = error
            if isinstance(value, HandlerError):
                return _Received(call, NotStartedError(value, retry_after=None), began)
            if isinstance(value, FailureError):
                await converter.encode_failure(value, failure := Failure())
                outcome = (Outcome.canceled if isinstance(value, CancelledError) else Outcome.failed)(failure)
            else:
                outcome = Outcome.succeeded((await converter.encode([value]))[0])
        except Exception as error:
            message = f"the fake of {call.service}/{name} raised {error!r}"
            raise AssertionError(message) from error
        due = None if self._after is None else began + self._after
        return _Received(call, Finished(outcome=outcome, target=None), due)


@dataclass(frozen=True)
class _Received:
    """A call, and how it ends unless it is canceled before."""

    call: RecordedCall[Any]
    """What the test reads."""
    answer: Finished | NotStartedError
    """How the call ends."""
    due: datetime | None
    """When the call ends, by the server's clock; None for never."""

    def ends(self, now: datetime) -> bool:
        """Whether an attempt at *now* ends the call."""
        is_final = isinstance(self.answer, Finished) or self.answer.final_reason(is_refusal_final=True) is not None
        return self.call.is_canceled or (is_final and self.due is not None and self.due <= now)


class FakeEndpoints(SimplePlugin):
    """A plugin for the worker of a caller, in place of `CallerPlugin`. It needs no settings.

    Use it as a context manager around the worker. At its end it raises AssertionError if a call came that the test did
    not expect. The call itself fails at once, and its error says the same.
    """

    def __init__(self) -> None:
        super().__init__("bridge.FakeEndpoints", workflow_runner=share_modules)
        self._operations: dict[tuple[str, str, str], FakeOperation[Any, Any]] = {}
        self._received: dict[str, _Received] = {}
        self._problems: list[str] = []
        self._is_entered = False

    def __enter__(self) -> Self:
        self._is_entered = True
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._problems:
            raise AssertionError("\n".join(self._problems)) from error

    def on(
        self, operation: nexusrpc.Operation[_InputT, _OutputT], *, service: type[Any] | str, endpoint: str
    ) -> FakeOperation[_InputT, _OutputT]:
        """Return the fake of *operation*: to say what it does, and to read its calls.

        *service* and *endpoint* are the arguments of `bridge.create_client`.

        Raises:
            ValueError: *service* is not a contract.
        """
        key = endpoint, service_name(service), operation.name
        return self._operations.setdefault(key, FakeOperation(operation.input_type))

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add what `CallerPlugin` adds.

        Raises:
            RuntimeError: The plugin is not used as a context manager.
        """
        if not self._is_entered:
            message = "use `with FakeEndpoints() as fakes:` around the worker, else unexpected calls pass unnoticed"
            raise RuntimeError(message)
        answers, metrics = _Answers(self._received), Metrics.of(config["client"])
        # The attempts take no time, and the clock of the test server may be years ahead.
        activities = OperationActivities(
            endpoints=answers, callbacks=None, metrics=metrics, clock=lambda: activity.info().started_time
        )

        @activity.defn(name=START_OPERATION_ACTIVITY)
        async def start_operation(call: OperationCall, operation_input: RawValue) -> RawValue:
            if (received := self._received.get(activity.info().activity_id)) is None:
                received = await self._receive(call, operation_input.payload)
            now = activity.info().started_time
            if call.deadline - now < LAST_ATTEMPT and not received.ends(now):
                # In production the last attempt stays open. The test server would let it stay open past the deadline.
                is_refused = isinstance(received.answer, NotStartedError)
                message, kind = (str(received.answer), HANDLER_NOT_REACHED) if is_refused else ("", STILL_RUNNING)
                raise ApplicationError(message, type=kind, non_retryable=True)
            # The attempts of a transport with a callback stay open, and the test server does not skip an open attempt.
            return await activities.start_operation(dataclasses.replace(call, transport="poll"), operation_input)

        cancel_operations = CancelActivities(endpoints=answers).cancel_operations
        config["activities"] = [*config.get("activities", ()), start_operation, cancel_operations]
        interceptor = CallerInterceptor(activities, settings=None)
        config["interceptors"] = [interceptor, *config.get("interceptors", ())]
        return super().configure_worker(config)

    async def _receive(self, call: OperationCall, payload: Payload) -> _Received:
        names = call.endpoint, call.service, call.operation
        recorded, info = RecordedCall[Any](*names, headers=call.headers), activity.info()
        try:
            received = await self._operations.get(names, FakeOperation(None)).receive(recorded, payload)
        except AssertionError as error:
            self._problems.append(str(error))
            refused = NotStartedError(not_found(str(error)), retry_after=None)
            received = _Received(recorded, refused, info.scheduled_time)
        self._received[info.activity_id] = received
        return received


class _Answers(Endpoints):
    """Answers to the calls that were received, in place of HTTP requests."""

    def __init__(self, received: Mapping[str, _Received]) -> None:
        self._received = received

    async def start(
        self, name: str, request: StartRequest, operation_input: Any, converter: DataConverter, *, remaining: timedelta
    ) -> StartAnswer:
        """Answer with the state of the call. An input that could not be sent is refused as by the base class."""
        await encode_input(operation_input, converter, self.resolve(name).peer)
        received = self._received[request.request_id]
        if received.call.is_canceled:
            return _CANCELED
        if received.due is None or activity.info().started_time < received.due:
            return Running(operation_token=request.request_id, target=None)
        if isinstance(received.answer, NotStartedError):
            raise received.answer
        return received.answer

    async def cancel(self, name: str, request: CancelRequest, *, remaining: timedelta) -> None:
        """End the operation as canceled."""
        info, request_id = activity.info(), request.operation_token
        self._received[request_id].call.is_canceled = True
        # Constructed without validation: the completer reads only these names.
        claims = CallbackClaims.model_construct(
            None, wf=info.workflow_id or "", run=info.workflow_run_id or "", rid=request_id
        )
        # Between two attempts this starts one, which gets the answer above.
        await Completer(client=activity.client()).complete(claims, _CANCELED.outcome, None)

    def resolve(self, name: str) -> ResolvedEndpoint:
        """Return settings that end each attempt at once, with the pause until the call should ask again."""
        pause = _SHORTEST_PAUSE
        if activity.in_activity() and (found := self._received.get((info := activity.info()).activity_id)) is not None:
            pause = max(pause, (info.started_time - info.scheduled_time) / 4)
            if found.due is not None and found.due > info.started_time:
                pause = min(pause, found.due - info.started_time)
        # Constructed without validation: no request is sent, and a pause may be shorter than those of real polls.
        settings = {"url": "", "handler": name, "transport": "poll", "poll_interval_s": pause.total_seconds()}
        endpoint, peer = Endpoint.model_construct(None, **settings), HandlerPeer(start_keys=_KEYS)
        return ResolvedEndpoint(endpoint=endpoint, peer=peer, signer=MessageSigner(_KEYS))
