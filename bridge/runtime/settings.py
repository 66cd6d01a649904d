"""The bridge's own settings, checked before anything starts: one TOML file, overridden by variables `BRIDGE_…`.

Connections to Temporal are not part of them. They are configured as for every Temporal client
(`temporalio.envconfig`).
"""

import contextlib
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from bridge.security.keys import KEY_ID, KeySet
from bridge.security.redaction import without_keys

PREFIX = "BRIDGE_"
CONFIG_VARIABLE = "BRIDGE_CONFIG"

_SERVICE_LINK = re.compile(
    r"BRIDGE(_+[A-Z0-9]+)*_(SERVICE_HOST=(?!0\.0\.0\.0$|127\.|::1?$)[0-9A-F.:]+|"
    r"SERVICE_PORT(_[A-Z0-9_]+)?=\d+|PORT=\w+://.*|PORT_\d+_[A-Z]+(_[A-Z]+)?=.*)",
    re.DOTALL,
)
"""Variables that Kubernetes sets for a Service whose name begins with `bridge`, as NAME=value in upper case.

No Service has the address of all interfaces or of the loopback. A user who means `service.host` writes these."""
_FOLDER = ContextVar("folder of the settings file", default=Path())
"""Where relative paths start while settings are checked. For settings that are made in code: the working directory."""
_VARIABLE = "from the variable"
_SHAPES = {"tuple_type": "list", "dict_type": "table", "model_type": "table"}
"""What a value should have been, by the types of pydantic's errors."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]
"""Name of a caller, a handler or an endpoint. It fits a path segment, and is shorter than every key."""

Operation = Annotated[str, Field(pattern=r"^.+/.+$")]
"""An operation that a caller may start: `Service/operation`, or `Service/*`."""


def in_settings_folder(path: Path) -> Path:
    """*path* as the settings mean it: if it is not absolute, it starts in the folder of the settings file."""
    return _FOLDER.get() / path


@contextlib.contextmanager
def settings_folder(folder: Path) -> Iterator[None]:
    """Let the relative paths of settings that are checked in the block start in *folder*."""
    before = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(before)


def _key_set_from_file(value: Any) -> Any:
    """The content of a key set. If *value* names a key file, it is read.

    Raises:
        ValueError: The file is unreadable, or *value* has keys too.
    """
    if not isinstance(value, dict) or value.get("file") is None:
        return value
    if len(value) > 1:
        message = "file: the key file has `signing` and `keys`; remove them here"
        raise ValueError(message)
    path = in_settings_folder(Path(str(value["file"])))
    if os.access(path, os.R_OK) and path.is_fifo():
        message = "file: a pipe can be read only once, and a key file is read again when it changes"
        raise ValueError(message)
    try:
        return {**read_toml(path, f"key file {path}"), "file": str(path)}
    except SettingsError as error:
        raise ValueError(str(error)) from None


Keys = Annotated[KeySet, BeforeValidator(_key_set_from_file)]
"""A key set in the settings: `{ signing = "…", keys = { … } }`, or `{ file = "…" }` with a TOML file of these fields.

