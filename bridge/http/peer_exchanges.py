"""What a service records of the requests that it answers: metrics, and the last exchange with each peer.

The last exchanges are kept in memory and begin anew with the process. There is one entry for each peer in the settings,
and one for all other senders.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from time import perf_counter

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from bridge.http.incoming_message import FACTS, PROOF
from bridge.runtime.metrics import Metrics

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
        # 424 is the outcome of an operation that has failed.
        is_good = status < 400 or status == 424
        change = {"last_good": now} if is_good else {"last_refusal": now, "reason": f"{status} {reason}"}
        self._entries[entry.peer] = replace(entry, **change)

    def all(self) -> list[PeerExchange]:
        """Return the entries in the order of the settings."""
        return list(self._entries.values())


def record_exchanges(side: str, metrics: Callable[[], Metrics], peers: PeerExchanges) -> Middleware:
    """Return the outermost middleware of a service. It reads the facts that routes add to the access log.

    It counts in *metrics*, and records in *peers* the last exchange with each peer.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        begun = perf_counter()
        response = await handler(request)
        facts, counters = request.get(FACTS, {}), metrics()
        peer = str(facts.get("bridge.caller", facts.get("bridge.peer", _UNKNOWN)))
        if "bridge.message" in facts:
            # The path of a refused request names its sender, which may be a stranger.
            sender = peer if peer != _UNKNOWN else request.match_info.get("caller", peer)
            peers.record(sender, response.status, str(facts.get("bridge.refused", facts.get("bridge.answer", ""))))
        if "bridge.untrusted" in facts:
            counters.count("bridge_untrusted", side=side, reason=str(facts["bridge.untrusted"]))
        if (proof := request.get(PROOF)) is not None:
            counters.count("bridge_key_uses", peer=peer, key_id=proof.key_id)
        if facts.get("bridge.message") == "start":
            labels = {"caller": peer, "operation": str(facts.get("bridge.operation", _UNKNOWN))}
            counters.count("bridge_starts", **labels, code=response.status)
            taken = timedelta(seconds=perf_counter() - begun)
            counters.observe("bridge_start_duration", taken, **labels, code=response.status)
        elif facts.get("bridge.message") == "completion":
            counters.count("bridge_completions", handler=peer, outcome=str(facts.get("bridge.answer", "refused")))
        return response

    return middleware
