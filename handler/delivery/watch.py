"""Measures the open deliveries of the namespace: how many, and how old the oldest is. Every copy reports the same."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

from temporalio.client import Client
from temporalio.service import RPCError

from bridge.runtime.metrics import Metrics
from handler.admin.deliveries import Deliveries

_EVERY_S = 30


async def watch_deliveries(
    client: Client, metrics: Metrics, callers: Iterable[str], *, every_s: float = _EVERY_S
) -> None:
    """Set the gauges of *callers* repeatedly, if an exporter serves them. Other callers count as "unknown"."""
    known = [*callers, "unknown"]
    while metrics.is_exported:
        now, open_deliveries, oldest = datetime.now(UTC), Counter[str](), dict.fromkeys(known, 0.0)
        try:
            async for each in Deliveries(client=client).read_open():
                caller = each.caller if each.caller in known else "unknown"
                open_deliveries[caller] += 1
                oldest[caller] = max(oldest[caller], (now - each.started).total_seconds())
        except RPCError:
            # The gauges keep their values until Temporal answers again.
            pass
        else:
            for caller in known:
                metrics.set("bridge_deliveries_open", open_deliveries[caller], caller=caller)
                metrics.set("bridge_delivery_oldest_seconds", oldest[caller], caller=caller)
        await asyncio.sleep(every_s)
