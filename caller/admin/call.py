"""The command `callback-bridge call`: run one operation and print its result."""

import asyncio
import json
import sys
import uuid
from datetime import timedelta
from typing import Annotated, Any

import nexusrpc
from cyclopts import Parameter, validators
from temporalio.converter import DataConverter
from temporalio.exceptions import NexusOperationError

from bridge.admin.command import CommandError
from bridge.admin.output import JsonOutput
from bridge.runtime.settings import load
from bridge.runtime.user_modules import import_attribute
from bridge.security.redaction import plain
from caller.client import OperationHandle, create_client
from caller.settings import CallerSettings
from caller.started_operation import describe_target


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
    try:
        value = json.loads(operation_input)
    except ValueError as error:
        message = f"the input is not JSON: {error}"
        raise CommandError(message) from None
    settings, request_id = load(CallerSettings), request_id or str(uuid.uuid4())
    converter = DataConverter.default
    if settings.data_converter is not None:
        converter = import_attribute(settings.data_converter, DataConverter)
    async with create_client(service=service, endpoint=endpoint, settings=settings, data_converter=converter) as client:
        handle: OperationHandle[Any] | None = None
        try:
            handle = await client.start_operation(
                nexusrpc.Operation(name),
                value,
                schedule_to_close_timeout=timedelta(seconds=timeout),
                request_id=request_id,
            )
            print(f"started {plain(describe_target(handle.answer.target if handle.answer else None))}", file=sys.stderr)
            result = await handle.result()
        except asyncio.CancelledError:
            if handle is None:
                print(f"interrupted: repeat with --request-id {request_id} to find the operation", file=sys.stderr)
            else:
                await handle.cancel()
                print(f"canceled: the handler was asked to end {operation}", file=sys.stderr)
            raise
        except NexusOperationError as error:
            causes = _causes(error.cause)
            if as_json:
                print(json.dumps({"error": causes}))
            said = "; caused by ".join(f"{each['type']}: {plain(each['message'])}" for each in causes)
            message = f"{operation} did not succeed: {said}"
            raise CommandError(message) from None
    print(json.dumps({"result": result} if as_json else result, indent=None if as_json else 2, default=str))


def _causes(error: BaseException | None) -> list[dict[str, Any]]:
    """Return the chain of causes. The type is that of an application error, else the name of the error's class."""
    causes = []
    while error is not None:
        kind = getattr(error, "type", None)
        message = getattr(error, "message", str(error))
        causes.append({"type": kind if isinstance(kind, str) else type(error).__name__, "message": message})
        error = error.__cause__
    return causes
