"""Sends messages to callback URLs: only to allowed ones, signed for the caller, with a limit per destination."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from weakref import WeakValueDictionary

from multidict import CIMultiDict
from temporalio.converter import DataConverter
from yarl import URL

from bridge.errors import BridgeError, DestinationRefusedError
from bridge.protocol.answers import Answer, Meaning, Sent, read_answer
from bridge.protocol.completion import Completion, encode_completion
from bridge.runtime.http_client import HttpClient
from bridge.runtime.unsigned_answers import UnsignedAnswers
from bridge.security.signatures import MessageKind, MessageSigner
from handler.delivery.close_event import CloseEvent, inlined
from handler.delivery.records import CallMemo, Delivery
from handler.settings import HandlerSettings

REQUESTS = 100
"""Maximum number of requests in flight."""
REQUESTS_PER_DESTINATION = 20
"""Maximum number in flight to one host and port, so that a destination that hangs does not block the others."""
_NO_PATIENCE = timedelta(0)

DELIVERED = frozenset({Meaning.ACCEPTED, Meaning.CONFLICT, Meaning.GONE})
"""Answers after which nothing is left to deliver."""
_EVENTS = dict.fromkeys(DELIVERED, (logging.INFO, "bridge.completion_delivered")) | {
    Meaning.REFUSED: (logging.ERROR, "bridge.completion_refused")
}

_log = logging.getLogger(__name__)


class DestinationBusyError(BridgeError):
    """The maximum number of requests is in flight to the destination."""


class CallbackClient:
    """Sends requests to the receivers of the handler's callers."""

    def __init__(self, settings: HandlerSettings, *, http: HttpClient, clock: Callable[[], datetime]) -> None:
        self._callers = settings.callers
        self._signers: Mapping[str, MessageSigner] = {
            name: MessageSigner(peer.completion_keys)
            for name, peer in settings.callers.items()
            if peer.completion_keys is not None
        }
        self._http = http
        self._clock = clock
        self._unsigned_answers = UnsignedAnswers()
        self._all = asyncio.Semaphore(REQUESTS)
        self._destinations: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def deliver(
        self, delivery: Delivery, closed: CloseEvent, converter: DataConverter, *, patience: timedelta = _NO_PATIENCE
    ) -> tuple[Meaning, timedelta | None]:
        """Make one attempt to deliver *closed*. Returns the answer's meaning and the delay that it asks for.

        Raises:
            DestinationBusyError: The destination was busy for as long as *patience*. No request was sent.
        """
        call = delivery.call
        outcome, peer = closed.outcome, self._callers.get(call.caller)
        if peer is None or not peer.shares_storage:
            outcome = await inlined(converter, outcome)
        completion = Completion(
            outcome=outcome.within_size_limit(),
            target=closed.target,
            operation_token=call.operation_token,
            start_time=delivery.start_time,
            close_time=closed.close_time,
        )
        headers, body = encode_completion(completion, callback_headers=call.callback_headers)
        retry_after = None
        try:
            answer = await self.post(Sent.COMPLETION, call, headers, body, patience=patience)
            meaning, retry_after = answer.meaning, answer.retry_after
        except DestinationBusyError:
            raise
        except DestinationRefusedError:
            # Every attempt would fail equally. An operator has to change the settings and repeat the delivery.
            meaning = Meaning.REFUSED
        except BridgeError:
            meaning = Meaning.NOT_REACHED
        level, event = _EVENTS.get(meaning, (logging.INFO, "bridge.completion_not_delivered"))
        extra = {"bridge.request_id": call.request_id, "bridge.target": delivery.workflow_id}
        _log.log(level, event, extra=extra | {"bridge.answer": meaning.value})
        return meaning, retry_after

    async def post(
        self,
        sent: Sent,
        call: CallMemo,
        headers: Mapping[str, str],
        body: bytes,
        *,
        patience: timedelta = _NO_PATIENCE,
    ) -> Answer:
        """POST to the callback URL of *call* with a fresh signature, which also covers the callback's own headers.

        Raises:
            DestinationBusyError: The maximum number of requests was in flight for as long as *patience*.
            DestinationRefusedError: The caller is not in the settings, its list does not allow the URL, or the request
                cannot be signed.
            bridge.errors.BridgeError: There was no usable answer.
        """
        url, peer = call.callback_url or "", self._callers.get(call.caller)
        if peer is None:
            message = "no such caller in the settings"
            raise DestinationRefusedError(message)
        # Check again, not only at the start of the target: the list may have changed since.
        destination = peer.allow_list.check(url)
        free = self._destinations.setdefault(URL(url).authority, asyncio.Semaphore(REQUESTS_PER_DESTINATION))
        try:
            async with asyncio.timeout(patience.total_seconds()):
                await free.acquire()
        except TimeoutError:
            message = "too many requests in flight to the destination"
            raise DestinationBusyError(message) from None
        try:
            async with self._all:
                signed, proof = CIMultiDict(headers), None
                if (signer := self._signers.get(call.caller)) is not None:
                    proof = signer.sign(MessageKind.COMPLETION, url, signed, body, more=call.callback_headers)
                answered = await self._http.post(url, signed, body, networks=destination.networks)
        except ValueError as error:
            # The request cannot be signed.
            raise DestinationRefusedError(str(error)) from None
        finally:
            free.release()
        answer = read_answer(
            sent,
            proof if peer.answers == "signed" else None,
            *(answered.status, answered.headers, answered.body),
            now=self._clock(),
        )
        self._unsigned_answers.note(call.caller, answer)
        return answer