A path that is not absolute starts in the folder of the settings file."""


def require_distinct_keys(key_sets: Mapping[str, KeySet]) -> None:
    """Refuse a key that is in two key sets: a message for one purpose or peer would be valid for another.

    Raises:
        ValueError: Two key sets share a key. The text names both.
    """
    seen: dict[bytes, str] = {}
    for where, key_set in key_sets.items():
        for key in key_set.raw().values():
            if seen.setdefault(key, where) != where:
                message = f"{seen[key]} and {where} share a key; every key set needs keys of its own"
                raise ValueError(message)


class SettingsError(Exception):
    """The settings cannot be used. The text names every bad field and quotes no value."""


class ConsoleSettings(BaseModel):
    """Where operators reach the console of a service, and who may log in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. On any other address than a loopback one, browsers log in only through a TLS proxy."""
    port: int = Field(default=8090, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    tokens: dict[Name, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(min_length=1)
    """SHA-256 of each operator's token, by the operator's name. `callback-bridge console token` makes both."""


class BridgeSettings(BaseModel):
    """Fields that both sides' settings have."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    other_side: ClassVar[frozenset[str]] = frozenset()
    """Names that only the other side's settings have. Both sides may share a file and an environment."""

    namespace: str | None = Field(default=None, min_length=1)
    """Temporal namespace of this side. Used if TEMPORAL_NAMESPACE and the profile name none. A process that connects to
    another namespace refuses to start."""
    data_converter: str | None = None
    """`module:attribute` of the data converter with which the command line connects."""
    metrics_address: str | None = Field(default=None, pattern=r"^.+:[0-9]{1,5}$")
    """IP address and port, as address:port, on which `receiver serve` and `handler serve` serve Prometheus metrics, for
    everyone who reaches it."""
    console: ConsoleSettings | None = None
    """The console for operators. If it is left out, no console is served."""
    _given: dict[str, Any] = PrivateAttr()
    _is_loaded: bool = PrivateAttr(default=False)
    _file: str | None = PrivateAttr(default=None)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._given = given

    @property
    def key_sets(self) -> dict[str, KeySet]:
        """The key sets that can be rotated, by the names of their fields."""
        raise NotImplementedError

    @property
    def file(self) -> str | None:
        """The settings file that was read; None if none was. Settings that are made in code read key files only."""
        return self._file

    def read_again(self) -> Self:
        """Return the settings that the same files, variables and arguments give now, without changes by `model_copy`.

        Raises:
            SettingsError: Something is missing or bad.
        """
        if self._is_loaded:
            return _read(type(self), self._file, self._given)
        return _checked(type(self), self._given, where="the arguments or a key file")

    def check_namespace(self, connected: str) -> None:
        """Refuse the namespace *connected* if the settings name another one.

        Raises:
            SettingsError: The text names both.
        """
        if self.namespace not in {None, connected}:
            message = (
                f"connected to namespace {connected}, but `namespace` in the settings is {self.namespace}: correct "
                "TEMPORAL_NAMESPACE or the connection of the worker's client, or the settings"
            )
            raise SettingsError(message)


_SettingsT = TypeVar("_SettingsT", bound=BridgeSettings)


def load(model: type[_SettingsT], **overrides: Any) -> _SettingsT:
    """Read the settings of one side: the file that BRIDGE_CONFIG names, variables over it, *overrides* over both.

    Raises:
        SettingsError: Something is missing or bad.
    """
    return _read(model, os.environ.get(CONFIG_VARIABLE) or None, overrides)


def _read(model: type[_SettingsT], path: str | None, overrides: Mapping[str, Any]) -> _SettingsT:
    content = read_toml(Path(path), f"{CONFIG_VARIABLE}={path}") if path else {}
    seen: dict[tuple[str, ...], str] = {}
    # Sorted, so that a table comes before its parts.
    for name in sorted(filter(_is_variable, os.environ), key=_folded):
        head, *rest = name[len(PREFIX) :].lower().split("__")
        # An unknown name stays in one piece, because it may be a key that holds the separator.
        is_known = head in model.model_fields or head in model.other_side
        field = _put(content, [head, *rest] if is_known else ["__".join((head, *rest))], _value(os.environ[name]))
        if (same := seen.setdefault(field, name)) != name:
            message = f"{_shown(same)} and {_shown(name)} set the same field; remove one of the two"
            raise SettingsError(message)
    values = {name: each for name, each in content.items() if name not in model.other_side} | {**overrides}
    where = path or f"the environment ({CONFIG_VARIABLE} names no file)"
    with settings_folder(Path(path or "").parent):
        settings = _checked(model, values, where=where, variables=list(seen.values()))
    # A pipe can be read only once.
    if path is None or Path(path).is_file():
        # The next reading takes this file and the variables as they are then.
        file = path and str(Path(path).absolute())
        settings._given, settings._is_loaded, settings._file = {**overrides}, True, file  # noqa: SLF001
    return settings


