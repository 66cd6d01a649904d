"""Sends messages to callback URLs: only to allowed ones, and signed for the caller."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from temporalio.converter import DataConverter

from bridge.errors import BridgeError, DestinationBusyError, DestinationRefusedError
from bridge.http.client import REQUEST_TIMEOUT, HttpClient
from bridge.http.peer_client import PeerClient
from bridge.http.route import Route
from bridge.protocol.answers import Answer, Meaning, Sent
from bridge.protocol.completion import Completion, encode_completion
from bridge.protocol.echo import decode_echo
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.tracing import TRACEPARENT, span, trace_headers
from bridge.security.egress import allowed_destination
from bridge.security.signatures import MessageSigner
from handler.delivery.close_event import CloseEvent, sendable
from handler.delivery.records import Delivery
from handler.settings import HandlerSettings

_NO_PATIENCE = timedelta(0)
_log = event_logger(__name__)
_ECHO_TIMEOUT = REQUEST_TIMEOUT / 2
"""The caller waits `REQUEST_TIMEOUT` for the answer to its own echo."""


class Attempted(NamedTuple):
    """What one attempt to deliver brought."""

    meaning: Meaning
    """What the receiver's answer means. `AGAIN` also if no request was sent, because the destination was busy."""
    retry_after: timedelta | None = None
    """The delay that it asks for."""
    reason: str = ""
    """Why the outcome was not accepted."""
    is_busy: bool = False
    """Whether the destination was busy, but answers requests."""

    @property
    def is_done(self) -> bool:
        """Whether the receiver has answered, and needs no further attempt."""
        return self.meaning in {Meaning.ACCEPTED, Meaning.CONFLICT, Meaning.GONE}


class CallbackClient:
    """Sends requests to the receivers of the handler's callers."""

    def __init__(
        self,
        settings: HandlerSettings,
        *,
        keys: LiveKeys,
        http: HttpClient,
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._signers: Mapping[str, MessageSigner] = {
            name: MessageSigner(keys(f"callers.{name}.completion_keys"))
            for name, peer in settings.callers.items()
            if peer.completion_keys is not None
        }
        self._peers = PeerClient(http, metrics=metrics)
        self._clock = clock

    async def deliver(
        self,
        delivery: Delivery,
        closed: CloseEvent,
        converter: DataConverter,
        *,
        attempt: int = 1,
        patience: timedelta = _NO_PATIENCE,
    ) -> Attempted:
        """Make one attempt to deliver *closed*, and log it. Wait for a busy destination as long as *patience*."""
        attempted = await self._deliver(delivery, closed, converter, patience)
        extra = {
            "bridge.request_id": delivery.call.request_id,
            "bridge.attempt": attempt,
            "bridge.target": delivery.workflow_id,
            "bridge.caller": delivery.call.caller,
            "bridge.answer": attempted.meaning.value,
            "bridge.reason": attempted.reason,
        }
        if attempted.meaning is Meaning.REFUSED:
            _log.error("bridge.completion_refused", extra=extra)
        elif attempted.is_done:
            _log.info("bridge.completion_delivered", extra=extra)
        else:
            _log.info("bridge.completion_not_delivered", extra=extra)
        return attempted

    async def _deliver(
        self, delivery: Delivery, closed: CloseEvent, converter: DataConverter, patience: timedelta
    ) -> Attempted:
        call, peer = delivery.call, self._settings.caller(delivery.call.caller)
        try:
            outcome = await sendable(converter, closed.outcome, peer)
        except Exception as error:  # noqa: BLE001 - any error of the team's codec and storage: they may be unavailable
            return Attempted(Meaning.AGAIN, reason=f"the outcome cannot be read at the moment ({type(error).__name__})")
        completion = Completion(
            outcome=outcome,
            target=closed.target,
            operation_token=call.operation_token,
            start_time=delivery.start_time,
            close_time=closed.close_time,
        )
        headers, body = encode_completion(completion, callback_headers=call.callback_headers)
        try:
            url, more = call.callback_url or "", call.callback_headers
            traced = {TRACEPARENT: call.traceparent}
            with span("bridge.deliver", traced, peer.trace if call.traceparent else "off"):
                answer = await self.post(Sent.COMPLETION, call.caller, url, headers, body, more=more, patience=patience)
        except DestinationBusyError as error:
            return Attempted(Meaning.AGAIN, error.retry_after, str(error), is_busy=error.retry_after is None)
        except DestinationRefusedError as error:
            # Every attempt would fail equally. An operator has to change the settings and repeat the delivery.
            return Attempted(Meaning.REFUSED, reason=str(error))
        except BridgeError as error:
            return Attempted(Meaning.NOT_REACHED, reason=str(error))
        return Attempted(answer.meaning, answer.retry_after, str(answer.error or ""))

    async def problem_with(self, caller: str, url: str) -> str | None:
        """Say why completions for *caller* would not arrive below *url*; None if they would.

        The receiver is asked for an echo. A receiver that cannot sign its answers is not asked.
        """
        peer = self._settings.caller(caller)
        try:
            allowed_destination(url, peer.callbacks)
            if caller not in self._signers or peer.answers == "unsigned":
                return None
            target = f"{url}{'&' if '?' in url else '?'}handler={self._settings.name}"
            answer = await self.post(Sent.ECHO, caller, target, {}, b"", more=(), timeout=_ECHO_TIMEOUT)
            if answer.error is not None:
                return str(answer.error)
            echo = decode_echo(answer.body)
            return echo.callback_problem or echo.clock_problem(self._clock())
        except BridgeError as error:
            return str(error)

    async def post(
        self,
        sent: Sent,
        caller: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        more: Iterable[str],
        patience: timedelta = _NO_PATIENCE,
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - passed to the HTTP client
    ) -> Answer:
        """POST to the callback *url* of *caller* with a fresh signature, which also covers the headers in *more*.

        Raises:
            bridge.errors.DestinationBusyError: The maximum number of requests was in flight for as long as *patience*.
            bridge.errors.DestinationRefusedError: The caller is not in the settings, its list does not allow the URL,
                or the request cannot be signed.
            bridge.errors.BridgeError: There was no usable answer.
        """
        if caller not in self._settings.callers:
            message = "no such caller in the settings"
            raise DestinationRefusedError(message)
        peer = self._settings.callers[caller]
        # Check again, not only at the start of the target: the list may have changed since.
        destination = allowed_destination(url, peer.callbacks)
        try:
            return await self._peers.post(
                *(sent, caller, url, {**headers, **({} if peer.trace == "off" else trace_headers())}, body),
                signer=self._signers.get(caller),
                answers=peer.answers,
                more=more,
                route=Route(networks=destination.networks, tls=peer.tls, proxy=peer.proxy),
                patience=patience,
                timeout=timeout,
            )
        except ValueError as error:
            # The request cannot be signed.
            raise DestinationRefusedError(str(error)) from None
