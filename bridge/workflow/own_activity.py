"""Start an activity of ours so that no outbound interceptor of the team changes it.

A team's interceptor may set retry policies and timeouts for all activities, or wrap their handles. What is asked for
here is kept in a context variable while the command is made; the caller's plugin puts it back at the end of the chain
of interceptors, and returns the handle from there. Headers stay as the interceptors made them.
"""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from temporalio import workflow


class OwnActivity:
    """One activity of ours that is being started."""

    present: ContextVar["OwnActivity | None"] = ContextVar("own_activity", default=None)

    def __init__(self, activity: str, options: Mapping[str, Any]) -> None:
        self.activity = activity
        self.options = options
        """By the field names of `StartActivityInput` and `StartLocalActivityInput`."""
        self.handle: workflow.ActivityHandle[Any] | None = None
        """As the end of the chain made it; None on a worker without the plugin."""


def start_own_activity(
    start: Callable[..., workflow.ActivityHandle[Any]], activity: str, *, result_type: Any, **options: Any
) -> workflow.ActivityHandle[Any]:
    """Call *start*, `workflow.start_activity` or `workflow.start_local_activity`, with these options."""
    own = OwnActivity(activity, {**options, "ret_type": result_type})
    token = OwnActivity.present.set(own)
    try:
        handle = start(activity, result_type=result_type, **options)
    finally:
        OwnActivity.present.reset(token)
    for each in {handle, own.handle or handle}:
        each.add_done_callback(_retrieve)
    return own.handle or handle


def _retrieve(activity: "workflow.ActivityHandle[Any]") -> None:
    """Read the error of an activity whose end is awaited no more, so that asyncio does not log it."""
    if not activity.cancelled():
        activity.exception()
