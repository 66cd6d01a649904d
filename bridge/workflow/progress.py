"""Progress of a target: what it last reported, for people who look at the waiting call. Workflow-safe."""

from typing import Any

from temporalio import workflow

PROGRESS_MEMO = "bridge-progress"
"""Memo field of the target. The handler reads it when the caller renews, without waking the target's worker."""

MAX_PROGRESS_BYTES = 16 * 1024
"""Encoded. A larger value is not passed on: it would ride on every later heartbeat of the caller."""


def report_progress(details: Any) -> None:
    """Record the target's progress. The answer to the caller's next renewal carries the latest *details*.

    Call it in the target's workflow, at steps that people care about: each call is an event in the target's history.
    The caller's pending activity shows what the data converter makes of *details*, in UI, CLI and describe. A value of
    more than 16 KiB is recorded, and not passed on.
    """
    workflow.upsert_memo({PROGRESS_MEMO: details})
