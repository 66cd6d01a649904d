"""The threads in which the team's functions run that are not `async`: a function that blocks must not stop the loop."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from bridge.errors import UnavailableError

MAX_THREADS = 32
MAX_WAITING = 200
"""Calls that may wait for a thread. A caller whose call finds no place asks again a second later."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


class BoundedThreads(ThreadPoolExecutor):
    """An executor with a bound on the calls that wait for a thread."""

    def __init__(self, *, threads: int = MAX_THREADS, waiting: int = MAX_WAITING) -> None:
        super().__init__(threads, thread_name_prefix="operation")
        self._places = threading.Semaphore(threads + waiting)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run *fn* in a thread.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, all threads and places are taken.
        """
        if not self._places.acquire(blocking=False):
            message = "the handler runs as many operations at once as it may"
            raise UnavailableError(message)
        try:
            future = super().submit(fn, *args, **kwargs)
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(self._release)
        return future

    def _release(self, _: Future[Any]) -> None:
        self._places.release()
