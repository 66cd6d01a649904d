"""Call operations from outside of workflows: from scripts, web applications and the command line.

The contract, the endpoints and the errors are those of workflow code. No Temporal server of the caller is involved, and
every server version of the handler works. A call waits by asking the handler again, and the handler may hold each
request until the operation ends. When the process ends, the wait ends and the operation does not. A later call with the
same request id and input finds the same operation.
"""

# ruff: noqa: A002 - parameters are named as the SDK names them

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypedDict, TypeVar, Unpack, cast

import nexusrpc
from nexusrpc import HandlerError
from temporalio.common import MetricMeter
from temporalio.converter import DataConverter
from temporalio.exceptions import NexusOperationError

from bridge.http.client import HttpClient
from bridge.protocol.cancel import CancelRequest
from bridge.protocol.start import Finished, Running, StartRequest
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.settings import load
from bridge.workflow.call import MAX_DURATION
from bridge.workflow.client import DEFAULT_SCHEDULE_TO_CLOSE, checked_headers, require_known, service_name
from bridge.workflow.pending_call import operation_error, timed_out
from caller.endpoint_client import Endpoints, NotStartedError, explain
from caller.settings import CallerSettings
from caller.waiting.renewals import unreached_step

_T = TypeVar("_T")
_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


class CallOptions(TypedDict, total=False):
    """The options of one call."""

    schedule_to_close_timeout: timedelta
    """Longest wait for the outcome, 24 hours by default."""
    headers: Mapping[str, str]
    """Nexus headers for the handler, sent unencrypted."""
    request_id: str
    """Id of the call, by default a new one. A call with the id and the input of an earlier call finds its operation."""
    callback_url: str
    """A URL of your own, to which the handler POSTs the outcome, signed (docs/protocol.md). The handler's settings must
    allow it. By default none."""


@dataclass
class OperationHandle(Generic[_OutputT]):
    """One call from outside of workflows. Made by `OperationClient.start_operation`."""

    client: "OperationClient"
    """Sends the requests."""
    request: StartRequest
    """What every request of the call has in common."""
    operation_input: Any
    """The operation's input."""
    output_type: type[_OutputT] | None
    """Type of the result; None for the default of the data converter."""
    deadline: datetime
    """When the wait ends."""
    answer: Running | Finished | None = None
    """The handler's latest answer, which names the target workflow. None before the first one."""

    async def result(self) -> _OutputT:
        """Wait for the outcome and return the operation's result.

        Raises:
            temporalio.exceptions.NexusOperationError: The operation failed, was canceled, or passed the deadline. Its
                cause is the one that workflow code gets.
        """
        pause, loop = 0.1, asyncio.get_running_loop()
        while not isinstance(self.answer, Finished):
            asked = loop.time()
            await self.ask(is_held=True)
            settings = self.client.endpoints.resolve(self.client.endpoint).endpoint
            if isinstance(self.answer, Running) and loop.time() - asked < settings.wait_s / 2:
                # The handler had no place to hold the request.
                left = (self.deadline - datetime.now(UTC)).total_seconds()
                await asyncio.sleep(max(0, min(pause, left)))
                pause = min(pause * 2, settings.poll_interval_s)
        converter, outcome = self.client.data_converter, self.answer.outcome
        if outcome.failure is not None:
            raise self._error() from await converter.decode_failure(outcome.failure)
        payloads = [] if outcome.result is None else [outcome.result]
        # The SDK raises AttributeError if there are more types than payloads. A target in Go may have no result at all.
        types = None if self.output_type is None else [self.output_type] * len(payloads)
        values = await converter.decode(payloads, types)
        return cast("_OutputT", values[0] if values else None)

    async def cancel(self) -> None:
        """Ask the handler to cancel the operation. Returns when the handler has accepted. `result` shows how it ends.

        Raises:
            temporalio.exceptions.NexusOperationError: The handler refused, or was not reached before the deadline.
        """
        if not isinstance(self.answer, Running):
            return
        cancel = CancelRequest(
            service=self.request.service,
            operation=self.request.operation,
            operation_token=self.answer.operation_token,
            headers=self.request.headers,
        )
        endpoints, endpoint = self.client.endpoints, self.client.endpoint
        await self._persist(lambda left, _: endpoints.cancel(endpoint, cancel, remaining=left), is_refusal_final=True)

    async def ask(self, *, is_held: bool = False) -> None:
        """Start the operation, or ask for its state. The handler may hold the request until the operation ends.

        Raises:
            temporalio.exceptions.NexusOperationError: The handler refused, or was not reached before the deadline.
        """
        client, known = self.client, self.answer

        async def start(left: timedelta, attempt: int) -> Running | Finished:
            resolved = client.endpoints.resolve(client.endpoint)
            request = replace(
                self.request,
                operation_timeout=left,
                attempt=attempt if known is None else attempt + 1,
                operation_token=known.operation_token if isinstance(known, Running) else None,
                wait=min(timedelta(seconds=resolved.endpoint.wait_s), left) if is_held else None,
            )
            return await client.endpoints.start(
                client.endpoint, request, self.operation_input, client.data_converter, remaining=left
            )

        self.answer = await self._persist(start, is_refusal_final=known is None)

    async def _persist(self, send: Callable[[timedelta, int], Awaitable[_T]], *, is_refusal_final: bool) -> _T:
        """Repeat *send* until the handler answers. It gets the time that is left and the number of the attempt."""
        attempt, reason = 0, None
        while (left := self.deadline - datetime.now(UTC)) > timedelta(0):
            attempt += 1
            try:
                return await send(left, attempt)
            except (HandlerError, NotStartedError) as error:
                refused = error if isinstance(error, NotStartedError) else NotStartedError(error, retry_after=None)
            reason = refused.reason
            if refused.final_reason(is_refusal_final=is_refusal_final) is not None:
                await explain(reason, self.client.data_converter)
                raise self._error() from reason
            step = unreached_step(attempt, retry_after=refused.retry_after or timedelta(0))
            self.client.endpoints.log_not_reached(
                self.client.endpoint, refused, request_id=self.request.request_id, attempt=attempt, wanted=step
            )
            await asyncio.sleep(min(step, left).total_seconds())
        raise self._error() from timed_out(reason)

    def _error(self) -> NexusOperationError:
        return operation_error(self.client.endpoint, self.request.service, self.request.operation)


