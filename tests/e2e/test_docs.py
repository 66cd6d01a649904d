"""The documents are correct: link targets and named functions exist, settings load, snippets are Python."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from bridge.runtime.settings import load
from bridge.security.keys import new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings
from scripts.environment.stack import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def sections(page: Path) -> set[str]:
    """The anchors of the headings of *page*, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    """A link to a section, of the page itself or of another, leads to a heading."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            name, _, section = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not section or section in sections(file), target


def test_the_readme_leads_to_every_page_and_there_are_at_most_twenty() -> None:
    readme, names = (ROOT / "README.md").read_text(), {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}
    assert {name for name in names if f"({name}" not in readme} == set()
    assert len(names) <= 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_snippet_parses(page: Path) -> None:
    """Every snippet parses unchanged; `await` at top level is allowed."""
    for block in blocks(page, "python"):
        compile(block, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_tests_in_the_documents_are_tests_that_run() -> None:
    """Each snippet of the page is a part of the file with the tests."""
    source = (ROOT / "tests" / "e2e" / "test_testing_page.py").read_text()
    snippets = blocks(ROOT / "docs" / "testing.md", "python")
    assert len(snippets) == 3
    for snippet in snippets:
        assert snippet in source


def test_the_life_of_a_call_names_functions_that_exist() -> None:
    """Every `file` exists, and contains every `function` named after it."""
    rows = re.findall(r"`([a-z_/]+\.py)`((?: `[\w.]+`)+)", (ROOT / "docs" / "lifecycle.md").read_text())
    assert len(rows) > 15
    for name, functions in rows:
        source = (ROOT / name).read_text()
        for function in re.findall(r"`([\w.]+)`", functions):
            for part in function.split("."):
                assert re.search(rf"(def|class) {part}\b", source), f"{name}: {part}"


def test_every_row_of_the_threat_model_names_tests_that_exist() -> None:
    """The last cell of a row has files, and after each file the tests in it."""
    table = (ROOT / "docs" / "security.md").read_text().partition("## Threat model")[2].partition("\n## ")[0]
    rows = [row.rpartition(" | ")[2] for row in re.findall(r"^\| (?!---|Who ).* \|$", table, re.MULTILINE)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[a-z0-9_/]+\.py)`((?:,? `test_\w+`)+)", row)
        assert named, row
        assert row.count("`test_") == sum(tests.count("`test_") for _, tests in named), row
        for name, tests in named:
            for test in re.findall(r"`(test_\w+)`", tests):
                assert re.search(rf"def {test}\(", (ROOT / name).read_text()), f"{name} has no {test}"


@pytest.mark.parametrize(("number", "model"), [(0, CallerSettings), (1, HandlerSettings)])
def test_the_settings_in_the_documents_load(number: int, model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Real keys replace the placeholders."""
    text = blocks(ROOT / "docs" / "settings.md", "toml")[number]
    path = tmp_path / "settings.toml"
    path.write_text(re.sub(r"KEY-\d", lambda _: new_key(), text))
    monkeypatch.setenv("BRIDGE_CONFIG", str(path))
    assert load(model).name in {"order-prod", "payment-prod"}


def test_every_dependency_has_a_reason_and_every_reason_a_dependency() -> None:
    """The table has one line for each declared package."""
    project = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    declared = set(re.findall(r'^  "([a-z-]+)', project, flags=re.MULTILINE))
    table = (ROOT / "docs" / "development.md").read_text().partition("## What the product stands on")[2]
    rows = re.findall(r"^\| ([a-z][a-z-]+[^|]*) \|", table, flags=re.MULTILINE)
    assert {row.partition(" ")[0] for row in rows} == declared


def test_every_ending_names_a_test_that_exists() -> None:
    """Each row of the tables cites its test."""
    page = (ROOT / "docs" / "endings.md").read_text()
    rows = re.findall(r"`((?:e2e|handler|caller)/[\w/]+\.py)` `(test_\w+)`", page)
    cancels = [("e2e/test_cancel.py", name) for name in re.findall(r"\| `(test_\w+)` \|$", page, flags=re.MULTILINE)]
    assert len(rows) > 20
    assert len(cancels) == 4
    for name, test in rows + cancels:
        assert f"def {test}(" in (ROOT / "tests" / name).read_text(), f"{name}: {test}"
