"""Endpoints: encode an input, send requests to the handler behind an endpoint's name, and read the answers."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nexusrpc import HandlerError
from temporalio.api.common.v1 import Payload
from temporalio.converter import DataConverter

from bridge.errors import (
    BridgeError,
    DestinationBusyError,
    OutcomeUnknownError,
    PeerHandlerError,
    bad_request,
    not_found,
)
from bridge.http.client import REQUEST_TIMEOUT, HttpClient
from bridge.http.peer_client import PeerClient
from bridge.protocol.answers import Answer, Meaning, Sent
from bridge.protocol.cancel import CancelRequest, encode_cancel
from bridge.protocol.headers import LINK
from bridge.protocol.payload import MAX_PAYLOAD_BYTES
from bridge.protocol.start import StartAnswer, StartRequest, decode_answer, encode_start
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.tracing import trace_headers
from bridge.security.signatures import MessageSigner
from caller.settings import CallerSettings, Endpoint, HandlerPeer

T = TypeVar("T")

_log = event_logger(__name__)

MAY_HAVE_STARTED = " (an earlier attempt may have started the operation)"
"""Added to a refusal of a later attempt: an earlier one may have started the operation without a signed answer."""


class NotStartedError(BridgeError):
    """The handler gave no answer that shows the state of the operation."""

    def __init__(self, reason: BridgeError | HandlerError, *, retry_after: timedelta | None) -> None:
        super().__init__(str(reason))
        self.reason = reason
        """Final if it is a HandlerError that is not retryable: the handler itself refused. Other reasons may pass."""
        self.retry_after = retry_after
        """Delay that the handler asked for (`Retry-After`); None if it asked for none."""

    def final_reason(self, *, is_refusal_final: bool) -> HandlerError | None:
        """Return the reason if no further request can help; None if one may.

        Pass false for the renewal of an operation that is known to run: a wrong key must not fail a healthy payment.
        Only OutcomeUnknownError then is final, because it says that the outcome is lost.
        """
        reason = self.reason
        if isinstance(reason, HandlerError) and not reason.retryable and is_refusal_final:
            return reason
        return reason if isinstance(reason, OutcomeUnknownError) else None


@dataclass(frozen=True, kw_only=True)
class ResolvedEndpoint:
    """Where calls through one endpoint go."""

    endpoint: Endpoint
    """Settings of the endpoint."""
    peer: HandlerPeer
    """Settings of the handler behind it."""
    signer: MessageSigner
    """Signs the requests to that handler."""


class Endpoints:
    """The configured endpoints of one caller."""

    def __init__(
        self,
        settings: CallerSettings,
        *,
        keys: LiveKeys,
        http: HttpClient,
        metrics: Metrics,
    ) -> None:
        self._resolved: dict[str, ResolvedEndpoint] = {}
        for name, endpoint in settings.endpoints.items():
            peer = settings.handlers[endpoint.handler]
            signer = MessageSigner(keys(f"handlers.{endpoint.handler}.start_keys"))
            self._resolved[name] = ResolvedEndpoint(endpoint=endpoint, peer=peer, signer=signer)
        self._http = http
        self._peers = PeerClient(http, metrics=metrics)

    def log_not_reached(
        self, name: str, error: NotStartedError, *, request_id: str, attempt: int, wanted: timedelta
    ) -> None:
        """Log why *attempt* of a call did not reach its handler. The next attempt begins after *wanted*."""
        host = "?"
        with contextlib.suppress(HandlerError):
            host = urlsplit(self.resolve(name).endpoint.url).netloc
        extra = {
            "bridge.request_id": request_id,
            "bridge.endpoint": name,
            "bridge.host": host,
            "bridge.attempt": attempt,
            "bridge.reason": str(error),
            "bridge.next_s": round(wanted.total_seconds(), 1),
        }
        _log.warning("bridge.handler_not_reached", extra=extra)

    async def start(
        self, name: str, request: StartRequest, operation_input: Any, converter: DataConverter, *, remaining: timedelta
    ) -> StartAnswer:
        """POST a start with a fresh signature, and read the answer. *converter* encodes the input.

        Raises:
            NotStartedError: The handler was not reached, or it refused; `reason` shows which.
            nexusrpc.HandlerError: There is no such endpoint, the input is too large, or the start has a form that
                cannot be sent.
        """
        resolved = self.resolve(name)
        endpoint, payload = resolved.endpoint, await encode_input(operation_input, converter, resolved.peer)
        if request.wait is not None and self._http.is_half_full(endpoint.url, endpoint.route, peer=endpoint.handler):
            # Held starts must leave places for others. This start is answered at once, and its callback comes later.
            request = dataclasses.replace(request, wait=None)
        timeout = min(REQUEST_TIMEOUT + (request.wait or timedelta(0)), remaining)
        message = encode_start(request, payload, request_timeout=timeout)
        is_first, more = request.attempt == 1, request.headers
        return await self._send(name, Sent.START, message, _started, more=more, timeout=timeout, is_first=is_first)

    async def cancel(self, name: str, request: CancelRequest, *, remaining: timedelta) -> None:
        """POST a cancel request. Returns when the handler has accepted it.

        Raises:
            NotStartedError: The handler was not reached, or it refused; `reason` shows which.
            nexusrpc.HandlerError: There is no such endpoint, or the request has a form that cannot be sent.
        """
        timeout = min(REQUEST_TIMEOUT, remaining)
        message = encode_cancel(request, request_timeout=timeout)
        await self._send(name, Sent.CANCEL, message, lambda _: None, more=request.headers, timeout=timeout)

    async def _send(
        self,
        name: str,
        sent: Sent,
        message: tuple[str, dict[str, str], bytes],
        decode: Callable[[Answer], T],
        *,
        more: Iterable[str] = (),
        timeout: timedelta,  # noqa: ASYNC109 - passed to the HTTP client
        is_first: bool = True,
    ) -> T:
        resolved = self.resolve(name)
        path, headers, body = message
        if resolved.peer.trace != "off":
            headers = headers | trace_headers()
        try:
            answer = await self._peers.post(
                *(sent, resolved.endpoint.handler, resolved.endpoint.url + path, headers, body),
                signer=resolved.signer,
                answers=resolved.peer.answers,
                more=more,
                route=resolved.endpoint.route,
                timeout=timeout,
                is_first=is_first,
            )
            if answer.error is None:
                return decode(answer)
        except ValueError:
            text = "this call cannot be signed: a header or name is not ASCII"
            raise bad_request(text) from None
        except BridgeError as error:
            busy_for = error.retry_after if isinstance(error, DestinationBusyError) else None
            raise NotStartedError(error, retry_after=busy_for) from None
        if answer.meaning is Meaning.REFUSED and not is_first:
            _add_that_it_may_run(answer.error)
        raise NotStartedError(answer.error, retry_after=answer.retry_after)

    def resolve(self, name: str) -> ResolvedEndpoint:
        """Return the settings and the signer behind endpoint *name*.

        Raises:
            nexusrpc.HandlerError: NOT_FOUND, no such endpoint in the settings.
        """
        if (resolved := self._resolved.get(name)) is None:
            message = f"no endpoint {name!r} in the caller's settings (known: {', '.join(self._resolved)})"
            raise not_found(message)
        return resolved


def _started(answer: Answer) -> StartAnswer:
    return decode_answer(answer.status, answer.headers, answer.headers.getall(LINK, []), answer.body)


def _add_that_it_may_run(reason: BridgeError | HandlerError) -> None:
    if isinstance(reason, HandlerError) and not isinstance(reason, OutcomeUnknownError):
        reason.message = f"{reason.message}{MAY_HAVE_STARTED}"
        reason.args = (reason.message,)


async def encode_input(operation_input: Any, converter: DataConverter, peer: HandlerPeer) -> Payload:
    """Return an operation's input as it is sent to *peer*.

    Raises:
        nexusrpc.HandlerError: BAD_REQUEST, the input is too large.
    """
    # The worker has decoded the input with our codec and fetched it from external storage. Encode it again to send it.
    if not peer.shares_storage:
        converter = dataclasses.replace(converter, external_storage=None)
    [payload] = await converter.encode([operation_input])
    if payload.ByteSize() > MAX_PAYLOAD_BYTES:
        message = f"the operation's input of {payload.ByteSize()} bytes is over the limit of {MAX_PAYLOAD_BYTES}"
        raise bad_request(message)
    return payload


async def explain(reason: Exception, converter: DataConverter) -> None:
    """Decode the cause that the handler sent with its refusal, and chain it. Our worker then encodes it again."""
    if not isinstance(reason, PeerHandlerError) or reason.remote_cause is None:
        return
    try:
        reason.__cause__ = await converter.decode_failure(reason.remote_cause)
    except Exception as error:  # noqa: BLE001 - any error of our own converter and codec over the peer's value
        _log.info("bridge.cause_unreadable", extra={"bridge.error": type(error).__name__})
