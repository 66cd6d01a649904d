"""Sends messages to the callback URLs of callers: allowed there, signed for the caller, bounded per destination."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from weakref import WeakValueDictionary

from multidict import CIMultiDict
from temporalio.converter import DataConverter
from yarl import URL

from bridge.errors import BridgeError, DestinationRefusedError
from bridge.protocol.answers import Answer, Meaning, Sent, read_answer
from bridge.protocol.completion import Completion, DeliveryAnswer, encode_completion
from bridge.runtime.http_client import HttpClient
from bridge.runtime.unsigned_answers import UnsignedAnswers
from bridge.security.signatures import MessageKind, MessageSigner
from handler.delivery.close_event import CloseEvent, inlined
from handler.delivery.records import Delivery
from handler.settings import HandlerSettings

REQUESTS = 100
"""Requests in flight in all."""
REQUESTS_PER_DESTINATION = 20
"""Requests in flight to one host and port. A destination that hangs must not use up what others need."""
_NO_PATIENCE = timedelta(0)
_DELIVERY_ANSWERS = {
    Meaning.ACCEPTED: DeliveryAnswer.ACCEPTED,
    Meaning.CONFLICT: DeliveryAnswer.GONE,
    Meaning.GONE: DeliveryAnswer.GONE,
    Meaning.REFUSED: DeliveryAnswer.REFUSED,
}


class DestinationBusyError(BridgeError):
    """As many requests as allowed are in flight to the destination."""


class CallbackClient:
    """Sends as the handler to each of its callers."""

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
        self,
        delivery: Delivery,
        closed: CloseEvent,
        converter: DataConverter,
        *,
        patience: timedelta = _NO_PATIENCE,
    ) -> tuple[DeliveryAnswer, timedelta | None]:
        """One attempt to deliver what *closed* says. Returns what the receiver answered, and the wait it asked for.

        Raises:
            DestinationBusyError: Its destination was busy for as long as *patience*. No request was sent.
        """
        call = delivery.call
        peer = self._callers.get(call.caller)
        outcome = closed.outcome
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
        try:
            url, more = call.callback_url or "", call.callback_headers
            answer = await self.post(Sent.COMPLETION, call.caller, url, headers, body, more=more, patience=patience)
        except DestinationBusyError:
            raise
        except DestinationRefusedError:
            # Every attempt would end the same. Mending the settings and repeating the delivery helps.
            return DeliveryAnswer.REFUSED, None
        except BridgeError:
            return DeliveryAnswer.AGAIN_LATER, None
        return _DELIVERY_ANSWERS.get(answer.meaning, DeliveryAnswer.AGAIN_LATER), answer.retry_after

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
    ) -> Answer:
        """POST to the callback *url* of *caller*, freshly signed; *more* names further headers to cover.

        Raises:
            DestinationBusyError: The destination had as many requests in flight as allowed, for as long as *patience*.
            DestinationRefusedError: The caller is not in the settings, the URL not on its list, or not to be signed.
            bridge.errors.BridgeError: No usable answer.
        """
        peer = self._callers.get(caller)
        if peer is None:
            message = "no such caller in the settings"
            raise DestinationRefusedError(message)
        # Checked again, not only at the start: the list may have been narrowed since.
        destination = peer.allow_list.check(url)
        place = self._destinations.setdefault(URL(url).authority, asyncio.Semaphore(REQUESTS_PER_DESTINATION))
        try:
            async with asyncio.timeout(patience.total_seconds()):
                await place.acquire()
        except TimeoutError:
            message = "too many requests in flight to the destination"
            raise DestinationBusyError(message) from None
        try:
            async with self._all:
                signed, proof = CIMultiDict(headers), None
                if (signer := self._signers.get(caller)) is not None:
                    proof = signer.sign(MessageKind.COMPLETION, url, signed, body, more=more)
                answered = await self._http.post(url, signed, body, networks=destination.networks)
        except ValueError as error:
            # It cannot be signed.
            raise DestinationRefusedError(str(error)) from None
        finally:
            place.release()
        answer = read_answer(
            sent,
            proof if peer.answers == "signed" else None,
            *(answered.status, answered.headers, answered.body),
            now=self._clock(),
        )
        self._unsigned_answers.note(caller, answer)
        return answer
