"""Log lines for people and for machines: a constant name, a sentence, and fields.

A call site names the event and its fields. The sentence is in the table below, so that every formatter shows it, also
that of `logging.basicConfig`. An event that is not in the table has its sentence where it is logged. No value of a
field can begin a new line or control a terminal.
"""

import json
import logging
from collections.abc import MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

from bridge.runtime.tracing import trace_fields
from bridge.security.redaction import one_line, readable, without_task_tokens

LogFormat = Literal["text", "json"]
_MAX = 1000
_encode = json.JSONEncoder(default=str).encode

SENTENCES = {
    "bridge.attached_calls_dropped": "{calls} calls attached to {target} did not fit into its next run; their renewals "
    "get the outcome",
    "bridge.attempt_not_reported": "an attempt of call {request_id} was not reported: Temporal answered {rpc_status}, "
    "usually because the callback came first",
    "bridge.authorize_failed": "authorize {error} for {operation}, called by {caller}: nothing started, the caller "
    "repeats. To refuse a start, authorize raises PermissionError",
    "bridge.cancel_not_sent": "the cancel of call {request_id} through endpoint {endpoint} was not sent: {reason}. "
    "It is sent again",
    "bridge.cause_unreadable": "the cause of a refusal was left out, because this worker cannot decode it: {error}",
    "bridge.close_not_noticed": "the close of {target} was not noticed: the sweep or a renewal delivers its outcome",
    "bridge.codec_failed": "the payload codec failed with {error}: the request or the sweep is repeated",
    "bridge.completion_delivered": "the outcome of {target} was delivered to {caller}: {answer}",
    "bridge.completion_invalid": "Temporal rejected the names in the callback of call {request_id}: {rpc_status}",
    "bridge.completion_not_delivered": "the outcome of {target} was not delivered to {caller}: {reason}. A delivery "
    "workflow repeats it",
    "bridge.completion_refused": "{caller} refuses the outcome of {target}: {reason}. After the repair: "
    "callback-bridge deliveries redeliver",
    "bridge.connecting": "connecting to Temporal at {temporal}, namespace {namespace}",
    "bridge.connections_exhausted": "a connection was not accepted: {reason}. The limit is {limit} connections",
    "bridge.console_failed": "a page of the console failed by a fault of this service: {error}",
    "bridge.console_listens": "the console is at {console}",
    "bridge.console_login": "operator {operator} logged in to the console from {remote}",
    "bridge.console_login_refused": "a login to the console from {remote} was refused: wrong token, or right after one",
    "bridge.console_redelivered": "operator {operator} asked the console to run delivery {delivery_id} again: {result}",
    "bridge.delivery_left_to_renewal": "the outcome of {target} is left to the caller's renewal and the sweep: {error}",
    "bridge.ending_swept": "the sweep delivered the outcome of {target} to {calls} calls",
    "bridge.endpoint_not_checked": "{rung}: {found}",
    "bridge.endpoint_not_ready": "{rung}: {found}",
    "bridge.files_not_taken": "changed files with {content} cannot be used, and the old content stays in use: {reason}",
    "bridge.files_taken": "changed files with {content} can be used",
    "bridge.handler_not_reached": "endpoint {endpoint} ({host}) was not reached in attempt {attempt} of call "
    "{request_id}: {reason}. Next attempt in {next_s} s",
    "bridge.internal_error": "a request failed by a fault of this service: {error}. The peer repeats it",
    "bridge.memo_unreadable": "a record of a call in {target} cannot be read: {error}. Nothing is delivered for it",
    "bridge.nudge_failed": "call {request_id} could not be asked to renew now ({rpc}): it renews by itself",
    "bridge.nudged": "call {request_id} renews now, because its failure came between two attempts",
    "bridge.operation_failed": "an operation failed with {error}: the caller gets it as the answer",
    "bridge.outcome_undelivered": "the outcome of {target_workflow_id} for {caller} was not delivered: {reason}. After "
    "the repair: callback-bridge deliveries redeliver {delivery_id}",
    "bridge.progress_unreadable": "a target's progress was left out, because this worker cannot decode it: {error}",
    "bridge.reference_not_taken": "{peer} sent a reference to external storage that is not shared: see shares_storage",
    "bridge.server_callback_refused": "this Temporal server may not send completions to {callback_host}: allow it in "
    "component.callbacks.allowedAddresses",
    "bridge.slow_http_parser": "aiohttp runs without its C parser: install a build of aiohttp that has it",
    "bridge.start_failed": "Temporal did not start a target: {rpc_status}. The caller is answered accordingly",
    "bridge.sweep_not_started": "the sweep was not started: {error}. Terminated targets are delivered by renewals only",
    "bridge.sweep_run_failed": "the sweep could not deliver the outcome of {target}: {error}. It tries again",
    "bridge.temporal_unavailable": "Temporal did not answer about call {request_id}: {rpc_status}. The handler repeats",
    "bridge.unsigned_answers": "{in_a_row} answers of {peer} in a row do not count: {answer}",
    "bridge.user_function_slow": "the check or workflow_id of {service}/{operation} took too long: the caller repeats",
    "bridge.user_function_unavailable": "the check or workflow_id of {service}/{operation} is unavailable: the caller "
    "repeats",
}
"""What happened, to whom, why and what happens next, by event name. The fields are those of the event."""


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
