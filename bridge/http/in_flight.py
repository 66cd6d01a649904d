"""How many requests of one peer a service serves at a time.

A peer holds connections if it sends bodies slowly, or if its requests take long. One peer must not hold all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from bridge.errors import over_limit
from bridge.http.listener import MAX_CONNECTIONS

MAX_IN_FLIGHT = MAX_CONNECTIONS // 2


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
        if self._count >= MAX_IN_FLIGHT:
            message = f"one peer may make {MAX_IN_FLIGHT} requests at a time"
            raise over_limit(message, retry_after=timedelta(seconds=1))
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
