"""How an outcome is recorded in the event that closes the waiting activity: the result or the failure, and the receipt.

The receipt is the text in the event's `identity`. By it, and without a store, `answer_by` decides whether an
outcome is a repeat, a conflict, or too late. Pure functions.
"""

import hashlib
from dataclasses import dataclass
from enum import Enum
from typing import Any
from urllib.parse import quote, unquote

from temporalio.api.common.v1 import Payloads
from temporalio.api.enums.v1 import EventType, RetryState
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent

from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from bridge.security.redaction import one_line
from bridge.workflow.call import OPERATION_UNSUCCESSFUL, UNSUCCESSFUL_MESSAGE

_MAX_IDENTITY_BYTES = 1000

CLOSINGS = {
    EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
    EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED,
}
"""Types of the events that close an activity."""


class CompletionAnswer(Enum):
    """Result of a completion."""

    COMPLETED = "completed"
    """The outcome is recorded now."""
    REPEATED = "repeated"
    """The same outcome was recorded before."""
    CONFLICT = "conflict"
    """Another outcome was recorded before."""
    OVER = "over"
    """The wait has ended without an outcome: deadline, cancellation, closed workflow."""
    UNKNOWN = "unknown"
    """No such wait is in history: it never existed, or its retention has passed."""
    AGAIN_LATER = "again later"
    """The activity is still pending, or Temporal did not do what it was asked for."""


def receipt(request_id: str, target: WorkflowRef | None, outcome: Outcome) -> str:
    """Return the receipt of an outcome: the text for the close event's `identity`.

    A receipt begins with the target's name, for people. Its last word is the same for equal outcomes.
    """
    run_id = target.run_id if target is not None else _digest(outcome)
    word = f"bridge:{request_id}:{quote(run_id)[:400]}:{outcome.state.value}"
    name = "" if target is None else one_line(f"{target.namespace}/{target.workflow_id}", _MAX_IDENTITY_BYTES)
    room = _MAX_IDENTITY_BYTES - len(word) - 1
    return f"{name.encode()[:room].decode(errors='ignore')} {word}".lstrip()


def _digest(outcome: Outcome) -> str:
    """Hash the outcome of a peer that names no run. Without it, a second, different result would pass as a repeat."""
    content = outcome.result or outcome.failure
    serialized = b"" if content is None else content.SerializeToString(deterministic=True)
    return hashlib.sha256(serialized).hexdigest()[:32]


def event_attributes(event: HistoryEvent) -> Any:
    """Return the member of *event* that holds its attributes."""
    return getattr(event, event.WhichOneof("attributes") or "")


def _identity(event: HistoryEvent) -> str:
    # The event of a timeout has no identity.
    return str(getattr(event_attributes(event), "identity", ""))


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the close event of a waiting activity shows about the outcome."""

    target: WorkflowRef | None
    """The run whose outcome it is; None if the handler named none."""
    state: str
    """State of the operation."""


def read_receipt(event: HistoryEvent) -> Receipt | None:
    """Return the receipt in an event that closed a waiting activity; None if the wait ended without an outcome."""
    name, _, _ = (identity := _identity(event)).rpartition(" ")
    if (word := _last_word(identity)) is None:
        return None
    _, run_id, state = word.rsplit(":", 2)
    namespace, _, workflow_id = name.partition("/")
    target = WorkflowRef(namespace=namespace, workflow_id=workflow_id, run_id=unquote(run_id)) if workflow_id else None
    return Receipt(target=target, state=state)


def is_receipt_of(request_id: str, closing: HistoryEvent) -> bool:
    """Return whether the event *closing* has a receipt of the call *request_id*."""
    return (_last_word(_identity(closing)) or "").startswith(f"bridge:{request_id}:")


def _last_word(identity: str) -> str | None:
    """Return the last word of a receipt, which is equal for equal outcomes; None if *identity* is not a receipt."""
    word = identity.rpartition(" ")[2]
    return word if word.startswith("bridge:") and word.count(":") > 2 else None


def answer_by(closing: HistoryEvent, identity: str) -> CompletionAnswer:
    """Return what a completion with the receipt *identity* means after the event *closing*."""
    recorded = _last_word(_identity(closing))
    if recorded is None:
        return CompletionAnswer.AGAIN_LATER if _is_stopped(closing) else CompletionAnswer.OVER
    return CompletionAnswer.REPEATED if recorded == _last_word(identity) else CompletionAnswer.CONFLICT


def _is_stopped(event: HistoryEvent) -> bool:
    """Whether the activity ended without an outcome and before the deadline. The workflow then schedules it again."""
    failed = event.activity_task_failed_event_attributes
    return (
        event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED
        and failed.failure.application_failure_info.type != OPERATION_UNSUCCESSFUL
        and failed.retry_state != RetryState.RETRY_STATE_TIMEOUT
    )


def result_of(outcome: Outcome) -> Payloads:
    """Return the result of an operation that succeeded, as the result of its waiting activity."""
    return Payloads(payloads=[] if outcome.result is None else [outcome.result])


def final_failure(failure: Failure) -> Failure:
    """Wrap *failure* so that the waiting activity is not retried, even if *failure* itself is retryable."""
    wrapper = Failure(message=UNSUCCESSFUL_MESSAGE)
    wrapper.application_failure_info.type = OPERATION_UNSUCCESSFUL
    wrapper.application_failure_info.non_retryable = True
    wrapper.cause.CopyFrom(failure)
    return wrapper
