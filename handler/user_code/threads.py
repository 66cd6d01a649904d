"""The threads that run the team's functions that are not `async`, because such a function may block the event loop.

Each caller has threads of its own: a function that does not return occupies none of another caller's.
"""

import asyncio
import inspect
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from bridge.errors import UnavailableError

MAX_THREADS = 32
MAX_WAITING = 200
"""Maximum number of calls that wait for a thread. A caller beyond it retries a second later."""
_MAX_CALLERS = 100

_P = ParamSpec("_P")
_T = TypeVar("_T")


class BoundedThreads(ThreadPoolExecutor):
    """An executor with a limit for the calls that wait for a thread."""

    def __init__(self, *, threads: int = MAX_THREADS, waiting: int = MAX_WAITING) -> None:
        super().__init__(threads, thread_name_prefix="bridge-team")
        self._places = threading.Semaphore(threads + waiting)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run *fn* in a thread. A StopIteration of *fn* is raised as a RuntimeError.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, all threads are busy and the maximum number of calls waits.
        """
        if not self._places.acquire(blocking=False):
            message = "the handler runs the maximum number of the team's functions"
            raise UnavailableError(message)
        try:
            # The function may read the trace, or the activity that calls it.
            future = super().submit(copy_context().run, partial(_without_stop_iteration, fn, *args, **kwargs))
        except BaseException:
            self._places.release()
            raise
        future.add_done_callback(self._release)
        return future

    def _release(self, _: Future[Any]) -> None:
        self._places.release()


class CallerThreads(defaultdict[str, BoundedThreads]):
    """The threads of each caller, made when it first needs them.

    Native callers may invent names. Those beyond the first hundred share the threads of the empty name.
    """

    def __missing__(self, caller: str) -> BoundedThreads:
        """Make the threads of *caller*."""
        return super().__missing__(caller) if len(self) < _MAX_CALLERS or not caller else self[""]


def _without_stop_iteration(fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call *fn*. No future of asyncio takes a StopIteration: the function's caller would wait without end."""
    try:
        return fn(*args, **kwargs)
    except StopIteration as error:
        message = "the function raised StopIteration"
        raise RuntimeError(message) from error


def is_cancellation(error: BaseException) -> bool:
    """Whether *error* cancels the current request. A team's function may raise a CancelledError of its own."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def close_coroutine(answered: Any) -> None:
    """Close *answered* if it is a coroutine that a plain function returned and that never ran."""
    if inspect.iscoroutine(answered):
        answered.close()
