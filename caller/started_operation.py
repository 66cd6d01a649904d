"""What an attempt records once the handler has started the operation: the heartbeat details of the waiting activity.

Temporal's UI shows the details with the pending activity. Later attempts read them as proof of a 201 (still running).
The cancel activity reads the operation token from them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from bridge.protocol.link import WorkflowRef
from bridge.protocol.start import Running
from bridge.security.redaction import readable
from bridge.workflow.call import Transport


@dataclass(frozen=True, kw_only=True)
class StartedOperation:
    """The heartbeat details of a started operation. Never rename a field: later releases read the recorded details."""

    operation_token: str
    """The handler's token for the operation; empty if the details do not hold it."""
    target: str
    """For people: namespace, workflow and run."""
    link: str = ""
    """URL of the target's run in the form of a Temporal link; empty if the handler names no run."""
    started_ms: int = 0
    """When the first 201 was received, Unix time in milliseconds; 0 if an early release recorded the details."""
    transport: Transport | None = None
    """Transport with which the operation was started; None if an early release recorded the details."""

    @property
    def started(self) -> datetime | None:
        """`started_ms` as an instant; None if it is unknown."""
        return datetime.fromtimestamp(self.started_ms / 1000, UTC) if self.started_ms else None

    @classmethod
    def from_answer(cls, answer: Running, *, transport: Transport, started: datetime) -> Self:
        """Describe the operation of a 201 that was received at *started*."""
        return cls(
            operation_token=answer.operation_token,
            target=describe_target(answer.target),
            link="" if answer.target is None else answer.target.to_link().url,
            started_ms=int(started.timestamp() * 1000),
            transport=transport,
        )

    @classmethod
    def from_details(cls, details: Sequence[Any]) -> Self | None:
        """Read decoded heartbeat details; None if nothing was recorded.

        The SDK decodes details without a type hint. A team's converter may therefore return any mapping or object.
        """
        if not details:
            return None
        found = details[0] if isinstance(details[0], Mapping) else getattr(details[0], "__dict__", {})
        kept = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        # Details prove a 201 even if fields are missing.
        return cls(**{"operation_token": "", "target": "", **kept})


def describe_target(target: WorkflowRef | None) -> str:
    """Return the target's name for people."""
    if target is None:
        return "the operation"
    return readable(f"{target.namespace}/{target.workflow_id} (run {target.run_id})", 1000)
