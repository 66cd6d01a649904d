"""The workflow side of a call: the client that an order workflow uses.

Methods, parameter names and errors are equal to those of `temporalio.workflow.create_nexus_client`, so that a change to
or from native Nexus is one line. One activity carries a call, and its id is the request id of the call. This module is
deterministic and sandbox-safe: it imports only the SDK, nexusrpc and the standard library.
"""

import asyncio
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypedDict, TypeVar, Unpack, get_args

import nexusrpc
from temporalio import workflow

from bridge.workflow.call import LIMIT_INPUT, MAX_DURATION, MAX_INPUT_BYTES, OperationCall, Renewals, Transport
from bridge.workflow.pending_call import PendingCall, operation_error
from bridge.workflow.run_calls import RunCalls

DEFAULT_SCHEDULE_TO_CLOSE = timedelta(hours=24)
"""Deadline of a call that sets none, because every call must end."""

DEFAULT_FIRST_LEASE = timedelta(seconds=30)

MAX_CALLS_IN_FLIGHT = 1_900
"""Most calls that one workflow run may wait for, below the server's limit of 2 000 pending activities."""

RESERVED_HEADERS = frozenset(
    {"host", "authorization", "connection", "transfer-encoding", "request-timeout", "operation-timeout", "prefer"}
    | {"traceparent", "tracestate", "user-agent", "accept-encoding", "signature", "signature-input", "repr-digest"}
    # Proxies drop or change these, and the signature, which covers the headers of a call, would fail.
    | {"te", "trailer", "upgrade", "keep-alive", "expect", "forwarded", "via"}
)
RESERVED_PREFIXES = ("nexus-", "content-", "bridge-", "temporal-", "proxy-", "x-forwarded-")
_MAX_HEADERS, _MAX_NAMES, _MAX_CHARACTERS = 64, 2048, 8192
"""Limits of a call's headers: their number, the characters of their names, and the characters of all. The handler's
listener and the signature accept no more."""

_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


class CallOptions(TypedDict, total=False):
    """The options of one call: the keyword arguments of `start_operation` and `execute_operation`."""

    schedule_to_close_timeout: timedelta | None
    """Longest wait for the outcome, 24 hours by default."""
    schedule_to_start_timeout: timedelta | None
    """Longest time until the handler has started the operation. No limit by default."""
    start_to_close_timeout: timedelta | None
    """Longest time from the start of the operation to its end. No limit by default."""
    cancellation_type: workflow.NexusOperationCancellationType
    """What must happen before a canceled call raises its error; WAIT_COMPLETED by default."""
    headers: Mapping[str, str] | None
    """Nexus headers for the handler, sent unencrypted."""
    summary: str | None
    """One line that UI and CLI show with the call; by default endpoint, service and operation."""


class OperationHandle(Generic[_OutputT]):
    """A call in flight. Await it for the operation's result.

    If the call fails, awaiting raises `temporalio.exceptions.NexusOperationError`, like native Nexus. The cause of the
    error is the operation's own failure, a CancelledError, a TimeoutError, or a `nexusrpc.HandlerError`.
    """

    def __init__(self, carried: asyncio.Task[_OutputT] | workflow.NexusOperationHandle[_OutputT]) -> None:
        self._carried = carried

    @property
    def operation_token(self) -> str | None:
        """Operation token of a call over native Nexus. None for other calls: a handle exists before the start."""
        return None if isinstance(self._carried, asyncio.Task) else self._carried.operation_token

    def cancel(self) -> bool:
        """Cancel the operation according to the call's cancellation type. Returns whether the call was in flight."""
        return self._carried.cancel()

    def __await__(self) -> Generator[Any, Any, _OutputT]:
        return self._carried.__await__()


