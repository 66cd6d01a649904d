"""The start of an operation: its request and every answer it can get. Sans-I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from urllib.parse import quote

import nexusrpc
from google.protobuf.message import DecodeError
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError
from temporalio.api.common.v1 import Payload

from bridge.errors import RemoteProtocolError
from bridge.protocol import headers as wire
from bridge.protocol.failure import OPERATION_ERROR_TYPE, parse_failure
from bridge.protocol.headers import OperationState
from bridge.protocol.link import WorkflowRef, decode_links, encode_links
from bridge.protocol.outcome import Outcome, decode_outcome, encode_outcome
from bridge.protocol.payload import CONTENT_TYPE, JSON, encode_payload


@dataclass(frozen=True, kw_only=True)
class StartRequest:
    """What a start says, beside the input's content."""

    service: str
    operation: str
    request_id: str
    callback_url: str | None
    """Where to POST the outcome, byte for byte; None if the caller cannot be reached."""
    callback_headers: Mapping[str, str] = field(default_factory=dict)
    """To be sent with the completion, without their prefix."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The caller's own."""
    links: Sequence[nexusrpc.Link] = ()
    operation_timeout: timedelta | None = None
    """How long the caller is still willing to wait."""
    scheduled_time: datetime | None = None
    attempt: int = 1
    wait: timedelta | None = None
    """How long the caller would wait for the outcome in the answer; whole seconds."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Answer 201: the operation goes on."""

    operation_token: str
    target: WorkflowRef | None
    progress: Payload | None = None
    """What the target last reported, undecoded. Ours: a key that other readers of the answer ignore."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Answer 200 or 424: the operation has ended."""

    outcome: Outcome
    target: WorkflowRef | None
    links: Sequence[nexusrpc.Link] = ()
    """Further links; not read back."""


StartAnswer = Running | Finished

_ANSWER_TIME = timedelta(seconds=1)
"""Kept back of the time in which the sender wants an answer."""