def _checked(
    model: type[_SettingsT], values: Mapping[str, Any], *, where: str, variables: Sequence[str] = ()
) -> _SettingsT:
    """Make settings of *values*, which are from *where* and from *variables*.

    Raises:
        SettingsError: Something is missing or bad.
    """
    try:
        return model(**values)
    except ValidationError as error:
        found = error.errors(include_input=False, include_context=False, include_url=False)
        problems = [
            _problem(model, each["loc"], each["type"], each["msg"].removeprefix("Value error, "), variables)
            for each in found
        ]
        if all(_VARIABLE in each for each in problems):
            where = "the environment"
        problems += [
            f"  {CONFIG_VARIABLE} must name the settings file of the {side}'s side; `callback-bridge init` writes both"
            for missing, side in ((("handlers",), "caller"), (("callers",), "handler"))
            if any(each["type"] == "missing" and each["loc"] == missing for each in found)
        ]
        raise SettingsError("\n".join([f"bad settings in {where}:", *problems])) from None


def _problem(
    model: type[BridgeSettings], location: tuple[int | str, ...], kind: str, text: str, variables: Sequence[str]
) -> str:
    """One line about a bad field: its name, a remedy, and those of *variables* that may have set it."""
    text = without_keys(text)
    # The text of a rule for several entries begins with the field.
    spelled = "__".join(map(str, location)) if location else text.partition(":")[0].replace(".", "__")
    place = _folded(spelled).split("__")
    paths = {name: _folded(name[len(PREFIX) :]).split("__") for name in variables}
    setting = [name for name, path in paths.items() if path == place[: len(path)]]
    # A missing field is a fault of the entry.
    entry = place[:-1] if kind == "missing" else place
    parts = [name for name, path in paths.items() if entry and entry == path[: len(entry)] and name not in setting]
    if kind == "extra_forbidden":
        known, more = _names_at(model, location[:-1]), set[str]()
        is_variable = any(paths[name] == place for name in setting)
        if is_variable and len(location) == 1:
            more = {"config"} | {f"{each}__{name}" for each in known for name in _names_at(model, (each,))}
        near = difflib.get_close_matches(str(location[-1]), known | more, n=1)
        like = "".join(near)
        if is_variable:
            like = _shown(PREFIX + "__".join(map(_folded, map(str, (*location[:-1], *near)))).upper())
        text = f"unknown name; did you mean {like}?" if near else f"unknown name; known: {', '.join(sorted(known))}"
        text += "; in a variable `__` joins the parts of a path" if is_variable and not near else ""
    if kind in _SHAPES:
        text = f"has to be a {_SHAPES[kind]}"
        text += "; a list or a table in a variable has to be JSON" if setting or parts else ""
    source = f" ({_VARIABLE} {', '.join(map(_shown, setting))})" if setting else ""
    source += f" (a part is from {', '.join(map(_shown, parts))})" if parts else ""
    return f"  {_field(location) or 'settings'}: {text}{source}"


def _shown(variable: str) -> str:
    """The name of a variable. A part of it that may be a key in a wrong place is left out."""
    parts = variable.removeprefix(PREFIX).split("__")
    # A key may hold the separator. A part of a key has letters of both cases.
    if any(part not in {part.lower(), part.upper()} for part in parts) and without_keys("__".join(parts)) == "…":
        return "…"
    return "__".join(map(without_keys, variable.split("__")))


