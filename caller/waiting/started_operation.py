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
from bridge.security.packing import packed, unpacked
from bridge.security.redaction import one_line
from bridge.workflow.call import Transport


@dataclass(frozen=True, kw_only=True)
class StartedOperation:
    """The heartbeat details of a started operation. Never rename a field: later releases read the recorded details."""

    target: str
    """For people: namespace, workflow and run."""
    link: str = ""
    """The target's page in the handler's UI. Without `ui_url` in the settings a Temporal link; empty without a run."""
    started_ms: int = 0
    """When the first 201 was received, Unix time in milliseconds; 0 if the details do not hold it."""
    transport: Transport | None = None
    """Transport with which the operation was started; None if the details do not hold it."""
    token_packed: str = ""
    """Made by `packed` from the handler's token for the operation, so that no token is in plain sight. The
    name sorts after `link` and `target`, because JSON lists fields by name."""

    @property
    def operation_token(self) -> str:
        """The handler's token for the operation; empty if the details do not hold it."""
        try:
            return str(unpacked(self.token_packed))
        except ValueError:
            return ""

    @property
    def started(self) -> datetime | None:
        """`started_ms` as an instant; None if it is unknown."""
        return datetime.fromtimestamp(self.started_ms / 1000, UTC) if self.started_ms else None

    @property
    def page(self) -> str:
        """The target's page in the handler's UI; empty if the settings did not name the UI."""
        return self.link if self.link.startswith("http") else ""

    @classmethod
    def from_answer(
        cls, answer: Running, *, transport: Transport, started: datetime, ui_url: str | None = None
    ) -> Self:
        """Describe the operation of a 201 that was received at *started*. *ui_url* is that of the handler's UI."""
        link = ""
        if answer.target is not None:
            link = answer.target.to_link().url if ui_url is None else answer.target.ui_url(ui_url)
        return cls(
            target=describe_target(answer.target),
            link=link,
            started_ms=int(started.timestamp() * 1000),
            transport=transport,
            token_packed=packed(answer.operation_token),
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
        return cls(**{"target": "", **kept})


def describe_target(target: WorkflowRef | None) -> str:
    """Return the target's name for people."""
    if target is None:
        return "the operation"
    return one_line(f"{target.namespace}/{target.workflow_id} (run {target.run_id})", 1000)
