"""Operations that need no workflow: nexusrpc's own service handlers, which run while their start is answered.

nexusrpc finds and runs the team's function. This module converts the input and the outcome with the client's data
converter, and maps errors as Temporal's own worker does. It stores nothing. A repeated start therefore runs the
function again, with the same request id.
"""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from datetime import datetime, timedelta
from types import ModuleType
from typing import Any

from nexusrpc import HandlerError, HandlerErrorType, OperationError, OperationErrorState, get_service_definition
from nexusrpc.handler import Handler, OperationTaskCancellation, StartOperationContext, StartOperationResultSync
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, CancelledError, WorkflowAlreadyStartedError
from temporalio.service import RPCError

from bridge.errors import PeerHandlerError, without_text
from bridge.http.client import REQUEST_TIMEOUT
from bridge.protocol.headers import decode_duration
from bridge.protocol.outcome import Outcome
from bridge.protocol.start import Finished, StartRequest
from bridge.runtime.event_log import event_logger
from bridge.runtime.settings import SettingsError
from bridge.temporal.rpc_status import error_type, is_final
from bridge.workflow.client import RESERVED_HEADERS, RESERVED_PREFIXES
from bridge.workflow.targets import Targets
from handler.user_code.conversion import Conversion
from handler.user_code.threads import close_coroutine, is_cancellation

MAX_REQUEST_TIMEOUT = timedelta(minutes=2)
"""Limit for an operation that runs within its start, even if `Request-Timeout` is longer."""

_log = event_logger(__name__)


def service_handlers_in(module: ModuleType) -> list[Any]:
    """Return every instance of a class decorated with `service_handler` that has a name in *module*."""
    found = [each for _, each in inspect.getmembers(module) if get_service_definition(type(each)) is not None]
    return list({id(each): each for each in found}.values())


class SyncOperations:
    """The operations of a team's service handlers."""

    def __init__(
        self,
        services: Sequence[Any],
        *,
        targets: Targets,
        converters: Mapping[str, DataConverter],
        threads: Mapping[str, Executor],
        clock: Callable[[], datetime],
    ) -> None:
        """Collect the operations of *services*. A plain function runs in its caller's executor of *threads*.

        *converters*, by caller, have no external storage if the caller does not share it: a reference could name any
        value in the storage.

        Raises:
            SettingsError: A member of *services* is not a service handler, or an operation is claimed twice, by
                *services* or by *targets*.
        """
        try:
            self._handlers = {caller: Handler(services, executor) for caller, executor in threads.items()}
        except (TypeError, RuntimeError, KeyError) as error:
            # nexusrpc raises KeyError if the instance is of the contract's class, which has no operation handlers.
            own = "no handler but an instance of the contract, for " if isinstance(error, KeyError) else ""
            cure = "; put all its operations in one class, with one instance" if "registered" in str(error) else ""
            message = f"service handlers: {own}{error}{cure}"
            raise SettingsError(message) from None
        self._threads = threads
        self._converters = converters
        self._conversions = {caller: Conversion(each) for caller, each in converters.items()}
        self._clock = clock
        operations = {
            (service, name): operation
            for handler in self._handlers.values()
            for service, each in handler.service_handlers.items()
            for name, operation in each.operation_handlers.items()
        }
        for (service, name), operation in operations.items():
            if any(each.__module__.startswith("temporalio.nexus") for each in type(operation).__mro__):
                cure = "declare its workflow with @emits_callback"
                message = (
                    f"{service}/{name} starts a workflow, which only a Nexus worker of Temporal can do here: {cure}"
                )
                raise SettingsError(message)
        self.names = frozenset(operations)
        """Pairs of service and operation."""
        for target in targets:
            if (target.service, target.operation) in self.names:
                message = f"{target.service}/{target.operation} is claimed by {target.name} and a service handler"
                raise SettingsError(message)

    async def start(
        self, caller: str, request: StartRequest, payload: Payload, authorize: Callable[[Any], Awaitable[None]]
    ) -> Finished:
        """Run one of the operations for *caller*, once *authorize* has returned for its decoded input.

        Raises:
            nexusrpc.HandlerError: The request failed. Any other exception is a bug in the team's code.
        """
        wanted = decode_duration(request.headers.get("request-timeout", ""))
        timeout = REQUEST_TIMEOUT if wanted is None else min(wanted, MAX_REQUEST_TIMEOUT)
        limit, cancellation = asyncio.timeout(timeout.total_seconds()), _Cancellation()
        context = StartOperationContext(
            service=request.service,
            operation=request.operation,
            headers={
                name: value
                for name, value in request.headers.items()
                if not name.startswith(RESERVED_PREFIXES) and name not in RESERVED_HEADERS
            },
            task_cancellation=cancellation,
            request_deadline=self._clock() + timeout,
            request_id=request.request_id,
            inbound_links=list(request.links),
        )
        try:
            async with limit:
                result = await self._handlers[caller].start_operation(
                    context, _Input(payload, self._conversions[caller], self._threads[caller], authorize)
                )
        except OperationError as error:
            outcome = await self._unsuccessful(caller, error)
        except HandlerError as error:
            raise await self._with_cause(caller, error, error.__cause__) from None
        except (ApplicationError, WorkflowAlreadyStartedError, RPCError) as error:
            _log.warning("bridge.operation_failed", extra={"bridge.error": type(error).__name__})
            cause = error if isinstance(error, ApplicationError) else None
            raise await self._with_cause(caller, _handler_error(error), cause) from None
        except TimeoutError:
            if not limit.expired():
                raise
            message = "the operation took longer than the request may"
            raise HandlerError(message, type=HandlerErrorType.REQUEST_TIMEOUT) from None
        except BaseException as error:
            if isinstance(error, Exception) or is_cancellation(error):
                raise
            # SystemExit would end the service, and a CancelledError would close the connection without an answer.
            _log.error(
                "bridge.internal_error", extra={"bridge.error": type(error).__name__}, exc_info=without_text(error)
            )
            message = "internal error"
            raise HandlerError(message, type=HandlerErrorType.INTERNAL) from None
        else:
            if not isinstance(result, StartOperationResultSync):
                message = "an operation that continues after its start must be a workflow"
                raise HandlerError(message, type=HandlerErrorType.NOT_IMPLEMENTED)
            outcome = Outcome.succeeded(await self._result(caller, result.value, context))
        finally:
            cancellation.cancel()
        return Finished(outcome=outcome.within_size_limit(), target=None, links=context.outbound_links)

    async def _result(self, caller: str, value: Any, context: StartOperationContext) -> Payload:
        """Return the encoded *value*. A conversion error is final, because a retry would run the operation again."""
        try:
            payload = self._conversions[caller].payload(value)
        except Exception as error:  # noqa: BLE001 - any error of the team's own converter
            labels = {"bridge.service": context.service, "bridge.operation": context.operation}
            _log.error("bridge.result_unwritable: %s", type(value).__name__, extra=labels, exc_info=without_text(error))
            message = f"the operation's result, a {type(value).__name__}, cannot be converted"
            raise HandlerError(message, type=HandlerErrorType.INTERNAL, retryable_override=False) from None
        finally:
            close_coroutine(value)
        return await self._conversions[caller].close(payload)

    async def _with_cause(self, caller: str, error: HandlerError, cause: BaseException | None) -> HandlerError:
        """Return *error* with *cause* in the form in which it is sent: as an encoded failure."""
        if cause is None or not self._is_writable(caller, cause):
            return error
        with_cause = PeerHandlerError(error.message, type=error.type, retryable_override=error.retryable_override)
        with_cause.remote_cause = Failure()
        await self._converters[caller].encode_failure(cause, with_cause.remote_cause)
        return with_cause

    async def _unsuccessful(self, caller: str, error: OperationError) -> Outcome:
        is_canceled, failure = error.state is OperationErrorState.CANCELED, Failure()
        # A lone surrogate, as in the name of a file, cannot be sent.
        message = error.message.encode(errors="replace").decode()
        failed = ApplicationError(message, type="OperationError", non_retryable=True)
        reason = CancelledError(message) if is_canceled else failed
        reason.__traceback__ = error.__traceback__
        if error.__cause__ is not None and self._is_writable(caller, error.__cause__):
            reason.__cause__ = error.__cause__
        await self._converters[caller].encode_failure(reason, failure)
        return Outcome.canceled(failure) if is_canceled else Outcome.failed(failure)

    def _is_writable(self, caller: str, cause: BaseException) -> bool:
        """Whether *cause* can be converted. If not, it is left out: an error of ours would run the operation again."""
        try:
            converter = self._converters[caller]
            converter.failure_converter.to_failure(cause, converter.payload_converter, Failure())
        except Exception as error:  # noqa: BLE001 - any error of the team's own converter
            _log.error("bridge.result_unwritable: %s", type(cause).__name__, exc_info=without_text(error))
            return False
        return True


