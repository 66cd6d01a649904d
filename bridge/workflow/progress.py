"""Progress of a target: what it last reported, for whoever looks at the waiting call. Workflow-safe."""

from typing import Any

from temporalio import workflow

PROGRESS_QUERY = "bridge.workflow.progress"

MAX_PROGRESS_BYTES = 16 * 1024
"""Encoded. What is larger is not carried: it rides on every later heartbeat of the caller."""


def report_progress(details: Any) -> None:
    """Tell where the target stands. The answer to the next renewal carries the latest *details*.

    Called in the target's workflow. It sends nothing and adds nothing to history; what the data converter makes of
    *details* shows up beside the order's pending activity, in UI, CLI and describe.
    """
    workflow.set_query_handler(PROGRESS_QUERY, lambda: details)
