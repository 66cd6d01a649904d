"""The workflow side of a call: the client that an order workflow uses.

The methods, parameter names and errors are those of `temporalio.workflow.create_nexus_client`, so that moving to or
from native Nexus changes one line. Underneath is one activity, whose id is the request id of the call. Deterministic
and sandbox-safe: imports only the SDK, nexusrpc and the standard library.
"""

import asyncio
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, NoReturn, TypedDict, TypeVar, Unpack, get_args, overload

import nexusrpc
from temporalio import workflow

from bridge.workflow.call import MAX_DURATION, MAX_INPUT_BYTES, OperationCall, Renewals, Transport
from bridge.workflow.pending_call import PendingCall, operation_error
from bridge.workflow.run_calls import RunCalls

DEFAULT_SCHEDULE_TO_CLOSE = timedelta(hours=24)
"""Deadline of a call that names none: no call is unbounded."""

DEFAULT_FIRST_LEASE = timedelta(seconds=30)

MAX_CALLS_IN_FLIGHT = 1_900
"""Calls that one workflow run may wait for: below the server's limit of 2 000 pending activities."""

RESERVED_HEADERS = frozenset(
    {"host", "authorization", "connection", "transfer-encoding", "request-timeout", "operation-timeout", "prefer"}
    | {"traceparent", "tracestate", "user-agent", "accept-encoding", "signature", "signature-input", "repr-digest"}
)
RESERVED_PREFIXES = ("nexus-", "content-", "bridge-", "temporal-")

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
        if not isinstance(self._carried, asyncio.Task):
            return self._carried.cancel()
        # Not at once: a task that is canceled before its first step never carries out the cancellation type.
        asyncio.get_running_loop().call_soon(self._carried.cancel)
        return not self._carried.done()

    def __await__(self) -> Generator[Any, Any, _OutputT]:
        return self._carried.__await__()


class ClientOptions(TypedDict, total=False):
    """How the calls of one client travel, and what limits them: the optional arguments of `create_client`."""

    transport: Transport | None
    """How the calls travel; None leaves it to the endpoint's settings, where "callback" is the default.

    "callback": the handler POSTs the outcome. "wait": a short operation's outcome comes in the answer to its start, a
    longer one's as with "callback". "poll": the handler is asked at a fixed interval, for a caller that cannot be
    reached from outside. "nexus": Temporal's own Nexus carries the call; which command a workflow issues is decided in
    its code, so only here and never in settings.
    """
    first_lease: timedelta
    """How long the first attempt waits for the callback before the call asks the handler again: 30 seconds."""
    renewals: Renewals
    """How it goes on asking; by default after 1 minute, doubled up to an hour."""
    max_input_bytes: int | None
    """A larger input, before the payload codec, is refused as a bad request.

    The default leaves room for an encrypting codec; a compressing one may allow more. None refuses nothing: what passes
    2 MiB after the codec then ends as server and SDK will have it, on 1.29 by terminating the calling workflow.
    """
    max_calls_in_flight: int
    """How many calls of one workflow run may wait at a time, whichever client made them: 1 900.

    A call beyond is refused as RESOURCE_EXHAUSTED. Each takes a place among the run's pending activities, which the
    server limits to 2 000 by default; cancels take none. Native Nexus has a limit of its own.
    """


