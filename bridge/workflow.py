"""The workflow side of a call: the client that an order workflow uses.

The methods, parameter names and errors are those of `temporalio.workflow.create_nexus_client`, so that moving to or
from native Nexus changes one line. Underneath is one activity, whose id is the request id of the call. Deterministic
and sandbox-safe: imports only the SDK, nexusrpc and the standard library.
"""

from collections.abc import Callable, Generator, Mapping
from datetime import timedelta
from typing import Any, Generic, TypeVar, overload

import nexusrpc
from temporalio import exceptions, workflow
from temporalio.common import RetryPolicy

from bridge.calls import (
    OPERATION_UNSUCCESSFUL,
    START_OPERATION_ACTIVITY,
    UNSUCCESSFUL_MESSAGE,
    OperationCall,
    Renewals,
)

DEFAULT_SCHEDULE_TO_CLOSE = timedelta(hours=24)
"""Deadline of a call that names none: no call is unbounded."""

DEFAULT_FIRST_LEASE = timedelta(seconds=30)

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


class OperationHandle(Generic[_OutputT]):
    """A call under way. Await it, or `result()`, for the operation's result."""

    def __init__(self, activity: workflow.ActivityHandle[_OutputT], call: OperationCall) -> None:
        self._activity = activity
        self._call = call

    @property
    def operation_token(self) -> str | None:
        """Always None: the call is known to be scheduled, not yet started, when the handle is made."""
        return None

    def cancel(self) -> bool:
        """Stop waiting. The operation itself goes on. Returns whether the call was still under way."""
        return self._activity.cancel()

    async def result(self) -> _OutputT:
        """Wait for the operation's result.

        Raises:
            temporalio.exceptions.NexusOperationError: As native Nexus does, with the reason as its cause: the
                operation's own failure, a CancelledError, a TimeoutError, or a `nexusrpc.HandlerError`.
        """
        try:
            return await self._activity
        except exceptions.ActivityError as error:
            raise self._operation_error() from _reason(error)

    def __await__(self) -> Generator[Any, Any, _OutputT]:
        return self.result().__await__()

    def _operation_error(self) -> exceptions.NexusOperationError:
        return exceptions.NexusOperationError(
            UNSUCCESSFUL_MESSAGE,
            scheduled_event_id=0,
            endpoint=self._call.endpoint,
            service=self._call.service,
            operation=self._call.operation,
            operation_token="",
        )


def _reason(error: exceptions.ActivityError) -> BaseException:
    """What native Nexus would give as the cause where the waiting activity ended with *error*."""
    cause = error.cause
    match cause:
        case exceptions.ApplicationError(type=kind) if kind == OPERATION_UNSUCCESSFUL:
            # An outcome, told by the receiver or learned by an attempt.
            return cause.cause or cause
        case exceptions.CancelledError():
            return cause
        case _:
            # Every other attempt is retried until the deadline, so whatever the last one said, time has run out.
            timeout = exceptions.TimeoutError(
                "operation timed out", type=exceptions.TimeoutType.SCHEDULE_TO_CLOSE, last_heartbeat_details=[]
            )
            timeout.__cause__ = cause
            return timeout