def _names_at(kind: Any, location: tuple[int | str, ...]) -> set[str]:
    """The names that settings of type *kind* may have at *location*."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not location:
            return set(kind.model_fields)
        field = kind.model_fields.get(str(location[0]))
        return _names_at(field.annotation, location[1:]) if field is not None else set()
    if get_origin(kind) in {dict, tuple}:
        return _names_at(get_args(kind)[get_origin(kind) is dict], location[1:]) if location else set()
    return set().union(*(_names_at(each, location) for each in get_args(kind)))


def _is_variable(name: str) -> bool:
    """Whether the variable *name* should set a field. A template sets one that has no value to an empty text."""
    text = os.environ[name].strip()
    is_ours = text and name.upper().startswith(PREFIX) and name != CONFIG_VARIABLE
    return bool(is_ours) and not _SERVICE_LINK.fullmatch(f"{name}={text}".upper())


def _value(text: str) -> Any:
    """The value of a variable. A list or a table is JSON. A text that was read from a file ends with a newline."""
    text = text.strip()
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text) if text.startswith(("[", "{")) else text
    return text


def _put(table: dict[str, Any], path: list[str], value: Any) -> tuple[str, ...]:
    """Set the field of *table* that a variable names by *path*. A part of a table leaves the other parts.

    Names of variables do not distinguish cases, and many shells allow neither `-` nor `.` in them. The names in a JSON
    table are exact. Returns the names of the field that is set.

    Raises:
        SettingsError: A name could mean two entries.
    """
    name, *rest = path
    meant = [name] if name in table else [each for each in table if _folded(each) == _folded(name)]
    if len(meant) > 1:
        message = f"a variable BRIDGE_…__{name.upper()} could mean {' or '.join(meant)}; rename one of them in the file"
        raise SettingsError(without_keys(message))
    [key] = meant or [name]
    present = table.setdefault(key, {}) if rest else table.get(key)
    if not isinstance(present, dict):
        key = "__".join((key, *rest))
        table[key] = value
        return (key,)
    if rest:
        return (key, *_put(present, rest, value))
    if isinstance(value, dict):
        _merge(present, value)
    else:
        table[key] = value
    return (key,)


def _merge(table: dict[str, Any], parts: Mapping[str, Any]) -> None:
    for name, part in parts.items():
        if isinstance(part, dict) and isinstance(table.get(name), dict):
            _merge(table[name], part)
        else:
            table[name] = part


def read_toml(path: Path, where: str) -> dict[str, Any]:
    """The content of the TOML file at *path*, which errors call *where*.

    Raises:
        SettingsError: The file is unreadable. The text names the place and quotes nothing, because the line may hold a
            key.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        message = f"{where}: {unreadable(path, error)}"
        raise SettingsError(message) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text, line = "\0", raw[: error.start].count(b"\n") + 1
        where += f", line {line}"
    if "\0" in text:
        is_wide = b"\0" in raw
        message = f"{where}: not {'UTF-8 but perhaps UTF-16' if is_wide else 'UTF-8'}; save the TOML file as UTF-8"
        raise SettingsError(message)
    try:
        return tomllib.loads(text)
    except RecursionError:
        message = f"{where}: not TOML that can be read: nested too deeply"
        raise SettingsError(message) from None
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).rpartition(" (at ")
        last = f"line {text.rstrip().count(chr(10)) + 1}, where the file ends"
        place = place.rstrip(")").replace("end of document", last)
        reason = re.sub(r"'[^']{2,}'|\(.*\)", "…", reason)
        message = f"{where}, {place}: not TOML: {reason} (texts need quotes; a key or table may be there only once)"
        raise SettingsError(message) from None
    except ValueError:
        message = f"{where}: not TOML that can be read: a number has too many digits"
        raise SettingsError(message) from None


def unreadable(path: Path, error: OSError) -> str:
    """Why *path* is unreadable, and the remedy."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case IsADirectoryError():
            return "a folder; name the file in it"
        case PermissionError():
            try:
                found = path.stat()
            except OSError:
                return f"user {os.geteuid()} may not enter its folder; change the owner or the mode of the folder"
            facts = f"it belongs to user {found.st_uid} and has mode {found.st_mode & 0o777:04o}"
            return f"user {os.geteuid()} may not read the file; {facts}; change its owner or its mode"
        case _:
            return f"cannot be read: {error.strerror}"


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_").replace(".", "_")


def _field(location: tuple[int | str, ...]) -> str:
    # The names below `keys` are key ids. If a user swapped an id and its key, the log must not show the key.
    parts = [
        "…" if before == "keys" and not re.fullmatch(KEY_ID, str(part)) else str(part)
        for before, part in zip((None, *location), location, strict=False)
    ]
    return without_keys(".".join(parts))