class ClientOptions(TypedDict, total=False):
    """The transport and the limits of one client's calls: the optional arguments of `create_client`."""

    transport: Transport | None
    """The transport of the calls; None selects the one in the endpoint's settings, which is "callback" by default.

    "callback": the handler POSTs the outcome. "wait": the answer to the start holds the outcome of a short operation;
    for a longer one the transport is "callback". "poll": the call asks the handler at a fixed interval; use it if the
    handler cannot reach the caller. "nexus": Temporal's own Nexus carries the call. The workflow's code must select
    "nexus", because it decides which command the workflow issues. Settings cannot.
    """
    first_lease: timedelta
    """How long the first attempt waits for the callback before the call asks the handler again; 30 seconds by
    default."""
    renewals: Renewals
    """How often the call asks the handler afterwards; by default after 1 minute, then doubled up to an hour."""
    max_input_bytes: int | None
    """Largest input in bytes before the payload codec. A larger input is refused as a bad request.

    The default leaves room for the bytes that an encrypting codec adds. With a compressing codec the limit may be
    higher. If the server names a lower limit of the namespace (from version 1.32), that one applies. None disables the
    check. Server and SDK then handle an input of more than 2 MiB after the codec: server 1.29 terminates the calling
    workflow.
    """
    max_calls_in_flight: int
    """Most calls of one workflow run, by all clients together, that may wait at a time; 1 900 by default.

    A further call is refused as RESOURCE_EXHAUSTED. Each call is a pending activity, and the server allows 2 000 of
    them by default. Cancels do not count. Native Nexus has a limit of its own.
    """


