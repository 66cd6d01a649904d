"""Starts that are held open: the outcome of a short operation is in the answer to its start.

The number of held starts is limited, and all are released at shutdown. The caller then retries the start and gets the
run that already exists.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from temporalio.client import Client

from bridge.errors import UnavailableError
from bridge.protocol.link import WorkflowRef
from bridge.protocol.start import Finished
from handler.delivery.close_event import wait_for_close_event

MAX_WAIT = timedelta(seconds=60)
"""Maximum time to hold a start, even if its caller prefers to wait longer."""


class HeldStarts:
    """The starts that one service holds open."""

    def __init__(self, client: Client, *, limit: int) -> None:
        self._client = client
        self._limit = limit
        self._held: Counter[str] = Counter()
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Release all held starts, and hold no further ones."""
        self._closing.set()

    @contextmanager
    def reserve(self, wait: timedelta | None, *, caller: str, limit: int) -> Iterator[timedelta | None]:
        """Reserve a place for *caller*, which may have *limit* places, and yield how long to hold the start.

        Yield None if *wait* is None or no place is free. The start is then answered at once.
        """
        is_free = self._held.total() < self._limit and self._held[caller] < limit
        if wait is None or not is_free or self._closing.is_set():
            yield None
            return
        self._held[caller] += 1
        try:
            yield min(wait, MAX_WAIT)
        finally:
            self._held[caller] -= 1

    async def outcome_of(self, target: WorkflowRef, *, within: timedelta) -> Finished | None:
        """Return the outcome of *target*; None if it does not close *within*.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, the service is stopping.
            temporalio.service.RPCError: Temporal did not answer.
        """
        waiting = asyncio.ensure_future(wait_for_close_event(self._client, target, within=within))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait({waiting, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            if not waiting.done():
                waiting.cancel()
        if not waiting.done():
            message = "the service is stopping"
            raise UnavailableError(message)
        found = waiting.result()
        return None if found is None else Finished(outcome=found.outcome, target=found.target)