@dataclass(frozen=True, kw_only=True)
class OperationClient(Generic[_ServiceT]):
    """Calls the operations of one service through one endpoint. Made by `create_client`."""

    endpoint: str
    service: str
    transport: Transport | None = None
    first_lease: timedelta = DEFAULT_FIRST_LEASE
    renewals: Renewals = field(default_factory=Renewals)
    max_input_bytes: int | None = MAX_INPUT_BYTES
    max_calls_in_flight: int = MAX_CALLS_IN_FLIGHT

    def __post_init__(self) -> None:
        """Refuse what would fail later.

        Raises:
            ValueError: *transport* is not one of the four, *first_lease* is not positive, or a limit is not a positive
                number.
        """
        _milliseconds("first_lease", self.first_lease)
        for name in ("max_input_bytes", "max_calls_in_flight"):
            limit = getattr(self, name)
            # Written so that it is false of NaN.
            if limit is not None and not 0 < limit < math.inf:
                message = f"{name} must be a positive number"
                raise ValueError(message)
        if self.transport is not None and self.transport not in get_args(Transport):
            message = f"transport={self.transport!r}: none of {', '.join(get_args(Transport))}"
            raise ValueError(message)

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
        operation: str | Callable[..., Any],
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[_OutputT]: ...

    async def start_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | Callable[..., Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[Any]:
        """Start an operation and return its handle.

        Returns as soon as the call is scheduled; a start that fails surfaces when the handle is awaited. Over native
        Nexus it returns, and fails, as that does: when the handler has taken the operation on.

        Args:
            operation: The operation, its name, or the method of a service handler that carries it out.
            input: The operation's input.
            output_type: What to decode the result to, where *operation* is only a name.
            **options: See `CallOptions`.

        Raises:
            ValueError: *operation* is not an operation, a header is reserved or cannot be sent, or a duration is not
                positive.
        """
        if isinstance(operation, str):
            name = operation
        else:
            declared = operation if isinstance(operation, nexusrpc.Operation) else nexusrpc.get_operation(operation)
            if declared is None:
                message = f"operation={operation!r} is not a Nexus operation"
                raise ValueError(message)
            name, output_type = declared.name, declared.output_type
        # Minted in workflow code: replays and renewals must name the same start.
        request_id = str(workflow.uuid4())
        if self.transport == "nexus":
            if (refusal := _recorded(request_id, self._too_large(input))) is not None:
                raise operation_error(self.endpoint, self.service, name) from refusal
            native = workflow.create_nexus_client(service=self.service, endpoint=self.endpoint)
            # No call is unbounded, and each is shown by name, whatever carries it.
            options = {
                **options,
                "schedule_to_close_timeout": options.get("schedule_to_close_timeout") or DEFAULT_SCHEDULE_TO_CLOSE,
                "summary": options.get("summary") or self._shown(name),
            }
            return OperationHandle(await native.start_operation(name, input, output_type=output_type, **options))
        return self._start(name, input, output_type, request_id, options)

    def _too_large(self, operation_input: Any) -> nexusrpc.HandlerError | None:
        """Why *operation_input* cannot be sent; None if it can.

        Checked here, because the server terminates a workflow that schedules an activity with too large an input.
        """
        if self.max_input_bytes is None:
            return None
        size = workflow.payload_converter().to_payload(operation_input).ByteSize()
        if size <= self.max_input_bytes:
            return None
        message = f"the operation's input of {size} bytes is over the limit of {self.max_input_bytes}"
        return nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.BAD_REQUEST)

    def _too_many(self) -> nexusrpc.HandlerError | None:
        """Why no further call may be made now; None if one may."""
        if len(RunCalls.present().waiting) < self.max_calls_in_flight:
            return None
        message = (
            f"{self.max_calls_in_flight} calls of this workflow are in flight, which is the limit: await some of them "
            "first, or raise max_calls_in_flight of create_client and the server's limit of pending activities"
        )
        return nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.RESOURCE_EXHAUSTED)

    def _shown(self, name: str) -> str:
        return f"{self.endpoint}: {self.service}/{name}"

    def _start(
        self,
        name: str,
        operation_input: Any,
        output_type: type[Any] | None,
        request_id: str,
        options: CallOptions,
    ) -> OperationHandle[Any]:
        timeout = options.get("schedule_to_close_timeout")
        call = OperationCall(
            endpoint=self.endpoint,
            service=self.service,
            operation=name,
            scheduled_time_ms=int(workflow.now().timestamp() * 1000),
            schedule_to_close_ms=_milliseconds(
                "schedule_to_close_timeout", DEFAULT_SCHEDULE_TO_CLOSE if timeout is None else timeout
            ),
            schedule_to_start_ms=_maybe_milliseconds(
                "schedule_to_start_timeout", options.get("schedule_to_start_timeout")
            ),
            start_to_close_ms=_maybe_milliseconds("start_to_close_timeout", options.get("start_to_close_timeout")),
            first_lease_ms=_milliseconds("first_lease", self.first_lease),
            renewal_initial_ms=_milliseconds("renewals", self.renewals.initial),
            renewal_maximum_ms=_milliseconds("renewals", self.renewals.maximum),
            renewal_coefficient=self.renewals.coefficient,
            headers=_checked_headers(options.get("headers") or {}),
            transport=self.transport,
        )
        shown = self._shown(name)
        if (refusal := _recorded(request_id, self._too_large(operation_input) or self._too_many())) is not None:
            return OperationHandle(asyncio.create_task(_refused(call, refusal), name=f"call: {shown}"))
        pending = PendingCall(
            call=call,
            operation_input=operation_input,
            request_id=request_id,
            output_type=output_type,
            cancellation_type=options.get("cancellation_type", workflow.NexusOperationCancellationType.WAIT_COMPLETED),
            summary=options.get("summary") or shown,
        )
        return OperationHandle(asyncio.create_task(pending.outcome(), name=f"call: {shown}"))

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
        operation: str | Callable[..., Any],
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> _OutputT: ...

    async def execute_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | Callable[..., Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """Start an operation and wait for its result: `start_operation`, then await the handle."""
        handle: OperationHandle[Any] = await self.start_operation(operation, input, output_type=output_type, **options)
        return await handle


async def _refused(call: OperationCall, refusal: nexusrpc.HandlerError) -> NoReturn:
    raise operation_error(call.endpoint, call.service, call.operation) from refusal


def _recorded(request_id: str, refusal: nexusrpc.HandlerError | None) -> nexusrpc.HandlerError | None:
    """*refusal* as history has it: a limit that has changed since must not change what a replay does.

    A refusal leaves a marker. A replay refuses what has one, and nothing else.
    """
    marker = f"bridge.refused-{request_id}"
    if workflow.unsafe.is_replaying():
        if not workflow.patched(marker):
            return None
        message = "the call was refused when it was made, by a limit that has changed since"
        return refusal or nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.BAD_REQUEST)
    return refusal if refusal is not None and workflow.patched(marker) else None


