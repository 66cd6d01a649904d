"""Start an activity of ours so that no outbound interceptor of the team changes it.

A team's interceptor may set retry policies and timeouts for all activities, or wrap their handles. What is asked for
here is kept in a context variable while the command is made; the caller's plugin puts it back at the end of the chain
of interceptors, and keeps the handle from there. Headers stay as the interceptors made them.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from temporalio import workflow


@dataclass
class OwnActivity:
    """One activity of ours that is being started."""

    activity: str
    options: Mapping[str, Any]
    """By the field names of `StartActivityInput` and `StartLocalActivityInput`."""
    handle: workflow.ActivityHandle[Any] | None = None
    """As the end of the chain made it; None on a worker without the plugin."""


STARTING: ContextVar[OwnActivity | None] = ContextVar("starting", default=None)


def start_own_activity(
    start: Callable[..., workflow.ActivityHandle[Any]], activity: str, *, result_type: Any, **options: Any
) -> workflow.ActivityHandle[Any]:
    """Call *start*, `workflow.start_activity` or `workflow.start_local_activity`, with these options."""
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
    """Read the error of what is awaited no more, so that asyncio does not log it."""
    if not ended.cancelled():
        ended.exception()