@dataclass(frozen=True, kw_only=True)
class OperationClient:
    """Calls the operations of one service through one endpoint. Made by `create_client`."""

    endpoint: str
    """Name of the endpoint in the caller's settings, or over native Nexus on Temporal's server."""
    service: str
    """Name of the service."""
    transport: Transport | None = None
    """See `ClientOptions`."""
    first_lease: timedelta = DEFAULT_FIRST_LEASE
    """See `ClientOptions`."""
    renewals: Renewals = field(default_factory=Renewals)
    """See `ClientOptions`."""
    max_input_bytes: int | None = MAX_INPUT_BYTES
    """See `ClientOptions`."""
    max_calls_in_flight: int = MAX_CALLS_IN_FLIGHT
    """See `ClientOptions`."""

    def __post_init__(self) -> None:
        """Refuse options with which every call would fail.

        Raises:
            ValueError: *transport* is not one of the four, *first_lease* is not positive, or a limit is not a positive
                number.
        """
        _milliseconds("first_lease", self.first_lease)
        for name in ("max_input_bytes", "max_calls_in_flight"):
            limit = getattr(self, name)
            # This form of the comparison also refuses NaN.
            if limit is not None and not 0 < limit < math.inf:
                message = f"{name} must be a positive number"
                raise ValueError(message)
        if self.transport is not None and self.transport not in get_args(Transport):
            message = f"transport={self.transport!r} is not one of {', '.join(get_args(Transport))}"
            raise ValueError(message)

    async def start_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT] | Callable[..., Any] | str,
        input: _InputT,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> OperationHandle[_OutputT]:
        """Start an operation and return its handle.

        This method returns when the call is scheduled. If the handler refuses the start, awaiting the handle raises the
        error. Over native Nexus this method returns when the handler has started the operation, and raises the error of
        a start that fails.

        Args:
            operation: The operation, its name, or the method of a service handler that carries it out.
            input: The operation's input.
            output_type: Type of the result, if *operation* is a name.
            **options: See `CallOptions`.

        Raises:
            TypeError: An option is unknown.
            ValueError: *operation* is not an operation, a header is reserved or cannot be sent, or a duration is not
                positive.
            temporalio.exceptions.NexusOperationError: The input is larger than `max_input_bytes`, or
                `max_calls_in_flight` calls wait already.
        """
        require_known(options, CallOptions)
        if isinstance(operation, str):
            name = operation
        else:
            declared = operation if isinstance(operation, nexusrpc.Operation) else nexusrpc.get_operation(operation)
            if declared is None:
                message = f"operation={operation!r} is not a Nexus operation"
                raise ValueError(message)
            name, output_type = declared.name, declared.output_type
        # The request id is minted in workflow code, because replays and renewals must name the same start.
        request_id, shown = str(workflow.uuid4()), f"{self.endpoint}: {self.service}/{name}"
        is_native = self.transport == "nexus"
        refusal = self._too_large(input) or (None if is_native else self._too_many())
        if (refusal := _recorded(request_id, refusal)) is not None:
            raise operation_error(self.endpoint, self.service, name) from refusal
        timeout, summary = options.get("schedule_to_close_timeout"), options.get("summary") or shown
        timeout = DEFAULT_SCHEDULE_TO_CLOSE if timeout is None else timeout
        if is_native:
            native = workflow.create_nexus_client(service=self.service, endpoint=self.endpoint)
            options = {**options, "schedule_to_close_timeout": timeout, "summary": summary}
            return OperationHandle(await native.start_operation(name, input, output_type=output_type, **options))
        pending = PendingCall(
            call=self._call(name, options, timeout=timeout),
            operation_input=input,
            request_id=request_id,
            output_type=output_type,
            cancellation_type=options.get("cancellation_type", workflow.NexusOperationCancellationType.WAIT_COMPLETED),
            summary=summary,
        )
        call = asyncio.create_task(pending.outcome(), name=f"call: {shown}")
        try:
            # A task that is canceled before its first step would never run its cancellation type.
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            # The call has had its first step. The next wait, perhaps that for the handle, gets the cancel.
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
                task.cancel()
        return OperationHandle(call)

    def _too_large(self, operation_input: Any) -> nexusrpc.HandlerError | None:
        """Why *operation_input* is too large to send; None if it is not.

        The workflow checks this, because the server terminates a workflow that schedules an activity with too large an
        input.
        """
        if self.max_input_bytes is None:
            return None
        limit_input = workflow.extern_functions().get(LIMIT_INPUT, lambda: math.inf)
        limit = min(self.max_input_bytes, limit_input())
        size = workflow.payload_converter().to_payload(operation_input).ByteSize()
        if size <= limit:
            return None
        message = f"the operation's input of {size} bytes is over the limit of {limit}"
        return nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.BAD_REQUEST)

    def _too_many(self) -> nexusrpc.HandlerError | None:
        """Why the run may not make a further call now; None if it may."""
        if len(RunCalls.present().waiting) < self.max_calls_in_flight:
            return None
        message = (
            f"{self.max_calls_in_flight} calls of this workflow are in flight, which is the limit: await some of them "
            "first, or raise max_calls_in_flight of create_client and the server's limit of pending activities"
        )
        return nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.RESOURCE_EXHAUSTED)

    def _call(self, name: str, options: CallOptions, *, timeout: timedelta) -> OperationCall:
        return OperationCall(
            endpoint=self.endpoint,
            service=self.service,
            operation=name,
            scheduled_time_ms=int(workflow.now().timestamp() * 1000),
            schedule_to_close_ms=_milliseconds("schedule_to_close_timeout", timeout),
            schedule_to_start_ms=_maybe_milliseconds(
                "schedule_to_start_timeout", options.get("schedule_to_start_timeout")
            ),
            start_to_close_ms=_maybe_milliseconds("start_to_close_timeout", options.get("start_to_close_timeout")),
            first_lease_ms=_milliseconds("first_lease", self.first_lease),
            renewal_initial_ms=_milliseconds("renewals", self.renewals.initial),
            renewal_maximum_ms=_milliseconds("renewals", self.renewals.maximum),
            renewal_coefficient=self.renewals.coefficient,
            headers=checked_headers(options.get("headers") or {}),
            transport=self.transport,
        )

    async def execute_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT] | Callable[..., Any] | str,
        input: _InputT,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[_OutputT] | None = None,
        **options: Unpack[CallOptions],
    ) -> _OutputT:
        """Start an operation and wait for its result: `start_operation`, then await the handle."""
        return await (await self.start_operation(operation, input, output_type=output_type, **options))


