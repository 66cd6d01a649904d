"""How far a sweep has come. Pure, and workflow-safe."""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta

from handler.delivery.records import milliseconds

WINDOW = timedelta(minutes=2)
"""Longest time after which visibility shows a closed run. Each query looks back by this time."""

_MAX_REMEMBERED = 5000
"""Maximum number of run ids in a place (about 300 kB). A run that drops out is looked up again; its delivery workflow
id prevents a second delivery."""

_MAX_UNREAD = 100
"""Maximum number of runs for which a query asks by id. If more cannot be read, the place does not move."""


@dataclass(frozen=True, kw_only=True)
class SweepPlace:
    """How far a sweep has come. Never rename a field: heartbeat details hold the names.

    The details hold one text, because the SDK decodes them without a type hint, and converters then differ.
    """

    until_ms: int
    """The sweep has handled all runs that closed before this time and were visible. Unix time in milliseconds."""
    handled: dict[str, int] = field(default_factory=dict)
    """Ids of the handled runs that the next query may show again, with their close time, Unix time in milliseconds."""
    unread: dict[str, int] = field(default_factory=dict)
    """Ids of the runs that could not be read or delivered yet, with their close time. Every query asks for them, until
    their retention ends."""

    @classmethod
    def read(cls, text: str) -> "SweepPlace":
        """Return the place that `text` has spelled."""
        return cls(**json.loads(text))

    @property
    def text(self) -> str:
        """The place as JSON."""
        return json.dumps(asdict(self))

    @property
    def since(self) -> datetime:
        """Earliest close time in the next query: `until_ms` minus `WINDOW`, because visibility may show a run late."""
        return datetime.fromtimestamp(self.until_ms / 1000, UTC) - WINDOW

    @property
    def query(self) -> str:
        """Visibility query for the runs that may not be handled yet."""
        query = f"CloseTime >= '{self.since.isoformat().replace('+00:00', 'Z')}'"
        ids = ", ".join(f"'{each}'" for each in self.unread)
        return f"({query} OR RunId IN ({ids}))" if ids else query

    @property
    def earliest_ms(self) -> int:
        """A time before which all runs are handled, without `unread`."""
        return min([self.until_ms, *self.unread.values()])

    @property
    def is_full(self) -> bool:
        """Whether the place may forget runs that a later query shows."""
        return len(self.trimmed().handled) >= _MAX_REMEMBERED

    def moved_to(self, instant: datetime, unread: dict[str, int]) -> "SweepPlace":
        """Return the place at *instant* with the runs that are *unread*, or at the old time if it is later.

        If too many runs are unread, the time stays, and the place has the runs that closed first.
        """
        first = dict(sorted(unread.items(), key=lambda each: each[1])[:_MAX_UNREAD])
        until_ms = self.until_ms if len(first) < len(unread) else max(self.until_ms, milliseconds(instant))
        return replace(self, until_ms=until_ms, unread=first)

    def trimmed(self) -> "SweepPlace":
        """Return the place without the runs that no later query shows, and with at most `_MAX_REMEMBERED` runs."""
        first = milliseconds(self.since)
        kept = sorted((closed, run_id) for run_id, closed in self.handled.items() if closed >= first)
        return replace(self, handled={run_id: closed for closed, run_id in kept[-_MAX_REMEMBERED:]})