class OperationInfo(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    token: str
    state: str
    progress: Base64Bytes | None = None
    """A serialized payload."""


def encode_start(
    request: StartRequest, payload: Payload, *, request_timeout: timedelta
) -> tuple[str, dict[str, str], bytes]:
    """Path and query below the endpoint's URL, headers, body."""
    headers, body = encode_payload(payload)
    headers |= {name.lower(): value for name, value in request.headers.items()}
    headers |= {f"{wire.CALLBACK_PREFIX}{name}": value for name, value in request.callback_headers.items()}
    headers[wire.REQUEST_ID] = request.request_id
    headers[wire.REQUEST_TIMEOUT] = wire.encode_duration(request_timeout)
    headers[wire.ATTEMPT] = str(request.attempt)
    if links := encode_links(request.links):
        headers[wire.LINK] = links
    if request.operation_timeout is not None:
        headers[wire.OPERATION_TIMEOUT] = wire.encode_duration(request.operation_timeout)
    if request.scheduled_time is not None:
        headers[wire.SCHEDULED_TIME] = wire.encode_instant(request.scheduled_time)
    if request.wait is not None:
        headers[wire.PREFER] = wire.encode_wait(request.wait)
    path = wire.operation_path(request.service, request.operation)
    if request.callback_url is not None:
        path += f"?callback={quote(request.callback_url, safe='')}"
    return path, headers, body


def decode_start(
    service: str, operation: str, *, callback_url: str | None, headers: Mapping[str, str], links: Sequence[str]
) -> StartRequest:
    """Read the headers of a start; only what the peer vouches for belongs into *headers*.

    Raises:
        RemoteProtocolError: No request id, or a header of the protocol that cannot be read.
    """
    request_id = headers.get(wire.REQUEST_ID, "")
    if not 0 < len(request_id) <= 255 or not request_id.isprintable():
        message = f"{wire.REQUEST_ID} is missing, or not 1 to 255 printable characters"
        raise RemoteProtocolError(message)
    if wire.REQUEST_TIMEOUT in headers and wire.decode_duration(headers[wire.REQUEST_TIMEOUT]) is None:
        message = f"{wire.REQUEST_TIMEOUT} is not a duration"
        raise RemoteProtocolError(message)
    scheduled_time = None
    if wire.SCHEDULED_TIME in headers:
        scheduled_time = wire.decode_instant(headers[wire.SCHEDULED_TIME])
        if scheduled_time is None:
            message = f"{wire.SCHEDULED_TIME} is not an RFC 3339 time"
            raise RemoteProtocolError(message)
    attempt = headers.get(wire.ATTEMPT, "1")
    prefix = wire.CALLBACK_PREFIX.lower()
    lower = {name.lower(): value for name, value in headers.items()}
    return StartRequest(
        service=service,
        operation=operation,
        request_id=request_id,
        callback_url=callback_url,
        callback_headers={name.removeprefix(prefix): value for name, value in lower.items() if name.startswith(prefix)},
        headers={name: value for name, value in lower.items() if not name.startswith((prefix, "content-"))},
        links=decode_links(links),
        operation_timeout=wire.decode_duration(headers.get(wire.OPERATION_TIMEOUT, "")),
        scheduled_time=scheduled_time,
        attempt=int(attempt) if attempt.isdecimal() and len(attempt) < 10 else 1,
        wait=_wait(headers),
    )


def _wait(headers: Mapping[str, str]) -> timedelta | None:
    """How long to hold the start: no longer than its sender waits for any answer."""
    wait = wire.decode_wait(headers.get(wire.PREFER, ""))
    request_timeout = wire.decode_duration(headers.get(wire.REQUEST_TIMEOUT, ""))
    if wait is None or request_timeout is None:
        return wait
    room = request_timeout - _ANSWER_TIME
    return min(wait, room) if room > timedelta(0) else None


def encode_answer(answer: StartAnswer) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    if isinstance(answer, Running):
        status, headers = 201, {CONTENT_TYPE: JSON}
        info = OperationInfo.model_construct(
            token=answer.operation_token,
            state="running",
            progress=None if answer.progress is None else answer.progress.SerializeToString(),
        )
        body = info.model_dump_json(exclude_none=True).encode()
    else:
        status = 200 if answer.outcome.state is OperationState.SUCCEEDED else 424
        headers, body = encode_outcome(answer.outcome)
        # The spec calls it deprecated; server 1.29 retries a 424 that lacks it.
        headers[wire.OPERATION_STATE] = answer.outcome.state.value
    links = [] if answer.target is None else [answer.target.to_link()]
    if isinstance(answer, Finished):
        links += answer.links
    if encoded := encode_links(links):
        headers[wire.LINK] = encoded
    return status, headers, body


def decode_answer(status: int, headers: Mapping[str, str], links: Sequence[str], body: bytes) -> StartAnswer:
    """Read the answer to a start.

    Raises:
        nexusrpc.HandlerError: The request failed.
        RemoteProtocolError: The answer is none of the protocol's.
    """
    target = WorkflowRef.from_links(decode_links(links))
    match status:
        case 200:
            return Finished(outcome=decode_outcome(OperationState.SUCCEEDED, headers, body), target=target)
        case 424:
            state = wire.require_state(headers.get(wire.OPERATION_STATE) or _told_state(body))
            if state is OperationState.SUCCEEDED:
                message = "status 424 with state succeeded"
                raise RemoteProtocolError(message)
            return Finished(outcome=decode_outcome(state, headers, body), target=target)
        case 201:
            try:
                info = OperationInfo.model_validate_json(body)
            except ValidationError:
                message = "status 201 without an operation token"
                raise RemoteProtocolError(message) from None
            if info.state != "running" or not 0 < len(info.token) <= wire.MAX_OPERATION_TOKEN:
                message = "status 201 without a usable operation token"
                raise RemoteProtocolError(message)
            return Running(operation_token=info.token, target=target, progress=_progress(info.progress))
        case _:
            raise wire.decode_handler_error(status, headers, body)


def _told_state(body: bytes) -> str:
    # The spec's own form needs no header: its OperationError names the state in its details.
    failure = parse_failure(body)
    details = failure.details if failure.kind == OPERATION_ERROR_TYPE and isinstance(failure.details, dict) else {}
    return str(details.get("state", OperationState.FAILED.value))


def _progress(serialized: bytes | None) -> Payload | None:
    """Progress is never essential: what cannot be read is left out."""
    try:
        return None if serialized is None else Payload.FromString(serialized)
    except DecodeError:
        return None
