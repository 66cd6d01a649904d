"""The records of a call: what the memo of a target holds, and the input of a delivery.

`CallMemo` is one memo field of the target, written when the target is started. `Delivery` is the input of a delivery
workflow. It names the run whose close event holds the outcome, and never holds the outcome. Both are plain JSON with
units in the field names, because histories keep them. This module imports little, because workflow code imports it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from bridge.security.packing import packed, unpacked
from handler.delivery.operation_token import OperationToken

MEMO_KEY = "bridge"
"""Memo field with the call that started a run. In a delivery workflow: the facts that `deliveries list` shows."""
ATTACHED_HEADER = "bridge-attached-"
"""Prefix of the header fields that hold attached calls after continue-as-new, one call in each field."""
ATTACH_SIGNAL = "bridge.attach"
"""Signal that attaches a call to a run. Its input is the call as a `CallMemo`."""
NATIVE_CALLER = "nexus:"
"""Prefix of the names of native Nexus callers. No caller in the settings can have such a name."""


@dataclass(frozen=True, kw_only=True)
class CallMemo:
    """The call behind a target. Never rename a field: memos hold the names."""

    caller: str
    """Authenticated name of the caller."""
    request_id: str
    """Id of the call. Renewals repeat it."""
    input_hash: str
    """Keyed hash of the decoded input. Hashes can be compared, and reveal nothing about the input."""
    service: str
    """Name of the Nexus service."""
    operation: str
    """Name of the operation in that service."""
    reply: str
    """Made by `packed_reply`: where and with which tokens to deliver the outcome, not readable at a glance."""
    deadline_ms: int
    """Instant at which attempts to deliver end, Unix time in milliseconds."""
    caller_namespace: str = ""
    """Namespace of the workflow that waits, from the caller's link; empty if there was no link."""
    caller_workflow_id: str = ""
    """Id of the workflow that waits, from the same link."""
    caller_run_id: str = ""
    """Run of the workflow that waits, from the same link."""
    caller_close_policy: str = "abandon"
    """"abandon" or "request_cancel": what happens to the target when no caller waits any more."""
    held_ms: int = 0
    """Milliseconds after the first run's start within which the held start's own answer delivers the outcome."""
    renews: bool = True
    """Whether the caller repeats its start until it has the outcome. If not, it depends on the sweep."""
    traceparent: str = ""
    """Span that started the target, in W3C form; empty without tracing. The delivery belongs to its trace."""

    def __post_init__(self) -> None:
        """Raise ValueError if `reply` cannot be read, so that every reader treats the record as another program's."""
        _ = self._reply

    @cached_property
    def _reply(self) -> tuple[str, str | None, dict[str, str]]:
        match unpacked(self.reply):
            case [str(token), str() | None as url, dict(headers)]:
                return token, url, headers
            case _:
                message = "not the reply of a call"
                raise ValueError(message)

    @property
    def identity(self) -> tuple[str, str]:
        """What names the call: caller and request id. A request id is unique for one caller only."""
        return self.caller, self.request_id

    @property
    def operation_token(self) -> str:
        """The token with which the start was answered."""
        return self._reply[0]

    def is_of(self, workflow_id: str) -> bool:
        """Whether *workflow_id* carries out the call. A target may pass its memo to a child, which does not."""
        token = OperationToken.decode(self.operation_token)
        return token is not None and token.workflow_id == workflow_id

    @property
    def callback_url(self) -> str | None:
        """None if no message is sent: the caller polls, or Temporal's server delivers."""
        return self._reply[1]

    @property
    def callback_headers(self) -> dict[str, str]:
        """Headers that the caller asked to be sent with the completion."""
        return self._reply[2]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One outcome to deliver: the call that waits, and the run whose close event holds the outcome."""

    call: CallMemo
    """The call that waits."""
    workflow_id: str
    """Of the target."""
    run_id: str
    """Of the target's run that closed."""
    start_time_ms: int
    """Start of that run, Unix time in milliseconds."""

    @property
    def key(self) -> str:
        """Identifies the pair of call and run, and is the id of the delivery workflow, of which there is only one."""
        return delivery_id(self.call.caller, self.call.request_id, self.run_id)

    @property
    def start_time(self) -> datetime:
        """`start_time_ms` as an instant."""
        return datetime.fromtimestamp(self.start_time_ms / 1000, UTC)

    @property
    def memo(self) -> dict[str, str | int]:
        """The facts that a list of deliveries shows: no URL, header or token."""
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


def delivery_id(caller: str, request_id: str, run_id: str) -> str:
    """Return the id of the delivery workflow for a call and a run of its target.

    A request id is unique for one caller only. Calls of several callers may be attached to one run.
    """
    return f"bridge-delivery-{caller}:{request_id}-{run_id}"


def deliveries(calls: Iterable[CallMemo | None], workflow_id: str, run_id: str, start_time: datetime) -> list[Delivery]:
    """Return one delivery of the run for each of *calls* that has a callback URL. None stands for an unreadable call.

    Of several records of one call the first counts, because the callback URL of a renewal names the same waiting
    activity.
    """
    usable = [call for call in calls if call is not None and call.callback_url is not None]
    first = {call.identity: call for call in reversed(usable)}
    start = milliseconds(start_time)
    return [Delivery(call=call, workflow_id=workflow_id, run_id=run_id, start_time_ms=start) for call in first.values()]


def packed_reply(
    *, operation_token: str, callback_url: str | None, callback_headers: Mapping[str, str] | None = None
) -> str:
    """Return the field `CallMemo.reply`. A memo or signal that UI and CLI show then has no token in plain sight."""
    return packed([operation_token, callback_url, dict(callback_headers or {})])


def milliseconds(instant: datetime) -> int:
    """Return *instant* as Unix time in milliseconds, the form of instants in histories."""
    return int(instant.timestamp() * 1000)
