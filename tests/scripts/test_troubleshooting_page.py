"""docs/troubleshooting.md quotes texts, events and commands that this release has."""

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from bridge.admin import root
from bridge.runtime.event_log import SENTENCES
from scripts.environment.stack import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
PLACE = "…"
_FIELD = re.compile(r"\{\w+\}|%s")
_NAME = re.compile(r"bridge\.[a-z_]+")


def _texts() -> Iterator[str]:
    """Every text in the product's source, with `…` for each value that is filled in."""
    for package in ("bridge", "caller", "handler"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(str(each.value) if isinstance(each, ast.Constant) else PLACE for each in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield _FIELD.sub(PLACE, node.value)


TEXTS = sorted({*_texts(), *(_FIELD.sub(PLACE, each) for each in SENTENCES.values())})
EVENTS = set(SENTENCES) | {match[0] for text in TEXTS if (match := re.match(r"bridge\.[a-z_]+(?=:? )", text))}


def _quoted() -> list[str]:
    """What the first cells of the rows quote."""
    cells = re.findall(r"^\| (.*?) \|", PAGE, flags=re.MULTILINE)
    return [each for cell in cells for each in re.findall(r"`([^`]+)`", cell) if not _NAME.fullmatch(each)]


def test_the_page_quotes_enough() -> None:
    """The next tests cannot pass by finding nothing."""
    assert len(_quoted()) > 60
    assert len(EVENTS) > 45


@pytest.mark.parametrize("quoted", _quoted())
def test_a_quoted_text_is_a_text_of_the_source(quoted: str) -> None:
    """`…` stands where the source fills a value in."""
    assert any(quoted in text for text in TEXTS)


def test_every_event_has_a_row_and_every_row_an_event() -> None:
    """A new event needs a cause and a remedy, or the list of those that need no one."""
    named = set(re.findall(r"`(bridge\.[a-z_]+)`", PAGE.partition("## Lines in the log")[2]))
    assert named == EVENTS


@pytest.mark.parametrize("command", sorted(set(re.findall(r"callback-bridge ((?:[a-z]+(?![\w-]) ?)+)", PAGE))))
def test_every_command_exists(command: str) -> None:
    name, *rest = command.split()
    found: Any = getattr(root, name, None)
    if name in root.COMMANDS:
        module, _, attribute = root.COMMANDS[name].partition(":")
        found = getattr(import_module(module), attribute)
    assert found is not None
    for each in rest:
        assert found[each]
