"""How many requests of one peer a service serves at a time.

A peer holds connections if it sends bodies slowly, or if its requests take long. One peer must not hold all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from bridge.errors import over_limit
from bridge.http.listener import connection_limit


class InFlight:
    """The requests of one peer that are served now."""

    def __init__(self) -> None:
        self._count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Take a place for one request.

        Raises:
            nexusrpc.HandlerError: RESOURCE_EXHAUSTED, all places of the peer are taken.
        """
        # Half of the connections that the process may have. The limit is raised when the process begins to listen.
        limit = max(connection_limit() // 2, 1)
        if self._count >= limit:
            message = f"one peer may make {limit} requests at a time"
            raise over_limit(message, retry_after=timedelta(seconds=1))
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
