"""Warns when a peer's answers are repeatedly unsigned, because then a proxy probably answers in its place."""

import logging

from bridge.errors import UnsignedAnswerError
from bridge.protocol.answers import Answer, Meaning

_IN_A_ROW = 3

_log = logging.getLogger(__name__)


class UnsignedAnswers:
    """Counts the unsigned answers of each peer. A process has one instance. It holds one entry per peer of settings."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, tuple[int, int]] = {}

    def note(self, peer: str, answer: Answer) -> None:
        """Count *answer*, and warn at every third unsigned answer in a row with the same status."""
        if answer.meaning is not Meaning.NOT_REACHED or not isinstance(answer.error, UnsignedAnswerError):
            self._in_a_row.pop(peer, None)
            return
        status, count = self._in_a_row.get(peer, (answer.status, 0))
        count = count + 1 if status == answer.status else 1
        self._in_a_row[peer] = answer.status, count
        if count % _IN_A_ROW == 0:
            _log.warning(
                "bridge.unsigned_answers",
                extra={"bridge.peer": peer, "bridge.in_a_row": count, "bridge.answer": str(answer.error)},
            )
