"""What Temporal's UI and CLI show about the call behind a target: a readable memo, a summary, and details with a link.

The names in these texts come from the caller. Each is therefore bounded, without control characters, and a code span
where Markdown is shown.
"""

from temporalio.api.common.v1 import Payload
from temporalio.api.sdk.v1 import UserMetadata
from temporalio.converter import DataConverter

from bridge.protocol.link import WorkflowRef
from bridge.security.redaction import markdown_code, one_line
from handler.delivery.records import CallMemo

CALLER_MEMO = "caller"
"""Memo field for people: who called. No code reads it."""

_MAX_SUMMARY_BYTES = 400
"""The server refuses a start with a longer summary. A codec may make a short one longer."""


async def describe_call(
    call: CallMemo, *, converter: DataConverter, ui_url: str | None
) -> tuple[Payload, UserMetadata]:
    """Return the memo field `caller`, and the summary and details, of the target that *call* starts.

    *ui_url* is the base URL of the caller's Temporal UI, None if it is unknown.
    """
    operation = f"{call.service}/{call.operation}"
    name, link = call.caller, None
    if call.caller_workflow_id:
        name = f"{call.caller_namespace}/{call.caller_workflow_id}"
        if ui_url is not None:
            source = WorkflowRef(
                namespace=call.caller_namespace, workflow_id=call.caller_workflow_id, run_id=call.caller_run_id
            )
            link = source.ui_url(ui_url)
    shown, run = markdown_code(name), one_line(call.caller_run_id, 100)
    memo = one_line(f"{name}: {operation}", 700) + (f" {link}" if link else f" (run {run})" if run else "")
    lines = [
        f"- caller: {f'[{shown}]({link})' if link else shown}" + (f", run {markdown_code(run)}" if run else ""),
        f"- operation: {markdown_code(operation)}",
        f"- caller's name in the settings: {markdown_code(call.caller)}",
        f"- request id: {markdown_code(call.request_id)}",
    ]
    summary = f"called by {markdown_code(name, 100)}: {markdown_code(operation, 100)}"
    caller, short, long = await converter.encode([memo, summary, "\n".join(lines)])
    return caller, UserMetadata(summary=short if short.ByteSize() <= _MAX_SUMMARY_BYTES else None, details=long)
