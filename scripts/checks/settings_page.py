"""Write the tables of docs/settings.md from the settings' models: field, type, default and docstring.

`python -m scripts.checks.settings_page` ends with code 1 if the page is stale; `--fix` writes it. The text around the
two markers is written by hand.
"""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from bridge.http.route import Tls
from bridge.runtime.settings import BridgeSettings, ConsoleSettings
from bridge.security.egress import Destination
from bridge.security.keys import KeySet
from caller.settings import CallerSettings, Endpoint, HandlerPeer, Receiver
from handler.settings import CallerPeer, HandlerSettings, Limits, Service
from scripts.environment.stack import ROOT

PAGE = ROOT / "docs" / "settings.md"
BEGIN = "<!-- The tables are made by `./scripts/check --fix` from the docstrings of the settings. -->\n"
END = "<!-- End of the tables. -->\n"

TABLES: Mapping[type[BaseModel], str] = {
    BridgeSettings: "Both files",
    CallerSettings: "`caller.toml`",
    Receiver: "`[receiver]`",
    HandlerPeer: "`[handlers.<name>]`",
    Endpoint: "`[endpoints.<name>]`",
    HandlerSettings: "`handler.toml`",
    Service: "`[service]`",
    CallerPeer: "`[callers.<name>]`",
    Destination: "`callbacks`",
    Limits: "`limits`",
    KeySet: "Key set",
    Tls: "`tls`",
    ConsoleSettings: "`[console]`",
}
"""The models, in the order of the page, with their headings."""

_WORDS = {
    "str": "text",
    "bool": "boolean",
    "int": "integer",
    "float": "number",
    "HttpUrl": "URL",
    "Name": "name",
    "KeyId": "key id",
    "Key": "key",
    "Operation": "text",
    "_File": "path",
    "Network": "network",
}
"""Types as a reader knows them, by the name in the source."""
_BOUNDS = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}


def page_with_tables(page: str) -> str:
    """*page* with the present tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = "\n".join(f"### {heading}\n\n{_table(model)}" for model, heading in TABLES.items())
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def _table(model: type[BaseModel]) -> str:
    meaning, _, _ = inspect.cleandoc(model.__doc__ or "").partition("\n\n")
    rows = "".join(
        f"| `{name}` | {kind} | {_default(model.model_fields[name])} | {text} |\n"
        for name, kind, text in _fields(model)
    )
    return f"{meaning}\n\n| Name | Type | Default | Meaning |\n| --- | --- | --- | --- |\n{rows}"


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    """Name, type and meaning of the fields that *model* itself declares."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(body, ast.ClassDef)
    names = vars(sys.modules[model.__module__])
    for field, text in zip(body.body, body.body[1:], strict=False):
        name = field.target.id if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) else ""
        if isinstance(field, ast.AnnAssign) and name in model.model_fields:
            # `./scripts/check` makes sure that a sentence follows every field.
            assert isinstance(text, ast.Expr)
            assert isinstance(text.value, ast.Constant)
            kind = ", ".join([_kind(field.annotation, names), *_bounds(model.model_fields[name])])
            yield name, kind, " ".join(str(text.value.value).split())


def _kind(node: ast.expr, names: Mapping[str, Any]) -> str:
    """The type *node*, whose names are in *names*, in words; a model is a link to its table."""
    match node:
        case ast.BinOp(left=kind, right=ast.Constant(value=None)):
            return _kind(kind, names)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[kind, _])):
            return f"list, each a {_kind(kind, names)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, kind])):
            return f"one {_kind(kind, names)} for each {_kind(key, names)}"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[kind, *_])):
            return _kind(kind, names)
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case _:
            found = eval(ast.unparse(node), dict(names))
            if found in TABLES:
                return _link(found)
            if models := [each for each in get_args(found) if each in TABLES]:
                return _link(models[0])
            assert get_args(found), f"{ast.unparse(node)} needs words"
            return " or ".join(f"`{json.dumps(each)}`" for each in get_args(found))


def _link(model: type[BaseModel]) -> str:
    anchor = re.sub(r"[^a-z ]", "", TABLES[model].lower()).replace(" ", "-")
    return f"[{TABLES[model]}](#{anchor})"


def _bounds(field: FieldInfo) -> Iterator[str]:
    for each in field.metadata:
        yield from (f"{words} {getattr(each, name)}" for name, words in _BOUNDS.items() if hasattr(each, name))


def _default(field: FieldInfo) -> str:
    """What holds without the field, as the settings file has it."""
    match field.default:
        case _ if field.is_required():
            return "required"
        case None:
            return "not set"
        case BaseModel():
            return "as below"
        case tuple():
            return f"`{json.dumps([str(each) for each in field.default])}`"
        case _:
            return f"`{json.dumps(field.default)}`"


def main() -> None:
    """Compare the page with the models, or write it."""
    page = PAGE.read_text()
    made = page_with_tables(page)
    if "--fix" in sys.argv[1:]:
        PAGE.write_text(made)
    elif made != page:
        sys.exit("docs/settings.md is older than the settings: ./scripts/check --fix")


if __name__ == "__main__":
    main()
