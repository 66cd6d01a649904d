"""The check at the start of a worker: an echo of every endpoint, and of our receiver.

A wrong key, a wrong clock, a wrong URL or a callback host that is not allowed ends no call: calls wait and are retried.
The check therefore reports these faults before the first call.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime

from bridge.http.peer_check import EchoProbe, check_peers
from bridge.runtime.event_log import event_logger
from caller.settings import CallerSettings

_log = event_logger(__name__)


async def check_endpoints(settings: CallerSettings, namespace: str, *, clock: Callable[[], datetime]) -> None:
    """Log a warning for every endpoint that is not ready for the calls of *namespace*."""

    async def check(probe: EchoProbe) -> None:
        extra = {"bridge.endpoint": probe.name}
        findings = await check_peers([probe], clock=clock)
        for each in findings:
            found = extra | {"bridge.rung": each.rung, "bridge.found": each.found}
            if each.state == "wrong":
                _log.warning("bridge.endpoint_not_ready", extra=found)
            elif each.state == "not known":
                _log.info("bridge.endpoint_not_checked", extra=found)
        if all(each.state == "ok" for each in findings):
            _log.info("bridge.endpoint_ready: endpoint %s is ready", probe.name, extra=extra)

    await asyncio.gather(*map(check, settings.probes(namespace)))