@dataclass(frozen=True)
class OperationClient:
    """Calls the operations of one service through one endpoint. Made by `create_client`."""

    service: str
    """Name of the service."""
    endpoint: str
    """Name of the endpoint."""
    endpoints: Endpoints
    """Sends the requests."""
    data_converter: DataConverter
    """Converter and codec that the handler understands."""

    async def start_operation(
        self, operation: nexusrpc.Operation[_InputT, _OutputT], input: _InputT, **options: Unpack[CallOptions]
    ) -> OperationHandle[_OutputT]:
        """Start an operation. Returns when the handler has started it.

        Raises:
            TypeError: An option is unknown.
            ValueError: A header is reserved or cannot be sent.
            temporalio.exceptions.NexusOperationError: The handler refused, or was not reached before the deadline.
        """
        handle = self.prepare(operation, input, **options)
        await handle.ask()
        return handle

    async def execute_operation(
        self, operation: nexusrpc.Operation[_InputT, _OutputT], input: _InputT, **options: Unpack[CallOptions]
    ) -> _OutputT:
        """Start an operation and wait for its result. A short operation takes one request.

        Raises:
            TypeError: An option is unknown.
            ValueError: A header is reserved or cannot be sent.
            temporalio.exceptions.NexusOperationError: See `OperationHandle.result`.
        """
        return await self.prepare(operation, input, **options).result()

    def prepare(
        self, operation: nexusrpc.Operation[_InputT, _OutputT], input: _InputT, **options: Unpack[CallOptions]
    ) -> OperationHandle[_OutputT]:
        """Return the handle of an operation that is not started yet. `ask` or `result` starts it.

        Raises:
            TypeError: An option is unknown.
            ValueError: A header is reserved or cannot be sent.
        """
        require_known(options, CallOptions)
        now = datetime.now(UTC)
        request = StartRequest(
            service=self.service,
            operation=operation.name,
            request_id=options.get("request_id") or str(uuid.uuid4()),
            callback_url=options.get("callback_url"),
            headers=checked_headers(options.get("headers", {})),
            scheduled_time=now,
        )
        deadline = now + min(options.get("schedule_to_close_timeout", DEFAULT_SCHEDULE_TO_CLOSE), MAX_DURATION)
        return OperationHandle(self, request, input, operation.output_type, deadline)


@asynccontextmanager
async def create_client(
    *,
    service: type[Any] | str,
    endpoint: str,
    settings: CallerSettings | None = None,
    data_converter: DataConverter = DataConverter.default,
) -> AsyncIterator[OperationClient]:
    """Create a client for the operations of *service* behind *endpoint*, and close its connections at the end.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`, or its name.
        endpoint: Name of an endpoint in the settings.
        settings: The caller's settings, by default those that BRIDGE_CONFIG names. They need no receiver.
        data_converter: Converter and codec that the handler understands.

    Raises:
        ValueError: *service* is not a contract.
        bridge.runtime.settings.SettingsError: The settings cannot be used.
    """
    http, metrics = HttpClient(), Metrics(MetricMeter.noop)
    found = settings or load(CallerSettings)
    endpoints = Endpoints(found, keys=LiveKeys(found, metrics), http=http, metrics=metrics)
    try:
        yield OperationClient(service_name(service), endpoint, endpoints, data_converter)
    finally:
        await http.aclose()