@overload
def create_client(
    *, service: type[_ServiceT], endpoint: str, **options: Unpack[ClientOptions]
) -> OperationClient[_ServiceT]: ...


@overload
def create_client(*, service: str, endpoint: str, **options: Unpack[ClientOptions]) -> OperationClient[Any]: ...


def create_client(*, service: type[Any] | str, endpoint: str, **options: Unpack[ClientOptions]) -> OperationClient[Any]:
    """Create a client for the operations of *service* behind *endpoint*.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`, or its name.
        endpoint: Name of an endpoint in the caller's settings; over native Nexus, of one on Temporal's server.
        **options: See `ClientOptions`.

    Raises:
        ValueError: *service* is not a contract, or an option cannot be used.
    """
    if isinstance(service, str):
        name = service
    elif definition := nexusrpc.get_service_definition(service):
        name = definition.name
    else:
        message = f"service={service!r}: neither a name nor decorated with @nexusrpc.service"
        raise ValueError(message)
    return OperationClient(endpoint=endpoint, service=name, **options)


def _milliseconds(name: str, duration: timedelta) -> int:
    """At least 1, at most those of `MAX_DURATION`.

    Raises:
        ValueError: *duration* is not positive.
    """
    if duration <= timedelta(0):
        message = f"{name} must be positive"
        raise ValueError(message)
    return max(1, round(min(duration, MAX_DURATION).total_seconds() * 1000))


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
