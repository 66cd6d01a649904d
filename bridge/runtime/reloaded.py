"""Values that are made of files, and made again when the files have changed, without a restart.

There is no thread and no task: a value looks at its files when it is used, at most once a second. A service, a worker
and an activity therefore use it in the same way. A symbolic link that leads elsewhere, a file that was replaced by a
rename, and a file that was written in place all count as changed.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.settings import BridgeSettings, SettingsError
from bridge.security.keys import KeySet, KeySource

_PACE_S = 1.0

_log = event_logger(__name__)

T = TypeVar("T")


class Alarm:
    """Reports that changed files cannot be used: one log line for each fault, and a counter while the fault lasts."""

    def __init__(self, content: Literal["keys", "tls", "temporal"], metrics: Metrics) -> None:
        """*content* says what the files hold."""
        self._content = content
        self._metrics = metrics
        self._reason: str | None = None

    def raised(self, error: Exception) -> None:
        """Report that the old content stays in use because of *error*, whose text quotes no secret."""
        self._metrics.count("bridge_files_not_taken", content=self._content)
        reason, self._reason = self._reason, str(error)
        if reason != self._reason:
            extra = {"bridge.content": self._content, "bridge.reason": self._reason}
            _log.error("bridge.files_not_taken", extra=extra)

    def ended(self) -> None:
        """Report that the new content can be used."""
        self._reason = None
        _log.info("bridge.files_taken", extra={"bridge.content": self._content})


class Reloaded(Generic[T]):
    """The present value. If the changed files cannot be used, the old value stays, and an alarm is raised."""

    def __init__(
        self,
        value: T,
        *,
        make: Callable[[], T],
        files: Callable[[T], Iterable[Path]],
        alarm: Alarm,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with *value*, and do not look at the files yet.

        Args:
            value: The first value. The first look makes it again, because its files, if it has any, may have changed
                since.
            make: Makes the value of the files. It raises OSError, ValueError or SettingsError if they cannot be
                used.
            files: The files of which a value was made.
            alarm: Reports what happens.
            monotonic: A clock in seconds.
        """
        self._value = value
        self._make = make
        self._files = files
        self._alarm = alarm
        self._monotonic = monotonic
        self._seen: list[object] | None = None
        self._looked = monotonic()

    def __call__(self) -> T:
        """Return the present value."""
        if self._monotonic() - self._looked >= _PACE_S:
            self._looked = self._monotonic()
            # Take the state before the content, so that a later change is a difference.
            state = [_identity(each) for each in self._files(self._value)]
            if state and state != self._seen:
                is_first, self._seen = self._seen is None, []
                try:
                    self._value, self._seen = self._make(), state
                except (OSError, ValueError, SettingsError) as error:
                    self._alarm.raised(error)
                else:
                    if not is_first:
                        self._alarm.ended()
        return self._value


def _identity(path: Path) -> object:
    """What changes when the content or the rights of *path* change; None if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class LiveKeys:
    """The key sets of settings, as the settings file and the key files have them now.

    A key set that is no longer in the files keeps its last keys until a restart.
    """

    def __init__(self, settings: BridgeSettings, metrics: Metrics) -> None:
        self._kept: Mapping[str, KeySet] = settings.key_sets
        self._present = Reloaded[Mapping[str, KeySet]](
            self._kept, make=lambda: self._read(settings), files=partial(_files, settings), alarm=Alarm("keys", metrics)
        )

    def __call__(self, name: str) -> KeySource:
        """Return the source of the key set *name*, one of `key_sets` of the settings."""
        return lambda: self.look()[name]

    def look(self) -> Mapping[str, KeySet]:
        """Return the present key sets by name. A service that is not used calls it too, so that an alarm is raised."""
        return self._present()

    def fingerprints(self, peer: str) -> dict[str, dict[str, str]]:
        """The fingerprints by key id, by key set, of the keys shared with *peer*, which is a table of the settings."""
        names = [name for name in self._kept if name in {f"{peer}.start_keys", f"{peer}.completion_keys"}]
        return {name.rpartition(".")[2]: self(name)().fingerprints() for name in names}

    def _read(self, settings: BridgeSettings) -> Mapping[str, KeySet]:
        self._kept = {**self._kept, **settings.read_again().key_sets}
        return self._kept


def _files(settings: BridgeSettings, key_sets: Mapping[str, KeySet]) -> list[Path]:
    """The settings file, if *settings* were read from one, and the key files."""
    return [Path(each) for each in (settings.file, *(key_set.file for key_set in key_sets.values())) if each]
