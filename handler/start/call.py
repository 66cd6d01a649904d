"""One call of an operation: its start, the names that follow from it, and the record that its target keeps. Pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from temporalio.api.common.v1 import Callback, Payload

from bridge.errors import bad_request
from bridge.protocol.link import WorkflowRef
from bridge.protocol.start import StartRequest
from bridge.runtime.tracing import TRACEPARENT, trace_headers
from bridge.workflow.targets import Target
from handler.delivery.records import CallMemo, milliseconds, packed_reply

_PASSED_ON = frozenset({"temporal-callback-token", "source"})
"""Callback headers that a caller may ask us to send. Other headers could replace headers of the protocol."""
_MAX_CALLBACK_HEADERS = 2048
"""Limit in characters, because continue-as-new carries all attached calls and the server terminates a run at 2 MiB."""
_MAX_HOLD_MARGIN = timedelta(seconds=2)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One start with the names that follow from it."""

    caller: str
    """Authenticated name of the caller."""
    target: Target
    """The workflow that the operation stands for."""
    request: StartRequest
    """As the caller sent it."""
    payload: Payload
    """The operation's input, encoded."""
    workflow_id: str
    """Derived from the input by the target's `workflow_id`."""
    input_hash: str
    """Keyed hash of the decoded input."""
    temporal_request_id: str
    """Keyed hash by which Temporal recognizes an equal start."""
    token: str
    """Operation token of the answer."""
    server_callback: Callback.Nexus | None
    """To this callback Temporal's server delivers the outcome; None if a worker or the caller's renewals do."""
    hold: timedelta | None
    """How long the start is held open; None if it is answered at once."""
    renews: bool
    """Whether the caller repeats this start until it has the outcome."""
    deadline: timedelta
    """Time from now within which the outcome is delivered."""

    @property
    def identity(self) -> tuple[str, str]:
        """What names the call, as in `CallMemo.identity`."""
        return self.caller, self.request.request_id

    @property
    def is_renewal(self) -> bool:
        """Whether an earlier start was answered 201: this one names its operation by a token, and starts nothing."""
        return self.request.operation_token is not None

    @property
    def attaches_by_signal(self) -> bool:
        """Whether a run to which the call attaches has to know the call, to deliver to it or to watch its caller."""
        is_delivered = self.request.callback_url is not None and self.server_callback is None
        return self.target.instrumented and (is_delivered or self.target.caller_close_policy == "request_cancel")

    def memo(self, now: datetime) -> CallMemo:
        """Return the record of this call for the target's memo, or for the signal that attaches the call to a run.

        Raises:
            nexusrpc.HandlerError: BAD_REQUEST, the callback headers are too long.
        """
        request, source = self.request, WorkflowRef.from_links(self.request.links)
        passed_on = {name: each for name, each in request.callback_headers.items() if name in _PASSED_ON}
        if sum(len(name) + len(value) for name, value in passed_on.items()) > _MAX_CALLBACK_HEADERS:
            message = f"the callback headers are over {_MAX_CALLBACK_HEADERS} characters"
            raise bad_request(message)
        # If the server delivers, no worker has to.
        is_ours = self.server_callback is None
        return CallMemo(
            caller=self.caller,
            request_id=request.request_id,
            input_hash=self.input_hash,
            service=request.service,
            operation=request.operation,
            reply=packed_reply(
                operation_token=self.token,
                callback_url=request.callback_url if is_ours else None,
                callback_headers=passed_on if is_ours else {},
            ),
            deadline_ms=milliseconds(now + self.deadline),
            caller_namespace=source.namespace if source else "",
            caller_workflow_id=source.workflow_id if source else "",
            caller_run_id=source.run_id if source else "",
            caller_close_policy=self.target.caller_close_policy,
            held_ms=0 if self.hold is None else _answer_window_ms(self.hold),
            renews=self.renews,
            traceparent=trace_headers().get(TRACEPARENT, ""),
        )


def _answer_window_ms(hold: timedelta) -> int:
    """Return the time within which a closing run is delivered by the held start's own answer.

    It is shorter than *hold*, because the closing must reach the start while the start is still held.
    """
    return int((hold - min(hold / 5, _MAX_HOLD_MARGIN)) / timedelta(milliseconds=1))
