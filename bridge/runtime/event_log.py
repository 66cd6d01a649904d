"""Log lines for people and for machines: a constant name, a sentence, and fields.

A call site names the event and its fields. The sentence is in the table `events.toml`, so that every formatter shows
it, also that of `logging.basicConfig`. An event that is not in the table has its sentence where it is logged. No value
of a field can begin a new line or control a terminal.
"""

import json
import logging
import tomllib
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from bridge.runtime.tracing import trace_fields
from bridge.security.redaction import one_line, readable, without_task_tokens

LogFormat = Literal["text", "json"]
_MAX = 1000
_encode = json.JSONEncoder(default=str).encode

SENTENCES: Mapping[str, str] = {
    f"bridge.{name}": sentence
    for name, sentence in tomllib.loads(Path(__file__).with_name("events.toml").read_text("utf-8")).items()
}
"""The sentences of `events.toml` by event name."""


class _Fields(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "?"


class EventLogger(logging.LoggerAdapter[logging.Logger]):
    """Adds the sentence to an event: `log.info("bridge.nudged", extra={"bridge.request_id": request_id})`."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Called only for a level that is logged."""
        fields = {
            name: one_line(value, _MAX) if isinstance(value, str) else value
            for name, value in ({**(kwargs.get("extra") or {}), **trace_fields()}).items()
        }
        kwargs["extra"] = fields
        if (sentence := SENTENCES.get(msg)) is not None:
            named = _Fields((name.removeprefix("bridge."), value) for name, value in fields.items())
            msg = f"{msg}: {sentence.format_map(named)}"
        return msg, kwargs


def event_logger(name: str) -> EventLogger:
    """Return the logger of the module *name*."""
    return EventLogger(logging.getLogger(name))


def core_logger() -> logging.Logger:
    """Return the logger of the SDK's core, which quotes task tokens."""
    logger = logging.getLogger("temporalio.core")
    logger.addFilter(_redact)
    return logger


def _redact(record: logging.LogRecord) -> bool:
    record.msg = without_task_tokens(record.getMessage())
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, message, and the fields under `bridge.…`."""

    def format(self, record: logging.LogRecord) -> str:
        """*record* as one line of JSON. A record of another library has no event."""
        entry: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if entry["message"].startswith("bridge."):
            entry["event"], _, entry["message"] = entry["message"].partition(": ")
        entry |= _fields(record)
        if record.exc_info:
            entry["trace"] = self.formatException(record.exc_info)
        return _encode(entry)


class TextFormatter(logging.Formatter):
    """One line for people: time, level, event, sentence and fields. A traceback follows on indented lines."""

    def format(self, record: logging.LogRecord) -> str:
        """*record* as text without control characters."""
        fields = " ".join(f"{name.removeprefix('bridge.')}={value!s}" for name, value in _fields(record).items())
        line = one_line(f"{record.levelname:<7} {record.getMessage()}", 8 * _MAX)
        text = f"{_time(record)} {line}" + (f" [{one_line(fields, 8 * _MAX)}]" if fields else "")
        if record.exc_info:
            text += "\n    " + readable(self.formatException(record.exc_info), 32 * _MAX).replace("\n", "\n    ")
        return text


def _time(record: logging.LogRecord) -> str:
    return f"{_second(int(record.created))}.{int(record.msecs):03}+00:00"


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in record.__dict__.items() if name[:7] == "bridge."}


def configure_logging(level: str, log_format: LogFormat | None = None) -> None:
    """Log lines of *level* and above to standard error: text on a terminal, JSON elsewhere, unless the format is given.

    Facts that no line shows are not collected, which makes a line a third cheaper.
    """
    handler = logging.StreamHandler()
    chosen = log_format or ("text" if handler.stream.isatty() else "json")
    handler.setFormatter(TextFormatter() if chosen == "text" else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # See "Optimization" in Python's logging HOWTO: without the file, no line walks the stack.
    logging._srcfile = None  # noqa: SLF001
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # The SDK's core warns about a heartbeat after a completion, and prints the task token.
    logging.getLogger("temporalio.worker").setLevel(max(logging.ERROR, logging.getLevelName(level.upper())))
