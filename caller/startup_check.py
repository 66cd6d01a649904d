"""The check at the start of a worker: ask every endpoint for an echo.

A wrong key, a wrong clock, a wrong URL or a callback host that is not allowed ends no call: calls wait and are retried.
The check therefore reports these faults before the first call.
"""

from collections.abc import Callable
from datetime import datetime

from bridge.runtime.event_log import event_logger
from caller.endpoint_client import Endpoints, NotStartedError

_log = event_logger(__name__)


async def check_endpoints(endpoints: Endpoints, *, callback: str | None, clock: Callable[[], datetime]) -> None:
    """Log a warning for every endpoint that is not ready for calls.

    Args:
        endpoints: The endpoints of the settings.
        callback: URL below which the callback URLs of our calls are; None without a receiver.
        clock: Returns the time.
    """
    for name in endpoints.names:
        problem = await _problem(endpoints, name, callback, clock)
        extra = {"bridge.endpoint": name, "bridge.problem": problem}
        if problem is None:
            _log.info("bridge.endpoint_ready: %s", name, extra=extra)
        else:
            _log.warning("bridge.endpoint_not_ready: %s: %s", name, problem, extra=extra)


async def _problem(endpoints: Endpoints, name: str, callback: str | None, clock: Callable[[], datetime]) -> str | None:
    try:
        echo = await endpoints.echo(name, callback=callback)
    except NotStartedError as error:
        return str(error)
    if echo.callback_problem is not None:
        return f"the handler's test of {callback} failed: {echo.callback_problem}"
    return echo.clock_problem(clock())
