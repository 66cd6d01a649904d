"""Temporal failures as Nexus Failures, and back.

Written in the one form that every server version reads, read from every form that any of them writes: the message
and stack trace at top level, the rest as proto JSON in `details`, the causes inside it. Pure functions.
Source of the rules: Nexus SPEC "Failure", Temporal server `common/nexus/failure.go` of 1.29 to 1.31.
"""

from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError

FAILURE_TYPE = "temporal.api.failure.v1.Failure"
HANDLER_ERROR_TYPE = "nexus.HandlerError"
OPERATION_ERROR_TYPE = "nexus.OperationError"
FOREIGN_FAILURE_TYPE = "NexusFailure"
"""Application error type of a failure from a peer without Temporal, as the server names it."""

MAX_FAILURE_BYTES = 4 * 1024 * 1024
_MAX_CAUSES = 100


class WireFailure(BaseModel):
    """A Nexus Failure as JSON."""

    model_config = ConfigDict(populate_by_name=True, extra="ignore", frozen=True)

    message: str = ""
    stack_trace: str = Field(default="", alias="stackTrace")
    metadata: dict[str, str] = {}
    details: Any = None
    cause: "WireFailure | None" = None

    @property
    def kind(self) -> str:
        return self.metadata.get("type", "")

    def to_json(self) -> bytes:
        return self.model_dump_json(by_alias=True, exclude_defaults=True).encode()


def parse_failure(body: bytes) -> WireFailure:
    """Read the JSON of a Failure.

    Raises:
        RemoteProtocolError: Not JSON, or not a Failure.
    """
    try:
        return WireFailure.model_validate_json(body)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, each["loc"])) or "body" for each in error.errors(include_input=False)[:3])
        message = f"not a Nexus Failure: {fields}"
        raise RemoteProtocolError(message) from None


def encode_failure(failure: Failure) -> WireFailure:
    """Write *failure* so that every server version understands it."""
    bare = Failure()
    bare.CopyFrom(failure)
    _drop_unknown_to_old_servers(bare)
    details = MessageToDict(bare)
    details.pop("message", None)
    return WireFailure(
        message=failure.message, stackTrace=failure.stack_trace, metadata={"type": FAILURE_TYPE}, details=details
    )


def decode_failure(wire: WireFailure, *, canceled: bool) -> Failure:
    """Read the failure of an operation that ended as failed, or as *canceled*.

    Raises:
        RemoteProtocolError: `details` cannot be the failure that they are said to be.
    """
    failure = _decode(wire, canceled=canceled, depth=0)
    if canceled and not failure.HasField("canceled_failure_info"):
        # A canceled operation is a cancellation to its caller, whatever the peer wrapped it in.
        outer = Failure(message=failure.message or "operation canceled")
        outer.canceled_failure_info.SetInParent()
        outer.cause.CopyFrom(failure)
        return outer
    return failure


def _decode(wire: WireFailure, *, canceled: bool, depth: int) -> Failure:
    if depth > _MAX_CAUSES:
        message = "too many causes"
        raise RemoteProtocolError(message)
    failure = Failure()
    match wire.kind:
        case "temporal.api.failure.v1.Failure":
            try:
                ParseDict(wire.details or {}, failure, ignore_unknown_fields=True, max_recursion_depth=4 * _MAX_CAUSES)
            except (ParseError, TypeError, ValueError, AttributeError, RecursionError):
                message = "details are not a temporal failure"
                raise RemoteProtocolError(message) from None
        case "nexus.OperationError":
            if wire.cause is not None:
                return _decode(wire.cause, canceled=canceled, depth=depth + 1)
            if canceled:
                failure.canceled_failure_info.SetInParent()
            else:
                failure.application_failure_info.type = "OperationError"
                failure.application_failure_info.non_retryable = True
        case "nexus.HandlerError":
            details = wire.details if isinstance(wire.details, dict) else {}
            failure.nexus_handler_failure_info.type = str(details.get("type", "INTERNAL"))
        case _ if canceled:
            failure.canceled_failure_info.SetInParent()
        case _:
            failure.application_failure_info.type = FOREIGN_FAILURE_TYPE
            failure.application_failure_info.non_retryable = True
            if wire.details is not None or wire.metadata:
                payload = failure.application_failure_info.details.payloads.add(data=_without_message(wire))
                payload.metadata["encoding"] = b"json/plain"
    failure.message = wire.message
    if wire.stack_trace:
        failure.stack_trace = wire.stack_trace
    if wire.cause is not None and not failure.HasField("cause"):
        failure.cause.CopyFrom(_decode(wire.cause, canceled=False, depth=depth + 1))
    return failure


def _without_message(wire: WireFailure) -> bytes:
    return wire.model_copy(update={"message": "", "cause": None, "stack_trace": ""}).to_json()


def _drop_unknown_to_old_servers(failure: Failure) -> None:
    # Server 1.29 refuses a failure with a field that its own proto lacks, and then starts the operation again and
    # again: `identity` of a cancellation or termination is newer than that.
    # Only what is there is touched: to read a member of a oneof for writing is to choose it.
    if failure.HasField("canceled_failure_info"):
        failure.canceled_failure_info.ClearField("identity")
    if failure.HasField("terminated_failure_info"):
        failure.terminated_failure_info.ClearField("identity")
    if failure.HasField("cause"):
        _drop_unknown_to_old_servers(failure.cause)
