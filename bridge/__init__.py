"""Call a workflow in another Temporal namespace as if it were a child.

This package is what both sides of a call agree on. Import it freely in workflow code: what it exports here does
no I/O and passes the workflow sandbox. The order team needs `create_client`, the payment team `emits_callback`, or
`external_target`.

A *call* goes like this. The caller's workflow schedules one activity; the activity POSTs a start to the handler
service, with a signed callback URL, and goes asynchronous. The handler service starts the target workflow and answers
at once. When the target has ended, an interceptor on its worker POSTs the outcome to the callback URL, where the
caller's receiver completes the waiting activity. The messages are Nexus RPC over HTTP.
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
