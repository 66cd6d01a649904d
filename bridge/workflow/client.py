"""The workflow side of a call: the client that an order workflow uses.

The methods, parameter names and errors are those of `temporalio.workflow.create_nexus_client`, so that moving to or
from native Nexus changes one line. Underneath is one activity, whose id is the request id of the call. Deterministic
and sandbox-safe: imports only the SDK, nexusrpc and the standard library.
"""

import asyncio
from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypedDict, TypeVar, Unpack, assert_never, get_args, overload

import nexusrpc
from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy

from bridge.workflow.call import (
    CALL_ENDED,
    CANCEL_OPERATION_ACTIVITY,
    MAX_INPUT_BYTES,
    OPERATION_UNSUCCESSFUL,
    START_OPERATION_ACTIVITY,
    STILL_RUNNING,
    UNSUCCESSFUL_MESSAGE,
    OperationCall,
    Renewals,
    Transport,
)

DEFAULT_SCHEDULE_TO_CLOSE = timedelta(hours=24)
"""Deadline of a call that names none: no call is unbounded."""

DEFAULT_FIRST_LEASE = timedelta(seconds=30)

CANCEL_ATTEMPT_TIMEOUT = timedelta(seconds=15)
"""Of one attempt to ask for a cancel: the request's 10 seconds, and some for the worker."""

RESERVED_HEADERS = frozenset(
    {"host", "authorization", "connection", "transfer-encoding", "request-timeout", "operation-timeout", "prefer"}
    | {"traceparent", "tracestate", "user-agent", "accept-encoding", "signature", "signature-input", "repr-digest"}
)
RESERVED_PREFIXES = ("nexus-", "content-", "bridge-", "temporal-")

# Coefficient 1, no limit: every attempt after the first is a renewal, and names its own delay. Each attempt is silent
# in history until one of them, or the receiver, closes the activity.
_RETRY_POLICY = RetryPolicy(initial_interval=timedelta(seconds=1), backoff_coefficient=1.0)

_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")
_ServiceT = TypeVar("_ServiceT")


class CallOptions(TypedDict, total=False):
    """How one call is made: the keyword arguments of `start_operation` and `execute_operation`."""

    schedule_to_close_timeout: timedelta | None
    """How long to wait for the outcome in all, 24 hours by default."""
    schedule_to_start_timeout: timedelta | None
    """How long the handler may take to take the operation on."""
    start_to_close_timeout: timedelta | None
    """How long the operation may run after that."""
    cancellation_type: workflow.NexusOperationCancellationType
    """What has happened by the time that a canceled call is reported as such; WAIT_COMPLETED by default."""
    headers: Mapping[str, str] | None
    """Nexus headers for the handler, sent in clear."""
    summary: str | None
    """One line shown beside the call in UI and CLI; by default endpoint, service and operation."""


class OperationHandle(Generic[_OutputT]):
    """A call under way. Await it for the operation's result.

    Awaiting raises `temporalio.exceptions.NexusOperationError` as native Nexus does, with the reason as its cause: the
    operation's own failure, a CancelledError, a TimeoutError, or a `nexusrpc.HandlerError`.
    """

    def __init__(self, carried: asyncio.Task[_OutputT] | workflow.NexusOperationHandle[_OutputT]) -> None:
        self._carried = carried

    @property
    def operation_token(self) -> str | None:
        """Of a call over native Nexus. Else None: it is known to be scheduled, not yet started."""
        return None if isinstance(self._carried, asyncio.Task) else self._carried.operation_token

    def cancel(self) -> bool:
        """Cancel the operation, by the call's cancellation type. Returns whether the call was still under way."""
        return self._carried.cancel()

    def __await__(self) -> Generator[Any, Any, _OutputT]:
        return self._carried.__await__()


