"""What is known of an operation since its handler took it on: the heartbeat details of the waiting activity.

People read them beside the pending activity, later attempts as proof of a 201, and the cancel finds its token in them.
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
    """Field names are those of the details: later releases read them."""

    operation_token: str
    target: str
    """For people: namespace, workflow and run."""
    link: str = ""
    started_ms: int = 0
    """When the first 201 was seen, Unix time in milliseconds; 0 if an early release recorded the details."""
    transport: Transport | None = None
    """How the operation was taken on."""

    @property
    def started(self) -> datetime | None:
        return datetime.fromtimestamp(self.started_ms / 1000, UTC) if self.started_ms else None

    @classmethod
    def from_answer(cls, answer: Running, *, transport: Transport, started: datetime) -> Self:
        return cls(
            operation_token=answer.operation_token,
            target=describe_target(answer.target),
            link="" if answer.target is None else answer.target.to_link().url,
            started_ms=int(started.timestamp() * 1000),
            transport=transport,
        )

    @classmethod
    def from_details(cls, details: Sequence[Any]) -> Self | None:
        """Read decoded heartbeat details; None where nothing was recorded.

        The SDK decodes details without a type hint: a team's converter may return any mapping or object.
        """
        if not details:
            return None
        found = details[0] if isinstance(details[0], Mapping) else getattr(details[0], "__dict__", {})
        kept = {name: found[name] for name in cls.__dataclass_fields__ if name in found}
        # Whatever is missing, that something was recorded proves a 201.
        return cls(**{"operation_token": "", "target": "", **kept})


def describe_target(target: WorkflowRef | None) -> str:
    """The target's name for people."""
    if target is None:
        return "the operation"
    return readable(f"{target.namespace}/{target.workflow_id} (run {target.run_id})", 1000)