class _Input:
    """The input of an operation. nexusrpc calls `consume` with the type that the operation declares."""

    def __init__(
        self, payload: Payload, conversion: Conversion, executor: Executor, authorize: Callable[[Any], Awaitable[None]]
    ) -> None:
        self._payload = payload
        self._conversion = conversion
        self._executor = executor
        self._authorize = authorize

    async def consume(self, as_type: type[Any] | None = None) -> Any:
        value = await self._conversion.read(await self._conversion.open(self._payload), as_type, self._executor)
        await self._authorize(value)
        return value


class _Cancellation(OperationTaskCancellation):
    """Shows a function that still runs that the request is over."""

    def __init__(self) -> None:
        self._in_threads, self._in_loop = threading.Event(), asyncio.Event()

    def cancel(self) -> None:
        self._in_threads.set()
        self._in_loop.set()

    def is_cancelled(self) -> bool:
        return self._in_threads.is_set()

    def cancellation_reason(self) -> str | None:
        return "the request is over" if self.is_cancelled() else None

    def wait_until_cancelled_sync(self, timeout: float | None = None) -> bool:
        return self._in_threads.wait(timeout)

    async def wait_until_cancelled(self) -> None:
        await self._in_loop.wait()


def _handler_error(error: ApplicationError | WorkflowAlreadyStartedError | RPCError) -> HandlerError:
    if isinstance(error, RPCError):
        # Omit the text of an RPC error, which may quote any value. An ApplicationError's text is written for readers.
        message = f"the operation's own call of Temporal failed: {error.status.name}"
        return HandlerError(message, type=error_type(error), retryable_override=False if is_final(error) else None)
    is_retryable = isinstance(error, ApplicationError) and not error.non_retryable
    return HandlerError(error.message, type=HandlerErrorType.INTERNAL, retryable_override=is_retryable)
