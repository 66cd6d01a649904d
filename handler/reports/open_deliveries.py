"""Measures the open deliveries of the namespace: how many, and how old the oldest is.

Every copy of the handler service reports the same values.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime

from temporalio.client import Client
from temporalio.service import RPCError

from bridge.runtime.metrics import Metrics
from handler.reports.deliveries import Deliveries

_INTERVAL_S = 30


async def watch_deliveries(
    client: Client, metrics: Metrics, callers: Iterable[str], *, every_s: float = _INTERVAL_S
) -> None:
    """Set the gauges repeatedly, if an exporter serves metrics. A caller not in *callers* counts as "unknown"."""
    labels = [*callers, "unknown"]
    while metrics.is_exported:
        now, open_deliveries, oldest = datetime.now(UTC), Counter[str](), dict.fromkeys(labels, 0.0)
        try:
            async for delivery in Deliveries(client=client).read_open():
                caller = delivery.caller if delivery.caller in labels else "unknown"
                open_deliveries[caller] += 1
                oldest[caller] = max(oldest[caller], (now - delivery.started).total_seconds())
        except RPCError:
            # The gauges keep their values until Temporal answers again.
            pass
        else:
            for caller in labels:
                metrics.set("bridge_deliveries_open", open_deliveries[caller], caller=caller)
                metrics.set("bridge_delivery_oldest_seconds", oldest[caller], caller=caller)
        await asyncio.sleep(every_s)
