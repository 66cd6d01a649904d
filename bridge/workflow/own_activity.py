"""Start an activity of the bridge without changes by the team's outbound interceptors.

A team's interceptor may set retry policies and timeouts for all activities, or wrap their handles. A context variable
holds the original options while the activity is started. At the end of the chain of interceptors, the guard
of both plugins restores these options and stores the handle. Headers that the interceptors set are kept.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from temporalio import workflow


@dataclass
class OwnActivity:
    """One activity of the bridge while it is started."""

    activity: str
    """Activity type."""
    options: Mapping[str, Any]
    """Options by the field names of `StartActivityInput` and `StartLocalActivityInput`."""
    handle: workflow.ActivityHandle[Any] | None = None
    """The handle before any interceptor wrapped it; None on a worker without the plugin."""


STARTING: ContextVar[OwnActivity | None] = ContextVar("starting", default=None)


def start_own_activity(
    start: Callable[..., workflow.ActivityHandle[Any]], activity: str, *, result_type: Any, **options: Any
) -> workflow.ActivityHandle[Any]:
    """Call *start* with these options. *start* is `workflow.start_activity` or `workflow.start_local_activity`."""
    own = OwnActivity(activity, {**options, "ret_type": result_type})
    token = STARTING.set(own)
    try:
        handle = start(activity, result_type=result_type, **options)
    finally:
        STARTING.reset(token)
    for each in {handle, own.handle or handle}:
        each.add_done_callback(retrieve)
    return own.handle or handle


def retrieve(ended: "asyncio.Future[Any]") -> None:
    """Read the error of a future that no task awaits any more, so that asyncio does not log it."""
    if not ended.cancelled():
        ended.exception()
