"""Call a workflow in another Temporal namespace as if it were a child.

This package holds what both sides of a call share. Its exports do no I/O and pass the workflow sandbox, therefore
workflow code may import them. The caller's team uses `create_client`. The handler's team uses `emits_callback` or
`external_target`.

A *call* has four steps. The caller's workflow schedules one activity. The activity POSTs a start with a signed callback
URL to the handler service and then waits asynchronously. The handler service starts the target workflow and answers at
once. When the target has ended, its worker's process POSTs the outcome to the callback URL, where the caller's receiver
completes the waiting activity. The messages are Nexus RPC over HTTP.
"""

from bridge.workflow.call import Renewals
from bridge.workflow.client import OperationClient, OperationHandle, create_client
from bridge.workflow.progress import report_progress
from bridge.workflow.targets import emits_callback, external_target

__version__ = "0.1.0"

__all__ = [
    "OperationClient",
    "OperationHandle",
    "Renewals",
    "create_client",
    "emits_callback",
    "external_target",
    "report_progress",
]
