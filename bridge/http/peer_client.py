"""Sends signed requests to peers, and reads the part of an answer that counts.

It warns when the answers in place of a peer are repeatedly unsigned, because then a proxy probably gives them.
"""

import ssl
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Literal

from multidict import CIMultiDict

from bridge.errors import TransportError, UnsignedAnswerError
from bridge.http.client import PATIENCE, REQUEST_TIMEOUT, HttpClient
from bridge.http.route import Route, Tls
from bridge.protocol.answers import Answer, Sent, read_answer
from bridge.protocol.payload import MAX_BODY_BYTES
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import Alarm, Reloaded
from bridge.security.signatures import MessageSigner

_IN_A_ROW = 3
_SMALL = 16384

_log = event_logger(__name__)


class PeerClient:
    """Sends the requests of one side. It holds one small entry for each peer in the settings."""

    def __init__(self, http: HttpClient, *, metrics: Metrics) -> None:
        self._http = http
        self._metrics = metrics
        self._in_a_row: dict[str, tuple[int, int]] = {}
        self._contexts: dict[Tls, Reloaded[ssl.SSLContext]] = {}

    async def post(
        self,
        sent: Sent,
        peer: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        signer: MessageSigner | None,
        answers: Literal["signed", "unsigned"],
        more: Iterable[str] = (),
        route: Route = Route(),  # noqa: B008 - frozen
        patience: timedelta = PATIENCE,
        timeout: timedelta = REQUEST_TIMEOUT,  # noqa: ASYNC109 - passed to the HTTP client
        is_first: bool = True,
    ) -> Answer:
        """POST to *peer* with a fresh signature, and read the answer.

        Args:
            sent: The kind of the request.
            peer: Name of the peer in the settings.
            url: Sent as spelled.
            headers: Sent with digest and signature in addition.
            body: Sent as given.
            signer: Signs the request; None for a peer that gets no signatures.
            answers: Whether the peer signs its answers. Without *signer* it cannot.
            more: Names of further headers that the signature covers.
            route: The way to the peer.
            patience: Maximum wait for a busy destination.
            timeout: For the wait, the request and its repeats.
            is_first: Whether no earlier request of the same call can have had an effect.

        Raises:
            ValueError: The request cannot be signed.
            bridge.errors.DestinationBusyError: Too many requests were in flight. Nothing was sent.
            bridge.errors.BridgeError: There was no answer, or the address is not allowed.
        """
        signed, proof = CIMultiDict(headers), None
        if signer is not None:
            proof = signer.sign(sent.kind, url, signed, body, more=more)
        # Only the answer to a start holds an outcome.
        limit = MAX_BODY_BYTES if sent is Sent.START else _SMALL
        answered = await self._http.post(
            *(url, signed, body),
            peer=peer,
            route=route,
            context=self._context(route.tls),
            patience=patience,
            timeout=timeout,
            max_answer_bytes=limit,
        )
        proof = proof if answers == "signed" else None
        answer = read_answer(sent, proof, *answered, is_first=is_first)
        self._note(peer, answer)
        return answer

    def _context(self, tls: Tls | None) -> ssl.SSLContext | None:
        if tls is None:
            return None
        if (found := self._contexts.get(tls)) is None:
            alarm = Alarm("tls", self._metrics)
            try:
                found = Reloaded(tls.context(), make=tls.context, files=lambda _: tls.files, alarm=alarm)
            except ValueError as error:
                raise TransportError(str(error), layer="address") from None
            self._contexts[tls] = found
        return found()

    def _note(self, peer: str, answer: Answer) -> None:
        """Count *answer*, and warn at every third unsigned answer in a row with the same status."""
        if not isinstance(answer.error, UnsignedAnswerError):
            self._in_a_row.pop(peer, None)
            return
        self._metrics.count("bridge_unsigned_answers", peer=peer, code=answer.status)
        status, count = self._in_a_row.get(peer, (answer.status, 0))
        count = count + 1 if status == answer.status else 1
        self._in_a_row[peer] = answer.status, count
        if count % _IN_A_ROW == 0:
            extra = {"bridge.peer": peer, "bridge.in_a_row": count, "bridge.answer": str(answer.error)}
            _log.warning("bridge.unsigned_answers", extra=extra)
