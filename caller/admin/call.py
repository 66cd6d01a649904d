"""The command `callback-bridge call`: run one operation and print its result."""

import asyncio
import base64
import contextlib
import json
import sys
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Annotated, Any

import nexusrpc
from cyclopts import Parameter, validators
from nexusrpc import HandlerError
from temporalio.converter import DataConverter
from temporalio.exceptions import ApplicationError, NexusOperationError

from bridge.admin.command import CommandError
from bridge.admin.output import JsonOutput
from bridge.protocol.start import Running
from bridge.runtime.settings import load
from bridge.runtime.user_modules import import_attribute
from bridge.security.redaction import plain
from bridge.workflow.call import MAX_DURATION
from caller.client import create_client
from caller.settings import CallerSettings
from caller.waiting.started_operation import describe_target

_CANCEL_S = 10
"""Time to reach the handler after Ctrl-C."""


async def call(
    endpoint: str,
    operation: str,
    operation_input: str = "null",
    /,
    *,
    timeout: Annotated[float, Parameter(validator=validators.Number(gt=0))] = 86400,  # noqa: ASYNC109 - an option
    request_id: str | None = None,
    as_json: JsonOutput = False,
) -> None:
    """Run an operation and print its result as JSON. BRIDGE_CONFIG names the caller's settings.

    Ctrl-C cancels the operation. With a longer operation the target workflow is printed on standard error.

    Args:
        endpoint: Name of the endpoint in the settings.
        operation: Service/operation.
        operation_input: The input as JSON.
        timeout: Longest wait in seconds. The operation goes on afterwards.
        request_id: Id of the call. A repeated call with the same id and input finds the same operation.
    """
    service, _, name = operation.partition("/")
    if not (service and name):
        message = f"an operation has the form Service/operation, not {operation!r}"
        raise CommandError(message)
    try:
        value = json.loads(operation_input)
    except (ValueError, RecursionError) as error:
        message = f"the input is not JSON: {error}"
        raise CommandError(message) from None
    settings, converter = load(CallerSettings), DataConverter.default
    if settings.data_converter is not None:
        converter = import_attribute(settings.data_converter, DataConverter)
    async with create_client(service=service, endpoint=endpoint, settings=settings, data_converter=converter) as client:
        limit = timedelta(seconds=min(MAX_DURATION.total_seconds(), timeout))
        chosen = request_id or str(uuid.uuid4())
        handle = client.prepare(
            nexusrpc.Operation[Any, Any](name), value, schedule_to_close_timeout=limit, request_id=chosen
        )
        try:
            with _errors_reported(operation, as_json=as_json):
                await handle.ask()
            if isinstance(handle.answer, Running):
                print(f"started {describe_target(handle.answer.target)}", file=sys.stderr)
            elif handle.answer is not None and handle.answer.target is not None:
                print(f"{describe_target(handle.answer.target)} has ended", file=sys.stderr)
            with _errors_reported(operation, as_json=as_json):
                result = await handle.result()
        except asyncio.CancelledError:
            said = f"interrupted: repeat it with --request-id {chosen} to find the operation"
            with contextlib.suppress(TimeoutError, NexusOperationError):
                async with asyncio.timeout(_CANCEL_S):
                    await handle.cancel()
                if handle.answer is not None:
                    said = f"canceled: the handler was asked to end {operation}"
            print(said, file=sys.stderr)
            raise
    print(json.dumps({"result": result} if as_json else result, indent=None if as_json else 2, default=_printable))


@contextlib.contextmanager
def _errors_reported(operation: str, *, as_json: bool) -> Iterator[None]:
    """Raise a CommandError for a failed operation, and for a value that cannot be converted."""
    try:
        yield
    except NexusOperationError as error:
        causes = list(_causes(error.cause))
        if as_json:
            print(json.dumps({"error": causes}))
        said = "; caused by ".join(f"{plain(each['type'])}: {plain(each['message'])}" for each in causes)
        message = f"{operation} did not succeed: {said}"
        raise CommandError(message) from None
    except Exception as error:  # any error of the team's codec and converter
        message = (
            f"{operation}: the input or the result cannot be converted ({type(error).__name__}); `data_converter` in "
            "the settings has to name the converter of the workers"
        )
        raise CommandError(message) from error


def _printable(value: object) -> str:
    """Return a result that JSON has no form for: bytes as base64, any other value as its text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _causes(error: BaseException | None) -> Iterator[dict[str, str]]:
    """Yield the chain of causes, each with its own type. An error that has none gets the name of its class."""
    while error is not None:
        kind = type(error).__name__
        if isinstance(error, HandlerError):
            kind = error.type.name
        elif isinstance(error, ApplicationError):
            kind = error.type or kind
        yield {"type": kind, "message": getattr(error, "message", str(error))}
        error = error.__cause__
