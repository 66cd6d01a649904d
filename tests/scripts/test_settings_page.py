"""The tables of docs/settings.md are those of the settings' models."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from scripts.checks.settings_page import BEGIN, END, PAGE, TABLES, page_with_tables


def test_the_page_is_as_new_as_the_settings() -> None:
    """A changed field, default or docstring makes the page stale."""
    page = PAGE.read_text()
    assert page == page_with_tables(page), "write the page: ./scripts/check --fix"


def test_what_is_written_by_hand_stays() -> None:
    """Only the text between the markers is replaced."""
    made = page_with_tables(f"before\n{BEGIN}old\n{END}after\n")
    assert made.startswith(f"before\n{BEGIN}")
    assert made.endswith(f"{END}after\n")
    assert "old" not in made.split()


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a value of type *kind* may hold."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from _models(field.annotation)
    for each in get_args(kind):
        yield from _models(each)


@pytest.mark.parametrize("side", [CallerSettings, HandlerSettings])
def test_every_model_of_the_settings_has_a_table(side: type[BaseModel]) -> None:
    """So does every field of the model."""
    page = PAGE.read_text()
    for model in _models(side):
        _, _, table = page.partition(f"\n### {TABLES[model]}\n")
        common = page.partition("\n### Both files\n")[2]
        for name in model.model_fields:
            rows = [each.partition("\n### ")[0] for each in (table, common)]
            assert any(f"\n| `{name}` | " in each for each in rows), f"{model.__name__}.{name}"
