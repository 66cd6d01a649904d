"""A HandlerError as the answer to a failed request: status, headers and body. Sans-I/O."""

from collections.abc import Mapping
from math import ceil

from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.failure.v1 import Failure

from bridge.errors import (
    OutcomeUnknownError,
    PeerHandlerError,
    RemoteProtocolError,
    UnavailableError,
    WaitOverError,
    WrongHandlerError,
)
from bridge.protocol.failure import HANDLER_ERROR_TYPE, WireFailure, decode_failure, encode_failure, parse_failure
from bridge.protocol.headers import REQUEST_RETRYABLE, RETRY_AFTER
from bridge.protocol.payload import CONTENT_TYPE, JSON, is_json
from bridge.security.redaction import redacted

_MARK = "bridge"
_MARKED: dict[str, type[OutcomeUnknownError | WaitOverError | WrongHandlerError]] = {
    "outcome-unknown": OutcomeUnknownError,
    "wait-over": WaitOverError,
    "wrong-handler": WrongHandlerError,
}
"""Errors of the bridge, by the mark in their metadata. The mark distinguishes them from an error of a proxy."""

_MISDIRECTED = 421
_MAX_CAUSE_BYTES = 256 * 1024
"""A larger cause of a failed request is left out, because it would not fit the failure of an activity."""
_MAX_MESSAGE = 2000
"""Maximum number of characters of an error's message; the rest is cut."""

_STATUSES: dict[HandlerErrorType, int] = {
    HandlerErrorType.BAD_REQUEST: 400,
    HandlerErrorType.UNAUTHENTICATED: 401,
    HandlerErrorType.UNAUTHORIZED: 403,
    HandlerErrorType.NOT_FOUND: 404,
    HandlerErrorType.REQUEST_TIMEOUT: 408,
    HandlerErrorType.CONFLICT: 409,
    HandlerErrorType.RESOURCE_EXHAUSTED: 429,
    HandlerErrorType.INTERNAL: 500,
    HandlerErrorType.UNKNOWN: 500,
    HandlerErrorType.NOT_IMPLEMENTED: 501,
    HandlerErrorType.UNAVAILABLE: 503,
    HandlerErrorType.UPSTREAM_TIMEOUT: 520,
}
_TYPES: dict[int, HandlerErrorType] = {
    status: kind for kind, status in _STATUSES.items() if kind is not HandlerErrorType.UNKNOWN
}


def encode_handler_error(error: HandlerError) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request that failed.

    Servers up to 1.30 read the type from the status, later ones from the body. Both must agree.
    """
    headers = {CONTENT_TYPE: JSON}
    # UNKNOWN is only used for errors that were read. It is never written.
    kind = HandlerErrorType.INTERNAL if error.type is HandlerErrorType.UNKNOWN else error.type
    details: dict[str, object] = {"type": kind.value, "retryableOverride": error.retryable}
    if error.retryable_override is not None:
        headers[REQUEST_RETRYABLE] = "true" if error.retryable_override else "false"
    if isinstance(error, UnavailableError):
        headers[RETRY_AFTER] = str(max(1, ceil(error.retry_after.total_seconds())))
    metadata = {"type": HANDLER_ERROR_TYPE}
    for mark, marked in _MARKED.items():
        if isinstance(error, marked):
            metadata[_MARK] = mark
    cause = error.remote_cause if isinstance(error, PeerHandlerError) else None
    body = WireFailure(
        # A message may quote JSON input. JSON can hold lone surrogates, which UTF-8 cannot encode.
        # If the answer were too long for the peer's client, the peer would repeat its request and never see the error.
        message=error.message[:_MAX_MESSAGE].encode(errors="replace").decode(),
        metadata=metadata,
        details=details,
        cause=encode_failure(cause) if cause is not None and cause.ByteSize() <= _MAX_CAUSE_BYTES else None,
    )
    return _MISDIRECTED if isinstance(error, WrongHandlerError) else _STATUSES[kind], headers, body.to_json()


def decode_handler_error(status: int, headers: Mapping[str, str], body: bytes) -> HandlerError:
    """Read the answer to a request that failed.

    If the body names a type, the status is ignored. The message is cut to 1 000 characters and redacted.
    """
    try:
        failure = parse_failure(body) if is_json(headers) else None
    except RemoteProtocolError:
        failure = None
    kind: HandlerErrorType | None = _TYPES.get(status)
    error_class: type[HandlerError] = HandlerError
    override = {"true": True, "false": False}.get(headers.get(REQUEST_RETRYABLE, "").lower())
    message = f"unexpected answer with status {status}" if kind is None else f"answered with status {status}"
    if failure is not None:
        message = redacted(failure.message, 1000) or message
        if failure.kind == HANDLER_ERROR_TYPE and isinstance(failure.details, dict):
            name = failure.details.get("type")
            kind = HandlerErrorType.__members__.get(name, kind) if isinstance(name, str) else kind
            retryable = failure.details.get("retryableOverride")
            override = retryable if isinstance(retryable, bool) else override
            if marked := _MARKED.get(failure.metadata.get(_MARK, "")):
                return marked(message)
            error_class = PeerHandlerError
    if kind is None:
        kind = HandlerErrorType.UNKNOWN
    error = error_class(message, type=kind)
    if override not in {None, error.retryable}:
        # A value that equals the type's default is not an override. Native Nexus shows no override either.
        error = error_class(message, type=kind, retryable_override=override)
    if isinstance(error, PeerHandlerError) and failure is not None:
        error.remote_cause = _cause(failure)
    return error


def _cause(failure: WireFailure) -> Failure | None:
    """The cause of *failure*; None if it has no cause, or one that is unreadable or too large."""
    try:
        cause = None if failure.cause is None else decode_failure(failure.cause, canceled=False)
    except RemoteProtocolError:
        return None
    return cause if cause is not None and cause.ByteSize() <= _MAX_CAUSE_BYTES else None
