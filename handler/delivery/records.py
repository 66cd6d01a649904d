"""What a target carries of the call that started it: one memo field, written by the starter, read by the interceptor.

Also the task that the interceptor hands to a delivery. Both are plain JSON with units in the names, because they stand
in histories. Imports only the standard library: workflow code uses them.
"""

from dataclasses import dataclass, field
from datetime import datetime

MEMO_KEY = "bridge"
"""Memo field of the call that started a run."""
ATTACHED_MEMO_KEY = "bridge-attached"
"""Memo field of the calls that were attached to the runs before this one, which continued as new."""
ATTACH_SIGNAL = "bridge.attach"
"""Attaches a call to a run; its input is that call as a `CallMemo`."""
NATIVE_CALLER = "nexus:"
"""Before the namespace of a caller that came by native Nexus; no caller in the settings can have such a name."""


@dataclass(frozen=True, kw_only=True)
class CallMemo:
    """The call behind a target. Field names are those of the memo: never rename."""

    caller: str
    """Authenticated name of the caller."""
    request_id: str
    input_hash: str
    """Keyed hash of the decoded input; comparable, but tells nothing."""
    service: str
    operation: str
    operation_token: str
    callback_url: str | None
    callback_headers: dict[str, str] = field(default_factory=dict)
    deadline_ms: int
    """Until when a delivery is worth trying, Unix time in milliseconds."""
    caller_namespace: str = ""
    caller_workflow_id: str = ""
    caller_run_id: str = ""
    on_orphaned: str = "keep"
    """"keep" or "cancel": what becomes of the target when nobody waits any more."""
    held_ms: int = 0
    """How long after the first run's start the start itself is held open: its answer tells an earlier ending."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One completion to be brought home. Its content, the result or the failure, travels beside it."""

    caller: str
    request_id: str
    operation_token: str
    callback_url: str
    callback_headers: dict[str, str]
    deadline_ms: int
    state: str
    """succeeded, failed or canceled."""
    workflow_id: str
    """Of the target."""
    run_id: str
    start_time_ms: int
    close_time_ms: int
    """When the target's outcome was certain, Unix time in milliseconds."""

    @classmethod
    def of(
        cls, call: CallMemo, *, state: str, workflow_id: str, run_id: str, start_time: datetime, close_time: datetime
    ) -> "Delivery":
        """Of a run's outcome to one of the calls that wait for it."""
        return cls(
            caller=call.caller,
            request_id=call.request_id,
            operation_token=call.operation_token,
            callback_url=call.callback_url or "",
            callback_headers=call.callback_headers,
            deadline_ms=call.deadline_ms,
            state=state,
            workflow_id=workflow_id,
            run_id=run_id,
            start_time_ms=milliseconds(start_time),
            close_time_ms=milliseconds(close_time),
        )

    @property
    def workflow_id_of_delivery(self) -> str:
        """Id of the workflow that takes the delivery over: nothing is told twice by it."""
        return f"bridge-delivery-{self.request_id}-{self.run_id}"


def milliseconds(instant: datetime) -> int:
    """Unix time in milliseconds, the form of instants in histories."""
    return int(instant.timestamp() * 1000)
