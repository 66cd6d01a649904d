"""When each peer last exchanged a message with this process, and why its last refused message was refused.

The record is kept in memory and begins anew with the process. It has one entry for each peer in the settings, and one
for all other senders.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class PeerExchange:
    """The last exchanges with one peer."""

    peer: str
    """Name of the peer in the settings; "unknown" for every other sender."""
    last_good: datetime | None = None
    """When its last message was accepted; None if there was none since the start of the process."""
    last_refusal: datetime | None = None
    """When the last message in its name was refused. The sender of such a message may be a stranger."""
    reason: str | None = None
    """Status of that refusal, and why the message was refused."""


class PeerExchanges:
    """The last exchanges of one service with each of *peers*."""

    def __init__(self, peers: Iterable[str], *, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._entries = {name: PeerExchange(peer=name) for name in (*peers, _UNKNOWN)}

    def record(self, peer: str, status: int, reason: str) -> None:
        """Record that a message in the name of *peer* was answered with *status*."""
        entry, now = self._entries.get(peer, self._entries[_UNKNOWN]), self._clock()
        is_good = status < 400
        change = {"last_good": now} if is_good else {"last_refusal": now, "reason": f"{status} {reason}"}
        self._entries[entry.peer] = replace(entry, **change)

    def all(self) -> list[PeerExchange]:
        """Return the entries in the order of the settings."""
        return list(self._entries.values())
