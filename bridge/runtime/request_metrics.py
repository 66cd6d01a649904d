"""What a service counts of the requests that it answers."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from time import perf_counter

from aiohttp import web
from aiohttp.typedefs import Middleware

from bridge.runtime.incoming_message import FACTS, PROOF
from bridge.runtime.metrics import Metrics
from bridge.runtime.peer_exchanges import PeerExchanges


def request_metrics(side: str, metrics: Callable[[], Metrics], peers: PeerExchanges) -> Middleware:
    """Return the outermost middleware of a service. It counts from the facts that routes add to the access log.

    It also records in *peers* the last exchange with each peer.
    """

    @web.middleware
    async def middleware(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        begun = perf_counter()
        response = await handler(request)
        facts, counters = request.get(FACTS, {}), metrics()
        peer = str(facts.get("bridge.caller", facts.get("bridge.peer", "unknown")))
        if "bridge.message" in facts:
            # The path of a refused request names its sender, which may be a stranger.
            sender = peer if peer != "unknown" else request.match_info.get("caller", peer)
            peers.record(sender, response.status, str(facts.get("bridge.refused", facts.get("bridge.answer", ""))))
        if "bridge.untrusted" in facts:
            counters.count("bridge_untrusted", side=side, reason=str(facts["bridge.untrusted"]))
        if (proof := request.get(PROOF)) is not None:
            counters.count("bridge_key_uses", peer=peer, key_id=proof.key_id)
        if facts.get("bridge.message") == "start":
            labels = {"caller": peer, "operation": str(facts.get("bridge.operation", "unknown"))}
            counters.count("bridge_starts", **labels, code=response.status)
            taken = timedelta(seconds=perf_counter() - begun)
            counters.observe("bridge_start_duration", taken, **labels, code=response.status)
        elif facts.get("bridge.message") == "completion":
            counters.count("bridge_completions", handler=peer, outcome=str(facts.get("bridge.answer", "refused")))
        return response

    return middleware