def _recorded(request_id: str, refusal: nexusrpc.HandlerError | None) -> nexusrpc.HandlerError | None:
    """The refusal that history records for this call, or outside of a replay *refusal*.

    A refusal adds a marker to history. A replay refuses exactly the calls that have a marker, so that a changed limit
    does not change the replay.
    """
    marker = f"bridge.refused-{request_id}"
    if workflow.unsafe.is_replaying():
        if not workflow.patched(marker):
            return None
        message = "the call was refused when it was made, by a limit that has changed since"
        return refusal or nexusrpc.HandlerError(message, type=nexusrpc.HandlerErrorType.BAD_REQUEST)
    return refusal if refusal is not None and workflow.patched(marker) else None


def create_client(*, service: type[Any] | str, endpoint: str, **options: Unpack[ClientOptions]) -> OperationClient:
    """Create a client for the operations of *service* behind *endpoint*.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`, or its name.
        endpoint: Name of an endpoint in the caller's settings, or over native Nexus on Temporal's server.
        **options: See `ClientOptions`.

    Raises:
        ValueError: *service* is not a contract, or an option cannot be used.
    """
    return OperationClient(endpoint=endpoint, service=service_name(service), **options)


def service_name(service: type[Any] | str) -> str:
    """Return the name of *service*, which is a contract or a name.

    Raises:
        ValueError: *service* is not decorated with `nexusrpc.service`.
    """
    if isinstance(service, str):
        return service
    if definition := nexusrpc.get_service_definition(service):
        return definition.name
    message = f"service={service!r} is neither a name nor decorated with @nexusrpc.service"
    raise ValueError(message)


def require_known(options: Mapping[str, object], known: type[Any]) -> None:
    """Refuse names that *known*, a TypedDict, does not have. Python accepts every name for `**options`.

    Raises:
        TypeError: The text has the unknown names.
    """
    if unknown := options.keys() - known.__annotations__.keys():
        message = f"unknown options: {', '.join(sorted(unknown))}"
        raise TypeError(message)


def _milliseconds(name: str, duration: timedelta) -> int:
    """*duration* in milliseconds, at least 1 and at most `MAX_DURATION`.

    Raises:
        ValueError: *duration* is not positive.
    """
    if duration <= timedelta(0):
        message = f"{name} must be positive"
        raise ValueError(message)
    return max(1, round(min(duration, MAX_DURATION).total_seconds() * 1000))


def _maybe_milliseconds(name: str, duration: timedelta | None) -> int | None:
    return None if duration is None else _milliseconds(name, duration)


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """*headers* with lower-case names.

    Raises:
        ValueError: A header is reserved by the protocol or cannot be sent over HTTP, or all together are too long.
    """
    for name, value in headers.items():
        lower, text = name.lower(), name + value
        if lower in RESERVED_HEADERS or lower.startswith(RESERVED_PREFIXES):
            message = f"header {name!r} is reserved"
            raise ValueError(message)
        # Some proxies drop a header with an underscore (nginx by default). The signature, which covers it, would fail.
        is_sendable = text.isascii() and text.isprintable() and text == text.strip()
        if not name or not all(each.isalnum() or each == "-" for each in name) or not is_sendable:
            message = f"header {name!r}: names are letters, digits and '-', values printable ASCII"
            raise ValueError(message)
    names = sum(map(len, headers))
    if len(headers) > _MAX_HEADERS or names > _MAX_NAMES or names + sum(map(len, headers.values())) > _MAX_CHARACTERS:
        message = f"headers: at most {_MAX_HEADERS}, {_MAX_NAMES} characters of names, and {_MAX_CHARACTERS} in all"
        raise ValueError(message)
    return {name.lower(): value for name, value in headers.items()}
