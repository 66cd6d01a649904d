"""The start of an operation: its request and all its answers. Sans-I/O."""

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
    """A start, without the operation's input."""

    service: str
    """Name of the service."""
    operation: str
    """Name of the operation."""
    request_id: str
    """Id of the call, 1 to 255 printable characters, the same on every repeat."""
    callback_url: str | None
    """Where to POST the outcome, byte for byte; None if the caller cannot be reached."""
    callback_headers: Mapping[str, str] = field(default_factory=dict)
    """Headers to send with the completion, by their names without the prefix `Nexus-Callback-`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """The headers that the caller's workflow set. After decoding also the protocol's own, by lower-case names."""
    links: Sequence[nexusrpc.Link] = ()
    """Links to the caller's workflow."""
    operation_timeout: timedelta | None = None
    """How much longer the caller waits for the operation; None if it did not set a limit."""
    scheduled_time: datetime | None = None
    """When the caller's workflow scheduled the operation, UTC; None from a peer without the bridge."""
    attempt: int = 1
    """1 if no earlier start of the call can have had an effect; above 1 for a renewal. The handler only shows it."""
    operation_token: str | None = None
    """The token of the 201 that the call has received; None before. A handler that did not issue it starts nothing."""
    wait: timedelta | None = None
    """How long the handler may hold the start to answer with the outcome; whole seconds, None for not at all."""


@dataclass(frozen=True, kw_only=True)
class Running:
    """Answer 201: the operation is running."""

    operation_token: str
    """The handler's name for the operation."""
    target: WorkflowRef | None
    """The run that carries the operation out; None from a peer without Temporal."""
    progress: Payload | None = None
    """The latest progress of the target, undecoded. An extension of the bridge that other readers ignore."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Answer 200 or 424: the operation has ended."""

    outcome: Outcome
    """How the operation ended."""
    target: WorkflowRef | None
    """The run that ended; None from a peer without Temporal, or for a synchronous operation."""
    links: Sequence[nexusrpc.Link] = ()
    """Further links. Sent, but not read back."""


StartAnswer = Running | Finished

_ANSWER_TIME = timedelta(seconds=1)
"""Part of the sender's request timeout that is reserved for sending the answer."""


class OperationInfo(BaseModel):
    """Body of an answer 201 (Nexus SPEC, "Start Operation")."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    token: str
    """The operation token."""
    state: str
    """Always `running` in a valid answer."""
    progress: Base64Bytes | None = None
    """A serialized payload with the latest progress of the target. An extension of the bridge."""


def encode_start(
    request: StartRequest, payload: Payload, *, request_timeout: timedelta
) -> tuple[str, dict[str, str], bytes]:
    """Path and query below the endpoint's URL, headers, and body. The handler has *request_timeout* to answer."""
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
    if request.operation_token is not None:
        headers[wire.OPERATION_TOKEN] = request.operation_token
    if request.wait is not None:
        headers[wire.PREFER] = wire.encode_wait(request.wait)
    path = wire.operation_path(request.service, request.operation)
    if request.callback_url is not None:
        path += f"?callback={quote(request.callback_url, safe='')}"
    return path, headers, body


def decode_start(
    service: str, operation: str, *, callback_url: str | None, headers: Mapping[str, str], links: Sequence[str]
) -> StartRequest:
    """Read the headers of a start. If the start is signed, pass only the signed headers.

    Raises:
        RemoteProtocolError: The request id is missing, or a header of the protocol is unreadable.
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
        operation_token=headers.get(wire.OPERATION_TOKEN),
        wait=_wait(headers),
    )


def _wait(headers: Mapping[str, str]) -> timedelta | None:
    """How long to hold the start: less than its request timeout; None for not at all."""
    wait = wire.decode_wait(headers.get(wire.PREFER, ""))
    request_timeout = wire.decode_duration(headers.get(wire.REQUEST_TIMEOUT, ""))
    if wait is None or request_timeout is None:
        return wait
    room = request_timeout - _ANSWER_TIME
    return min(wait, room) if room > timedelta(0) else None


def encode_answer(answer: StartAnswer) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a start."""
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
        # Nexus SPEC deprecates this header, but server 1.29 retries a 424 without it.
        headers[wire.OPERATION_STATE] = answer.outcome.state.value
    links = [] if answer.target is None else [answer.target.to_link()]
    if isinstance(answer, Finished):
        links += answer.links
    if encoded := encode_links(links):
        headers[wire.LINK] = encoded
    return status, headers, body


def decode_answer(status: int, headers: Mapping[str, str], links: Sequence[str], body: bytes) -> StartAnswer:
    """Read the answer to a start that `answers.read_answer` found to hold an outcome or a running operation.

    Raises:
        RemoteProtocolError: The answer breaks the protocol.
    """
    target = WorkflowRef.from_links(decode_links(links))
    if status == 201:
        try:
            info = OperationInfo.model_validate_json(body)
        except ValidationError:
            message = "status 201 without an operation token"
            raise RemoteProtocolError(message) from None
        if info.state != "running" or not wire.OPERATION_TOKEN_TEXT.fullmatch(info.token):
            message = "status 201 without a usable operation token"
            raise RemoteProtocolError(message)
        return Running(operation_token=info.token, target=target, progress=_progress(info.progress))
    state = OperationState.SUCCEEDED
    if status == 424:
        state = wire.require_state(headers.get(wire.OPERATION_STATE) or _state_in(body))
        if state is OperationState.SUCCEEDED:
            message = "status 424 with state succeeded"
            raise RemoteProtocolError(message)
    return Finished(outcome=decode_outcome(state, headers, body), target=target)


def _state_in(body: bytes) -> str:
    # In Nexus SPEC the header is optional: the details of an OperationError name the state.
    failure = parse_failure(body)
    details = failure.details if failure.kind == OPERATION_ERROR_TYPE and isinstance(failure.details, dict) else {}
    return str(details.get("state", OperationState.FAILED.value))


def _progress(serialized: bytes | None) -> Payload | None:
    """The payload in *serialized*. No decision depends on progress, therefore None if it is unreadable."""
    try:
        return None if serialized is None else Payload.FromString(serialized)
    except DecodeError:
        return None
