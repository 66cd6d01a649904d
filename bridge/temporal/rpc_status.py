"""What the status of a failed call to Temporal means. Pure.

A module that makes a call of its own checks only a status that has a special meaning for this call.
"""

from collections.abc import Mapping

from nexusrpc import HandlerErrorType
from temporalio.api.errordetails.v1 import NamespaceNotFoundFailure
from temporalio.service import RPCError, RPCStatusCode

from bridge.security.redaction import plain

_ERROR_TYPES: Mapping[RPCStatusCode, HandlerErrorType] = {
    RPCStatusCode.INVALID_ARGUMENT: HandlerErrorType.BAD_REQUEST,
    RPCStatusCode.NOT_FOUND: HandlerErrorType.NOT_FOUND,
    RPCStatusCode.UNIMPLEMENTED: HandlerErrorType.NOT_IMPLEMENTED,
    RPCStatusCode.RESOURCE_EXHAUSTED: HandlerErrorType.RESOURCE_EXHAUSTED,
    RPCStatusCode.ABORTED: HandlerErrorType.UNAVAILABLE,
    RPCStatusCode.UNAVAILABLE: HandlerErrorType.UNAVAILABLE,
    RPCStatusCode.DEADLINE_EXCEEDED: HandlerErrorType.UPSTREAM_TIMEOUT,
}
"""What a failed call means for the request that needed it, as in Temporal's own worker. Other statuses: INTERNAL."""
_TEMPORARY = frozenset(
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.ABORTED, RPCStatusCode.RESOURCE_EXHAUSTED, RPCStatusCode.UNKNOWN}
    | {RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED}
    # Refused credentials are a fault of this side, which an operator repairs.
    | {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED}
)
_FINAL = frozenset({RPCStatusCode.ALREADY_EXISTS, RPCStatusCode.FAILED_PRECONDITION, RPCStatusCode.OUT_OF_RANGE})


def refusal(error: RPCError) -> str:
    """Say what Temporal answered instead of doing what was asked for."""
    return f"Temporal answered {error.status.name}: {plain(error.message)}"


def error_type(error: RPCError) -> HandlerErrorType:
    """What *error* means for the request that needed the call."""
    return _ERROR_TYPES.get(error.status, HandlerErrorType.INTERNAL)


def is_temporary(error: RPCError) -> bool:
    """Whether the same call may succeed later: Temporal did not answer, is busy, or refused our credentials."""
    return error.status in _TEMPORARY


def is_final(error: RPCError) -> bool:
    """Whether the same call always fails, although its arguments are valid."""
    return error.status in _FINAL


def is_missing(error: RPCError) -> bool:
    """Whether the run or activity does not exist. False if the namespace does not exist: the settings are wrong."""
    namespace_missing = any(detail.Is(NamespaceNotFoundFailure.DESCRIPTOR) for detail in error.grpc_status.details)
    return error.status is RPCStatusCode.NOT_FOUND and not namespace_missing
