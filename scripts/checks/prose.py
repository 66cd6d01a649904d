"""Check the project's English: find words that make a sentence hard to read, and fields of records without a sentence.

`python -m scripts.checks.prose` prints every place as `file:line: what to write instead` and ends with code 1 if there
is one. It reads the files that version control knows.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

from scripts.environment.stack import ROOT

AVOIDED = (
    (r"tell(?:s|ing)?|told", "deliver, report, return, record, show"),
    (r"beside", "in addition to, with, next to"),
    (r"(?<=[,;:] )so(?! that\b)", "therefore, so that"),
    (r"(?-i:(?:is|are) none)", "is not a …"),
    (r"whatever|whoever|nobody|somebody", "the peer, the caller, no caller, any error"),
    (r"away|lets? go|taken on|handed over|brought home", "unavailable, evicted, released, started, passed to"),
    (r"own word|(?:proxy|receiver|handler|server|peer)'s word", "a signed answer, an unsigned answer"),
)
"""Pattern of a word, and what to write instead. From the first table of the project's rule for sentences."""

SUFFIXES = {".md", ".py", ".toml", ".yaml", ".sh"}
RECORDS = ("bridge/", "caller/", "handler/")
"""Folders in which every field of a record needs a sentence."""
_OWN = "scripts/checks/prose.py"
_WORD = re.compile(
    "|".join(rf"(?P<w{number}>(?<![a-zA-Z])(?:{word})(?![a-zA-Z]))" for number, (word, _) in enumerate(AVOIDED)),
    re.IGNORECASE,
)


def findings() -> Iterator[str]:
    """Every place that breaks the rule, as file, line number and remedy."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if name == _OWN or path.suffix not in SUFFIXES or not path.is_file():
            continue
        text = path.read_text()
        yield from (f"{name}:{finding}" for finding in avoided_words(text))
        if path.suffix == ".py" and name.startswith(RECORDS):
            yield from (f"{name}:{finding}" for finding in silent_fields(text))


def avoided_words(text: str) -> Iterator[str]:
    """The avoided words of *text*, as line number, word and cure. Parts of a name count: `told_cause`, `_tell`."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in _WORD.finditer(line):
            _, cure = AVOIDED[int((match.lastgroup or "w0")[1:])]
            yield f"{number}: {match[0]!r}: write {cure}"


def silent_fields(source: str) -> Iterator[str]:
    """The fields of dataclasses and models in *source* that no string describes, as line number and name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and _is_record(node):
            following = [*node.body[1:], None]
            for field, after in zip(node.body, following, strict=True):
                if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                    continue
                is_described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not is_described and not field.target.id.startswith("_"):
                    yield f"{field.lineno}: {node.name}.{field.target.id} has no sentence"


def _is_record(node: ast.ClassDef) -> bool:
    names = {ast.unparse(each).partition("(")[0].rpartition(".")[2] for each in (*node.decorator_list, *node.bases)}
    return bool(names & {"dataclass", "BaseModel", "BridgeSettings", "UrlEntry", "TypedDict"})


def main() -> None:
    """Print all findings. Exit with 1 if there is one."""
    found = sorted(findings())
    for each in found:
        print(each)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
