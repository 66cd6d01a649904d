"""Progress of a target, for people who look at the waiting call. Workflow code may import this module."""

from typing import Any

from temporalio import workflow

PROGRESS_MEMO = "bridge-progress"
"""Memo field of the target. The handler reads it when the caller renews, without waking the target's worker."""

MAX_PROGRESS_BYTES = 16 * 1024
"""Largest encoded progress that is sent to the caller. A larger value would be in every later heartbeat of the call."""


def report_progress(details: Any) -> None:
    """Record the target's progress. The answer to the caller's next renewal holds the latest *details*.

    Call this function in the target's workflow only at steps that matter to people, because each call adds an event to
    the target's history. UI, CLI and describe show *details*, encoded by the data converter, on the caller's pending
    activity. A value of more than 16 KiB is recorded and not sent to the caller.
    """
    workflow.upsert_memo({PROGRESS_MEMO: details})
