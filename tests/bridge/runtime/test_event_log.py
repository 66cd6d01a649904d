"""Log lines: a sentence for people in every formatter, a constant name and fields for machines, and no injection."""

import io
import json
import logging
import re

import pytest

from bridge.runtime.event_log import SENTENCES, EventLogger, JsonFormatter, TextFormatter
from scripts.environment.stack import ROOT

EVIL = "payment-7\x1b[2J\r\n2026-01-01 ERROR bridge.forged: all is well"
FIELDS = {
    "bridge.request_id": "4dc36f1b",
    "bridge.endpoint": "payments",
    "bridge.host": "payments.example",
    "bridge.attempt": 3,
    "bridge.reason": "cannot connect: ConnectionRefusedError",
    "bridge.next_s": 4.0,
}
SENTENCE = (
    "endpoint payments (payments.example) was not reached in attempt 3 of call 4dc36f1b: "
    "cannot connect: ConnectionRefusedError. Next attempt in 4.0 s"
)


def logged(formatter: logging.Formatter | None, name: str, **fields: object) -> str:
    """The output for one event, formatted by *formatter*."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.getLogger("caller.waiting.waiting_activity")
    logger.addHandler(handler)
    EventLogger(logger).warning(name, extra=fields)
    logger.removeHandler(handler)
    return stream.getvalue()


def test_a_plain_formatter_shows_the_sentence() -> None:
    """`logging.basicConfig` shows endpoint, host, reason, attempt and next try."""
    line = logged(logging.Formatter(logging.BASIC_FORMAT), "bridge.handler_not_reached", **FIELDS)
    assert line == f"WARNING:caller.waiting.waiting_activity:bridge.handler_not_reached: {SENTENCE}\n"


def test_json_separates_the_name_from_the_sentence() -> None:
    """Machines find the event by its name and the facts by their fields."""
    entry = json.loads(logged(JsonFormatter(), "bridge.handler_not_reached", **FIELDS))
    assert re.fullmatch(r"[0-9T:.+-]{29}", entry.pop("time"))
    assert entry == {
        "level": "warning",
        "logger": "caller.waiting.waiting_activity",
        "event": "bridge.handler_not_reached",
        "message": SENTENCE,
        **FIELDS,
    }


def test_text_shows_the_sentence_and_the_fields() -> None:
    """One line for a terminal."""
    line = logged(TextFormatter(), "bridge.handler_not_reached", **FIELDS)
    assert line.endswith(
        f" WARNING bridge.handler_not_reached: {SENTENCE} [request_id=4dc36f1b endpoint=payments host=payments.example "
        "attempt=3 reason=cannot connect: ConnectionRefusedError next_s=4.0]\n"
    )


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter(), logging.Formatter(logging.BASIC_FORMAT)])
def test_a_value_begins_no_line_and_controls_no_terminal(formatter: logging.Formatter) -> None:
    """An id of a peer stays on the line that names it."""
    line = logged(formatter, "bridge.close_not_noticed", **{"bridge.target": EVIL})
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert "[2J" in line


def test_a_record_of_another_library_stays_on_one_line() -> None:
    """Its traceback follows on indented lines."""
    with pytest.raises(ValueError, match="payment") as raised:
        int(EVIL)
    record = logging.LogRecord("aiohttp", logging.ERROR, "", 0, "broken %s", (EVIL,), raised._excinfo)
    first, *rest = TextFormatter().format(record).split("\n")
    assert "broken payment-7\ufffd[2J" in first
    assert all(line.startswith("    ") for line in rest)
    assert "\x1b" not in "".join(rest)
    assert "event" not in json.loads(JsonFormatter().format(record))


def test_a_field_that_is_missing_is_a_question_mark() -> None:
    """A sentence never raises an error."""
    assert "call ? renews now" in logged(logging.Formatter(), "bridge.nudged")


def test_every_event_of_the_code_has_a_sentence() -> None:
    """Either in the table or at its call site, after the name. And the table has no event that the code lacks."""
    named: set[str] = set()
    for package in ("bridge", "caller", "handler"):
        for path in (ROOT / package).rglob("*.py"):
            named |= set(re.findall(r"_log\.\w+\(\s*\"(bridge\.\w+)\"", path.read_text()))
    assert named == SENTENCES.keys()