class OperationClient(Generic[_ServiceT]):
    """Calls the operations of one service through one endpoint. Made by `create_client`."""

    def __init__(self, *, endpoint: str, service: str, first_lease: timedelta, renewals: Renewals) -> None:
        self._endpoint = endpoint
        self._service = service
        self._first_lease = first_lease
        self._renewals = renewals

    @overload
    async def start_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT],
        input: _InputT,
        *,
        output_type: type[_OutputT] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> OperationHandle[_OutputT]: ...

    @overload
    async def start_operation(
        self,
        operation: str,
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> OperationHandle[_OutputT]: ...

    async def start_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> OperationHandle[Any]:
        """Start an operation and return its handle.

        Returns as soon as the call is scheduled; a start that fails surfaces when the handle is awaited.

        Args:
            operation: The operation, or its name.
            input: The operation's input.
            output_type: What to decode the result to, where *operation* is only a name.
            schedule_to_close_timeout: How long to wait for the outcome, 24 hours by default.
            headers: Nexus headers for the handler, sent in clear.
            summary: One line shown beside the call in UI and CLI; by default endpoint, service and operation.

        Raises:
            ValueError: A header is reserved or cannot be sent, or a duration is not positive.
        """
        name = operation if isinstance(operation, str) else operation.name
        if not isinstance(operation, str):
            output_type = operation.output_type
        timeout = DEFAULT_SCHEDULE_TO_CLOSE if schedule_to_close_timeout is None else schedule_to_close_timeout
        if timeout <= timedelta(0):
            message = "schedule_to_close_timeout must be positive"
            raise ValueError(message)
        call = OperationCall(
            endpoint=self._endpoint,
            service=self._service,
            operation=name,
            scheduled_time_ms=int(workflow.now().timestamp() * 1000),
            schedule_to_close_ms=_milliseconds(timeout),
            first_lease_ms=_milliseconds(self._first_lease),
            renewal_initial_ms=_milliseconds(self._renewals.initial),
            renewal_maximum_ms=_milliseconds(self._renewals.maximum),
            renewal_coefficient=self._renewals.coefficient,
            headers=_checked_headers(headers or {}),
        )
        activity: workflow.ActivityHandle[Any] = workflow.start_activity(
            START_OPERATION_ACTIVITY,
            args=[call, input],
            # Minted in workflow code: replays and renewals must name the same start.
            activity_id=str(workflow.uuid4()),
            result_type=output_type,
            schedule_to_close_timeout=timeout,
            start_to_close_timeout=self._first_lease,
            retry_policy=_RETRY_POLICY,
            cancellation_type=workflow.ActivityCancellationType.ABANDON,
            summary=summary or f"{self._endpoint}: {self._service}/{name}",
        )
        return OperationHandle(activity, call)

    @overload
    async def execute_operation(
        self,
        operation: nexusrpc.Operation[_InputT, _OutputT],
        input: _InputT,
        *,
        output_type: type[_OutputT] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> _OutputT: ...

    @overload
    async def execute_operation(
        self,
        operation: str,
        input: Any,
        *,
        output_type: type[_OutputT] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> _OutputT: ...

    async def execute_operation(
        self,
        operation: nexusrpc.Operation[Any, Any] | str,
        input: Any,  # noqa: A002 - Temporal's parameter name
        *,
        output_type: type[Any] | None = None,
        schedule_to_close_timeout: timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        summary: str | None = None,
    ) -> Any:
        """Start an operation and wait for its result: `start_operation`, then `OperationHandle.result`."""
        handle: OperationHandle[Any] = await self.start_operation(
            operation,
            input,
            output_type=output_type,
            schedule_to_close_timeout=schedule_to_close_timeout,
            headers=headers,
            summary=summary,
        )
        return await handle


@overload
def create_client(
    *,
    service: type[_ServiceT],
    endpoint: str,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
) -> OperationClient[_ServiceT]: ...


@overload
def create_client(
    *,
    service: str,
    endpoint: str,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
) -> OperationClient[Any]: ...


def create_client(
    *,
    service: type[Any] | str,
    endpoint: str,
    first_lease: timedelta = DEFAULT_FIRST_LEASE,
    renewals: Renewals | None = None,
) -> OperationClient[Any]:
    """Create a client for the operations of *service* behind *endpoint*.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`, or its name.
        endpoint: Name of an endpoint in the caller's settings.
        first_lease: How long the first attempt waits for the callback before the call asks the handler again.
        renewals: How it goes on asking; by default after 1 minute, doubled up to an hour.

    Raises:
        ValueError: *service* is no contract, or *first_lease* is not positive.
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
    return OperationClient(endpoint=endpoint, service=name, first_lease=first_lease, renewals=renewals or Renewals())


def _milliseconds(duration: timedelta) -> int:
    return max(1, round(duration.total_seconds() * 1000))


def _checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Lower-case the names; refuse what the protocol reserves or HTTP cannot carry."""
    is_sendable: Callable[[str], bool] = lambda text: text.isascii() and text.isprintable() and text == text.strip()  # noqa: E731
    for name, value in headers.items():
        lower = name.lower()
        if lower in RESERVED_HEADERS or lower.startswith(RESERVED_PREFIXES):
            message = f"header {name!r} is reserved"
            raise ValueError(message)
        if not name or not all(each.isalnum() or each in "-_" for each in name) or not is_sendable(name + value):
            message = f"header {name!r}: names are letters, digits, '-' and '_', values printable ASCII"
            raise ValueError(message)
    return {name.lower(): value for name, value in headers.items()}