class OperationClient(Generic[_ServiceT]):
    """Calls the operations of one service through one endpoint. Made by `create_client`."""

    def __init__(
        self,
        *,
        endpoint: str,
        service: str,
        transport: Transport | None,
        first_lease: timedelta,
        renewals: Renewals,
        max_input_bytes: int | None,
    ) -> None:
        self._endpoint = endpoint
        self._service = service
        self._transport = transport
        self._first_lease = first_lease
        self._renewals = renewals
        self._max_input_bytes = max_input_bytes

    @overload
    async def start_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT],
        input: _InputT,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[_OutputT]: ...

    @overload
    async def start_operation(
        self,
        operation: str,
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[_OutputT]: ...

    async def start_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[Any]:
        """Start an operation and return its handle.

        Returns as soon as the call is scheduled; a start that fails surfaces when the handle is awaited. Over native
        Nexus it returns, and fails, as that does: when the handler has taken the operation on.

        Args:
            operation: The operation, or its name.
            input: The operation's input.
            output_type: What to decode the result to, where *operation* is only a name.
            **options: See `CallOptions`.

        Raises:
            ValueError: A header is reserved or cannot be sent, or a duration is not positive.
        """
        name = operation if isinstance(operation, str) else operation.name
        if not isinstance(operation, str):
            output_type = operation.output_type
        if self._transport == "nexus":
            if (refusal := self._too_large(input)) is not None:
                raise _error(self._endpoint, self._service, name) from refusal
            native = workflow.create_nexus_client(service=self._service, endpoint=self._endpoint)
            # No call is unbounded, and each is shown by name, whatever carries it.
            options = {
                **options,
                "schedule_to_close_timeout": options.get("schedule_to_close_timeout") or DEFAULT_SCHEDULE_TO_CLOSE,
                "summary": options.get("summary") or self._shown(name),
            }
            return OperationHandle(await native.start_operation(name, input, output_type=output_type, **options))
        return self._start(name, input, output_type, **options)

    def _too_large(self, operation_input: Any) -> nexusrpc.HandlerError | None:
        """Why *operation_input* cannot be sent; None if it can.

        Found out here, because the server lets no activity run that could: it terminates the workflow.
        """
        if self._max_input_bytes is None:
            return None
        size = workflow.payload_converter().to_payload(operation_input).ByteSize()
        if size <= self._max_input_bytes:
            return None
        message = f"the operation's input of {size} bytes is over the limit of {self._max_input_bytes}"
        return nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.BAD_REQUEST)

    def _shown(self, name: str) -> str:
        return f"{self._endpoint}: {self._service}/{name}"

    def _start(
        self,
        name: str,
        operation_input: Any,
        output_type: type[Any] | None,
        *,
        schedule_to_close_timeout: timedelta | None = None,
        schedule_to_start_timeout: timedelta | None = None,
        start_to_close_timeout: timedelta | None = None,
        cancellation_type: workflow.NexusOperationCancellationType = (
            workflow.NexusOperationCancellationType.WAIT_COMPLETED
        ),
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> OperationHandle[Any]:
        timeout = DEFAULT_SCHEDULE_TO_CLOSE if schedule_to_close_timeout is None else schedule_to_close_timeout
        call = OperationCall(
            endpoint=self._endpoint,
            service=self._service,
            operation=name,
            scheduled_time_ms=int(workflow.now().timestamp() * 1000),
            schedule_to_close_ms=_milliseconds("schedule_to_close_timeout", timeout),
            schedule_to_start_ms=_maybe_milliseconds("schedule_to_start_timeout", schedule_to_start_timeout),
            start_to_close_ms=_maybe_milliseconds("start_to_close_timeout", start_to_close_timeout),
            first_lease_ms=_milliseconds("first_lease", self._first_lease),
            renewal_initial_ms=_milliseconds("renewals", self._renewals.initial),
            renewal_maximum_ms=_milliseconds("renewals", self._renewals.maximum),
            renewal_coefficient=self._renewals.coefficient,
            headers=_checked_headers(headers or {}),
            transport=self._transport,
        )
        shown = self._shown(name)
        if (refusal := self._too_large(operation_input)) is not None:
            return OperationHandle(asyncio.create_task(_refused(call, refusal), name=f"call: {shown}"))
        # Minted in workflow code: replays and renewals must name the same start.
        request_id = str(workflow.uuid4())
        activity: workflow.ActivityHandle[Any] = workflow.start_activity(
            START_OPERATION_ACTIVITY,
            args=[call, operation_input],
            activity_id=request_id,
            result_type=output_type,
            schedule_to_close_timeout=timeout,
            # The first lease. It ends no later than the operation may, so that an attempt is there to say so.
            start_to_close_timeout=min(filter(None, (self._first_lease, start_to_close_timeout))),
            retry_policy=_RETRY_POLICY,
            # The activity itself is never canceled: its token is what the cancel is sent by.
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary=summary or shown,
        )
        activity.add_done_callback(_retrieve)
        if (tell_worker := workflow.extern_functions().get(CALL_ENDED)) is not None:
            # Saves a request to the server; nothing that the workflow does depends on it.
            activity.add_done_callback(lambda _: tell_worker(request_id))
        task = asyncio.create_task(_outcome(activity, call, request_id, cancellation_type), name=f"call: {shown}")
        return OperationHandle(task)

    @overload
    async def execute_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT],
        input: _InputT,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> _OutputT: ...

    @overload
    async def execute_operation(
        self,
        operation: str,
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> _OutputT: ...

    async def execute_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Start an operation and wait for its result: `start_operation`, then await the handle."""
        handle: OperationHandle[Any] = await self.start_operation(operation, input, output_type=output_type, **options)
        return await handle


async def _refused(call: OperationCall, refusal: nexusrpc.HandlerError) -> NoReturn:
    raise _operation_error(call) from refusal


async def _outcome(
    activity: workflow.ActivityHandle[Any],
    call: OperationCall,
    request_id: str,
    cancellation_type: workflow.NexusOperationCancellationType,
) -> Any:
    """Wait for the call, and carry out its cancellation type if the wait is canceled."""
    canceling: workflow.ActivityHandle[Any] | None = None
    while True:
        try:
            return await asyncio.shield(activity)
        except exceptions.ActivityError as error:
            raise _operation_error(call) from _reason(error)
        except asyncio.CancelledError:
            match cancellation_type:
                case workflow.NexusOperationCancellationType.ABANDON:
                    raise _operation_error(call) from _canceled()
                case workflow.NexusOperationCancellationType.TRY_CANCEL:
                    canceling = _request_cancel(call, request_id)
                    raise _operation_error(call) from _canceled()
                case workflow.NexusOperationCancellationType.WAIT_REQUESTED:
                    canceling = canceling or _request_cancel(call, request_id)
                    await _until_requested(activity, canceling, call)
                case workflow.NexusOperationCancellationType.WAIT_COMPLETED:
                    # However often it is canceled, it is asked for once; the operation decides.
                    canceling = canceling or _request_cancel(call, request_id)
                case _:
                    assert_never(cancellation_type)


def _request_cancel(call: OperationCall, request_id: str) -> workflow.ActivityHandle[Any]:
    remaining = call.deadline - workflow.now()
    canceling: workflow.ActivityHandle[Any] = workflow.start_activity(
        CANCEL_OPERATION_ACTIVITY,
        args=[call, request_id],
        schedule_to_close_timeout=max(remaining, timedelta(seconds=1)),
        start_to_close_timeout=CANCEL_ATTEMPT_TIMEOUT,
        retry_policy=_RETRY_POLICY,
        cancellation_type=workflow.ActivityCancellationType.ABANDON,
        summary=f"cancel {call.endpoint}: {call.service}/{call.operation}",
    )
    canceling.add_done_callback(_retrieve)
    return canceling


async def _until_requested(
    activity: workflow.ActivityHandle[Any], canceling: workflow.ActivityHandle[Any], call: OperationCall
) -> None:
    """Return if the call has ended first; else raise once the handler has taken, or refused, the cancel."""
    while not activity.done() and not canceling.done():
        try:
            await workflow.wait([activity, canceling], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            continue
    if activity.done():
        return
    try:
        canceling.result()
    except exceptions.ActivityError as error:
        raise _operation_error(call) from _reason(error)
    raise _operation_error(call) from _canceled()


def _canceled() -> exceptions.CancelledError:
    return exceptions.CancelledError("operation canceled")


def _retrieve(activity: "asyncio.Future[Any]") -> None:
    """An activity whose end nobody waits for any more must not be reported as forgotten."""
    if not activity.cancelled():
        activity.exception()


def _operation_error(call: OperationCall) -> exceptions.NexusOperationError:
    return _error(call.endpoint, call.service, call.operation)


def _error(endpoint: str, service: str, operation: str) -> exceptions.NexusOperationError:
    return exceptions.NexusOperationError(
        UNSUCCESSFUL_MESSAGE,
        scheduled_event_id=0,
        endpoint=endpoint,
        service=service,
        operation=operation,
        operation_token="",
    )


def _reason(error: exceptions.ActivityError) -> BaseException:
    """What native Nexus would give as the cause where an activity of the call ended with *error*."""
    cause = error.cause
    match cause:
        case exceptions.ApplicationError(type=kind) if kind == OPERATION_UNSUCCESSFUL:
            # An outcome, told by the receiver or learned by an attempt.
            return cause.cause or cause
        case exceptions.CancelledError():
            return cause
        case exceptions.ApplicationError() if error.retry_state is not exceptions.RetryState.TIMEOUT:
            # Our activities end so only where the worker could not run them: no outcome, and no timeout either.
            return cause
        case _:
            # Every other attempt is retried until the deadline, so whatever the last one said, time has run out.
            timeout = exceptions.TimeoutError(
                "operation timed out", type=exceptions.TimeoutType.SCHEDULE_TO_CLOSE, last_heartbeat_details=[]
            )
            timeout.__cause__ = _trouble(cause)
            return timeout


def _trouble(error: BaseException | None) -> BaseException | None:
    """What went wrong last in *error*'s chain; None if the operation merely ran on, as native Nexus tells it."""
    while isinstance(error, exceptions.TimeoutError) or (
        isinstance(error, exceptions.ApplicationError) and error.type == STILL_RUNNING
    ):
        error = error.cause
    return error


@overload
def create_client(
    *,
    service: type[_ServiceT],
    endpoint: str,
    transport: Transport | None = None,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
    max_input_bytes: int | None = MAX_INPUT_BYTES,
) -> OperationClient[_ServiceT]: ...


@overload
def create_client(
    *,
    service: str,
    endpoint: str,
    transport: Transport | None = None,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
    max_input_bytes: int | None = MAX_INPUT_BYTES,
) -> OperationClient[Any]: ...


def create_client(
    *,
    service: type[Any] | str,
    endpoint: str,
    transport: Transport | None = None,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
    max_input_bytes: int | None = MAX_INPUT_BYTES,
) -> OperationClient[Any]:
    """Create a client for the operations of *service* behind *endpoint*.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`, or its name.
        endpoint: Name of an endpoint in the caller's settings; over native Nexus, of one on Temporal's server.
        transport: How the calls travel; None leaves it to the endpoint's settings, where "callback" is the default.
            "callback": the handler POSTs the outcome. "wait": a short operation's outcome comes in the answer to its
            start, a longer one's as with "callback". "poll": the handler is asked at a fixed interval, for a caller
            that cannot be reached from outside. "nexus": Temporal's own Nexus carries the call; which command a
            workflow issues is decided in its code, so only here and never in settings.
        first_lease: How long the first attempt waits for the callback before the call asks the handler again.
        renewals: How it goes on asking; by default after 1 minute, doubled up to an hour.
        max_input_bytes: A larger input, before the payload codec, is refused as a bad request. The default leaves room
            for an encrypting codec; a compressing one may allow more. None refuses nothing: what passes 2 MiB after
            the codec then ends as server and SDK will have it, on 1.29 by terminating the calling workflow.

    Raises:
        ValueError: *service* is no contract, *transport* none of the four, or *first_lease* not positive.
    """
    if isinstance(service, str):
        name = service
    elif definition := nexusrpc.get_service_definition(service):
        name = definition.name
    else:
        message = f"service={service!r}: neither a name nor decorated with @nexusrpc.service"
        raise ValueError(message)
    if first_lease <= timedelta(0):
        message = "first_lease must be positive"
        raise ValueError(message)
    if transport is not None and transport not in get_args(Transport):
        message = f"transport={transport!r}: none of {', '.join(get_args(Transport))}"
        raise ValueError(message)
    return OperationClient(
        endpoint=endpoint,
        service=name,
        transport=transport,
        first_lease=first_lease,
        renewals=renewals or Renewals(),
        max_input_bytes=max_input_bytes,
    )


def _milliseconds(name: str, duration: timedelta) -> int:
    if duration <= timedelta(0):
        message = f"{name} must be positive"
        raise ValueError(message)
    return max(1, round(duration.total_seconds() * 1000))


def _maybe_milliseconds(name: str, duration: timedelta | None) -> int | None:
    return None if duration is None else _milliseconds(name, duration)


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Lower-case the names; refuse what the protocol reserves or HTTP cannot carry."""
    is_sendable: Callable[[str], bool] = lambda text: text.isascii() and text.isprintable() and text == text.strip()  # noqa: E731
    for name, value in headers.items():
        lower = name.lower()
        if lower in RESERVED_HEADERS or lower.startswith(RESERVED_PREFIXES):
            message = f"header {name!r} is reserved"
            raise ValueError(message)
        # Proxies drop a name with an underscore (nginx by default), and the signature covers what was dropped.
        if not name or not all(each.isalnum() or each == "-" for each in name) or not is_sendable(name + value):
            message = f"header {name!r}: names are letters, digits and '-', values printable ASCII"
            raise ValueError(message)
    return {name.lower(): value for name, value in headers.items()}
