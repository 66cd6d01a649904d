"""Temporal failures as Nexus Failures, and back.

A failure is written in the one form that every server version reads: message and stack trace at the top level, the
rest as proto JSON in `details`, the causes inside `details`. A failure is read from every form that any server version
writes. Pure functions.
Source of the rules: Nexus SPEC "Failure", Temporal server `common/nexus/failure.go` of 1.29 to 1.31.
"""

import contextlib
import json
from itertools import accumulate
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_json
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import NexusHandlerErrorRetryBehavior
from temporalio.api.failure.v1 import CanceledFailureInfo, Failure, TerminatedFailureInfo

from bridge.errors import RemoteProtocolError
from bridge.protocol.payload import MAX_PAYLOADS

FAILURE_TYPE = "temporal.api.failure.v1.Failure"
HANDLER_ERROR_TYPE = "nexus.HandlerError"
OPERATION_ERROR_TYPE = "nexus.OperationError"
FOREIGN_FAILURE_TYPE = "NexusFailure"
"""Application error type of a failure from a peer without Temporal, as Temporal's server names it."""

_MAX_DEPTH = 64
"""Most nested objects and arrays that are read. Protobuf readers, such as the SDK's core, stop at 100 nested messages,
and the messages around a failure count too."""
_MAX_CAUSES = _MAX_DEPTH - 8
"""Most causes that are written. With more, a reader would refuse the message and the outcome would be lost. The objects
around a failure and inside the last cause count too."""
_MAX_TOKENS = 32 * MAX_PAYLOADS
"""Most structural characters outside of strings, and most quotes. 1 000 payloads need less than half of them."""
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"{}[],'))
_RETRY_BEHAVIORS = {
    True: NexusHandlerErrorRetryBehavior.NEXUS_HANDLER_ERROR_RETRY_BEHAVIOR_RETRYABLE,
    False: NexusHandlerErrorRetryBehavior.NEXUS_HANDLER_ERROR_RETRY_BEHAVIOR_NON_RETRYABLE,
}


class WireFailure(BaseModel):
    """A Nexus Failure as JSON (Nexus SPEC "Failure")."""

    model_config = ConfigDict(populate_by_name=True, extra="ignore", frozen=True)

    message: str = ""
    """Text for people."""
    stack_trace: str = Field(default="", alias="stackTrace")
    """Where the failure was raised, as text."""
    metadata: dict[str, str] = {}
    """Names by which a reader finds the form of `details`; the key `type` names the kind."""
    details: Any = None
    """JSON value whose form depends on the kind."""
    cause: "WireFailure | None" = None
    """The failure that caused this one."""

    @property
    def kind(self) -> str:
        """The `type` in the metadata, empty if it is missing."""
        return self.metadata.get("type", "")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        # Go's reader treats null as an absent member.
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value

    def to_json(self) -> bytes:
        """The JSON of this failure, without members that have their default."""
        # `message` is the one required member, also when it is empty.
        members = {"message": self.message} | self.model_dump(by_alias=True, exclude_defaults=True)
        return to_json(members, inf_nan_mode="null")


def parse_failure(body: bytes) -> WireFailure:
    """Read the JSON of a Failure.

    Raises:
        RemoteProtocolError: Not JSON, not a Failure, too deep, or too many values.
    """
    _refuse_large_structure(body)
    with contextlib.suppress(ValidationError):
        return WireFailure.model_validate_json(body)
    try:
        return WireFailure.model_validate_json(_without_half_characters(body))
    except ValidationError as error:
        # Show only the outermost name, a member of `WireFailure`. The peer may have chosen the names below it.
        fields = ", ".join(sorted({str(each["loc"][0]) if each["loc"] else "body" for each in error.errors()}))
        message = f"not a Nexus Failure: {fields}"
        raise RemoteProtocolError(message) from None


def _without_half_characters(body: bytes) -> bytes:
    """*body* without the halves of characters that JavaScript leaves when it cuts a text."""
    try:
        return json.dumps(json.loads(body.decode(errors="replace")), ensure_ascii=False).encode(errors="replace")
    except ValueError:
        return body


