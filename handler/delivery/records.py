"""What a target carries of a call, and what a delivery is given.

`CallMemo` is one memo field of the target, written when the target is started. `Delivery` is the input of a delivery
workflow. It names the run whose close event holds the outcome, and never holds the outcome. Both are plain JSON with
units in the field names, because they stand in histories. This module imports the standard library alone, because
workflow code imports it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

MEMO_KEY = "bridge"
"""Memo field of the call that started a run; of a delivery workflow, what `deliveries list` shows of it."""
ATTACHED_HEADER = "bridge-attached-"
"""Prefix of the header fields that carry attached calls over continue-as-new, one call a field."""
ATTACH_SIGNAL = "bridge.attach"
"""Signal that attaches a call to a run. Its input is that call as a `CallMemo`."""
NATIVE_CALLER = "nexus:"
"""Prefix of the name of a caller that came by native Nexus. No caller in the settings can have such a name."""


@dataclass(frozen=True, kw_only=True)
class CallMemo:
    """The call behind a target. The field names are those of the memo: never rename."""

    caller: str
    """Authenticated name of the caller."""
    request_id: str
    input_hash: str
    """Keyed hash of the decoded input. It can be compared and reveals nothing."""
    service: str
    operation: str
    operation_token: str
    callback_url: str | None
    """None: no message is to be sent. The caller asks, or Temporal's server delivers."""
    callback_headers: dict[str, str] = field(default_factory=dict)
    deadline_ms: int
    """When a delivery stops being worth an attempt, Unix time in milliseconds."""
    caller_namespace: str = ""
    caller_workflow_id: str = ""
    caller_run_id: str = ""
    caller_close_policy: str = "abandon"
    """"abandon" or "request_cancel": what happens to the target when no caller waits any more."""
    held_ms: int = 0
    """How long after the first run's start the start request is held open. Its answer carries an earlier outcome."""
    renews: bool = True
    """Whether the caller repeats its start until it has the outcome. Callers that do not depend on the sweep."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One outcome to be delivered: to whom, and whose close event holds it."""

    call: CallMemo
    workflow_id: str
    """Of the target."""
    run_id: str
    start_time_ms: int
    """Of the target's run, Unix time in milliseconds."""

    @property
    def key(self) -> str:
        """One call and one run."""
        return f"{self.call.request_id}-{self.run_id}"

    @property
    def workflow_id_of_delivery(self) -> str:
        """Id of the delivery workflow. It prevents a second delivery workflow for the same call and run."""
        return f"bridge-delivery-{self.key}"

    @property
    def start_time(self) -> datetime:
        return datetime.fromtimestamp(self.start_time_ms / 1000, UTC)

    @property
    def memo(self) -> dict[str, str | int]:
        """What a list of deliveries shows: no URL, header or token."""
        call = self.call
        return {
            "caller": call.caller,
            "request_id": call.request_id,
            "operation": f"{call.service}/{call.operation}",
            "deadline_ms": call.deadline_ms,
            "target_workflow_id": self.workflow_id,
            "target_run_id": self.run_id,
            "caller_namespace": call.caller_namespace,
            "caller_workflow_id": call.caller_workflow_id,
            "caller_run_id": call.caller_run_id,
        }


def milliseconds(instant: datetime) -> int:
    """Unix time in milliseconds, the form of instants in histories."""
    return int(instant.timestamp() * 1000)
