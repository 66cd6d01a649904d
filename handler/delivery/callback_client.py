"""Carries a message to a caller's callback URL: allowed there, signed for it, and nothing else."""

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime

from multidict import CIMultiDict

from bridge.errors import DestinationRefusedError
from bridge.protocol.answers import Answer, Sent, read_answer
from bridge.runtime.http_client import HttpClient
from bridge.runtime.unsigned_answers import UnsignedAnswers
from bridge.security.signatures import MessageKind, MessageSigner
from handler.settings import HandlerSettings


class Courier:
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

    async def post(
        self, sent: Sent, caller: str, url: str, headers: Mapping[str, str], body: bytes, *, more: Iterable[str]
    ) -> Answer:
        """POST to the callback *url* of *caller*, freshly signed; *more* names further headers to cover.

        Raises:
            DestinationRefusedError: The caller is not in the settings, the URL not on its list, or not to be signed.
            bridge.errors.BridgeError: No usable answer.
        """
        peer = self._callers.get(caller)
        if peer is None:
            message = "no such caller in the settings"
            raise DestinationRefusedError(message)
        # Checked again, not only at the start: the list may have been narrowed since.
        destination = peer.allow_list.check(url)
        signed, proof = CIMultiDict(headers), None
        if (signer := self._signers.get(caller)) is not None:
            try:
                proof = signer.sign(MessageKind.COMPLETION, url, signed, body, more=more)
            except ValueError as error:
                raise DestinationRefusedError(str(error)) from None
        answered = await self._http.post(url, signed, body, networks=destination.networks)
        answer = read_answer(
            sent,
            proof if peer.answers == "signed" else None,
            *(answered.status, answered.headers, answered.body),
            now=self._clock(),
        )
        self._unsigned_answers.note(caller, answer)
        return answer