def _refuse_large_structure(body: bytes) -> None:
    """Refuse a *body* that would take long to parse: a few bytes of JSON become a large object."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    message = f"not a Nexus Failure: over {_MAX_TOKENS} values, or more than {_MAX_DEPTH} deep"
    if unescaped.count(b'"') > _MAX_TOKENS:
        # The split below would itself take long.
        raise RemoteProtocolError(message)
    structure = b"".join(unescaped.translate(None, _NOT_STRUCTURE).split(b'"')[::2])
    steps = (1 if each in b"{[" else -1 for each in structure if each != ord(","))
    if len(structure) > _MAX_TOKENS or max(accumulate(steps), default=0) > _MAX_DEPTH:
        raise RemoteProtocolError(message)


def encode_failure(failure: Failure) -> WireFailure:
    """Write *failure* in the form that every server version reads."""
    bare = Failure()
    bare.CopyFrom(failure)
    _drop_unknown_to_old_servers(bare)
    last = bare
    for _ in range(_MAX_CAUSES):
        if not last.HasField("cause"):
            break
        last = last.cause
    if last.HasField("cause"):
        last.CopyFrom(Failure(message="further causes were left out"))
    details = MessageToDict(bare)
    details.pop("message", None)
    return WireFailure(
        message=failure.message, stackTrace=failure.stack_trace, metadata={"type": FAILURE_TYPE}, details=details
    )


def decode_failure(wire: WireFailure, *, canceled: bool) -> Failure:
    """Read the failure of an operation that ended failed, or *canceled*.

    Raises:
        RemoteProtocolError: `details` do not fit the kind.
    """
    failure = _decode(wire, canceled=canceled)
    if canceled and not failure.HasField("canceled_failure_info"):
        # The caller must see a cancellation, also if the peer sent a failure of another kind.
        outer = Failure(message=failure.message or "operation canceled")
        outer.canceled_failure_info.SetInParent()
        outer.cause.CopyFrom(failure)
        return outer
    return failure


def _decode(wire: WireFailure, *, canceled: bool) -> Failure:
    if wire.kind == OPERATION_ERROR_TYPE and wire.cause is not None:
        return _decode(wire.cause, canceled=canceled)
    failure = Failure()
    match wire.kind:
        case "temporal.api.failure.v1.Failure":
            failure = _parse_details(wire.details or {})
        case "nexus.OperationError" if not canceled:
            failure.application_failure_info.type = "OperationError"
            failure.application_failure_info.non_retryable = True
        case "nexus.OperationError":
            failure.canceled_failure_info.SetInParent()
        case "nexus.HandlerError":
            details = wire.details if isinstance(wire.details, dict) else {}
            failure.nexus_handler_failure_info.type = str(details.get("type", "INTERNAL"))
            if isinstance(retryable := details.get("retryableOverride"), bool):
                failure.nexus_handler_failure_info.retry_behavior = _RETRY_BEHAVIORS[retryable]
        case _:
            failure = _foreign(wire, canceled=canceled)
    failure.message = wire.message
    if wire.stack_trace:
        failure.stack_trace = wire.stack_trace
    if wire.cause is not None and not failure.HasField("cause"):
        failure.cause.CopyFrom(_decode(wire.cause, canceled=False))
    return failure


def _parse_details(details: Any) -> Failure:
    try:
        return ParseDict(details, Failure(), ignore_unknown_fields=True)
    except (ParseError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError):
        message = "details are not a temporal failure"
        raise RemoteProtocolError(message) from None


def _foreign(wire: WireFailure, *, canceled: bool) -> Failure:
    failure = Failure()
    if canceled:
        failure.canceled_failure_info.SetInParent()
    else:
        failure.application_failure_info.type = FOREIGN_FAILURE_TYPE
        failure.application_failure_info.non_retryable = True
    if wire.details is not None or wire.metadata:
        # Members without a field in the proto become details, as in Temporal's server.
        rest = wire.model_dump(by_alias=True, exclude_defaults=True, exclude={"message", "cause", "stack_trace"})
        info = failure.canceled_failure_info if canceled else failure.application_failure_info
        info.details.payloads.add(metadata={"encoding": b"json/plain"}, data=to_json(rest, inf_nan_mode="null"))
    return failure


def _drop_unknown_to_old_servers(message: Message) -> None:
    # Server 1.29 refuses a failure with a field that its own proto lacks, and then starts the operation again and
    # again. Two fields are newer than 1.29: `identity` of a cancellation or termination, and `external_payloads`.
    # Visit only fields that are set: protobuf sets a member of a oneof when it is accessed for writing.
    if isinstance(message, CanceledFailureInfo | TerminatedFailureInfo):
        message.ClearField("identity")
    if isinstance(message, Payload):
        message.ClearField("external_payloads")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            # `field.is_repeated` does not exist before protobuf 6.31.
            for each in [value] if isinstance(value, Message) else value:
                _drop_unknown_to_old_servers(each)
