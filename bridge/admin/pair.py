"""How two teams meet: `callback-bridge pair` makes and takes one file with all that both sides must agree on.

The file holds names, URLs, allowed operations and the two shared key sets. Each side takes it into its own settings.
The keys that only one side has are made when that side's settings are written.
"""

import json
import os
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from cyclopts import App, Parameter
from pydantic import BaseModel, ConfigDict, ValidationError

from bridge.admin.command import CommandError
from bridge.runtime.settings import CONFIG_VARIABLE, Name, Operation, read_toml, settings_folder
from bridge.security.egress import HttpUrl
from bridge.security.keys import KeySet, new_key

Side = Literal["caller", "handler"]
_T = TypeVar("_T")
_LOCAL = ('networks = ["127.0.0.0/8"]', "allow_insecure = true")
"""Added to a URL with plain http, which is for one machine only."""

pair = App(name="pair", help="Connect two teams: make a file with what both sides must agree on, take it, and check.")


class Pair(BaseModel):
    """What one caller and one handler agree on."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    caller: Name
    """Name of the caller in the handler's settings."""
    handler: Name
    """Name of the handler in the caller's settings."""
    endpoint: Name
    """Name that the caller's workflows pass to `bridge.create_client`."""
    receiver_url: HttpUrl
    """The receiver's URL for the handler."""
    service_url: HttpUrl
    """The handler service's URL for the caller."""
    operations: tuple[Operation, ...]
    """Operations that the caller may start: `Service/operation`, or `Service/*`."""
    start_keys: KeySet
    """Signs and verifies starts."""
    completion_keys: KeySet
    """Signs and verifies completions."""

    @classmethod
    def with_new_keys(cls, **agreed: object) -> Self:
        """A pair with two new key sets.

        Raises:
            pydantic.ValidationError: A name or URL cannot be used.
        """
        start, completion = ({"signing": "k1", "keys": {"k1": new_key()}} for _ in range(2))
        return cls.model_validate({**agreed, "start_keys": start, "completion_keys": completion})

    def text(self) -> str:
        """The pair as TOML."""
        agreed = [f"{name} = {_text(value)}" for name, value in self if not isinstance(value, KeySet)]
        return "\n".join(["# What two teams agree on. Keep this file secret.", *agreed, self._keys])

    @property
    def _keys(self) -> str:
        return f"start_keys = {_inline(self.start_keys)}\ncompletion_keys = {_inline(self.completion_keys)}\n"

    def settings(self, side: Side, *, port: int | None = None, task_queue: str = "") -> str:
        """New settings of *side*, with the keys that only this side has. By default plain http names the *port*."""
        name, url, own = self.caller, self.receiver_url, f"[receiver]\nurl = {_text(self.receiver_url)}"
        first = f'callback_keys = {{ signing = "k1", keys = {{ k1 = "{new_key()}" }} }}'
        if side == "handler":
            name, url, own = self.handler, self.service_url, f"[service]\nurl = {_text(self.service_url)}"
            first = f'task_queue = {_text(task_queue or name)}\nhash_key = "{new_key()}"'
        if port is None and _local(url):
            port = urlsplit(url).port or 80
        lines = [
            f"# Settings of the {side}'s side. Keep this file secret.",
            f'name = "{name}"',
            f'namespace = "{name}"',
        ]
        lines += [first, "", own, *([] if port is None else [f"port = {port}"]), *(_local(url)[1:]), ""]
        return "\n".join(lines) + self.entry(side)

    def entry(self, side: Side) -> str:
        """The entry of the other side for the settings of *side*."""
        if side == "handler":
            callback = ", ".join([f"url = {_text(self.receiver_url + '/callbacks')}", *_local(self.receiver_url)])
            operations = f"operations = {_text(self.operations)}"
            return f"\n[callers.{_key(self.caller)}]\n{operations}\n{self._keys}callbacks = [{{ {callback} }}]\n"
        url = f"url = {_text(f'{self.service_url}/c/{self.caller}')}"
        endpoint = "\n".join([url, f'handler = "{self.handler}"', *_local(self.service_url)])
        return f"\n[handlers.{_key(self.handler)}]\n{self._keys}\n[endpoints.{_key(self.endpoint)}]\n{endpoint}\n"


def write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write each text into *folder* under its name. Only the owner may read the files.

    Raises:
        CommandError: One of the files exists. Nothing is written.
    """
    for name in texts:
        if (folder / name).exists():
            message = f"{folder / name} exists already and is not replaced: its keys may be in use"
            raise CommandError(message)
    for name, text in texts.items():
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode())


def replace_content(file: Path, text: str) -> None:
    """Replace what is in *file* at once. Owner, group, mode and a link stay, so that a service can still read it.

    Raises:
        CommandError: This user may not keep the owner and the group. Nothing is changed.
    """
    path = file.resolve()
    found, written = path.stat(), path.with_name(f".{path.name}.new")
    try:
        written.touch(mode=0o600)
        os.chown(written, found.st_uid, found.st_gid)
        written.chmod(found.st_mode & 0o777)
        written.write_bytes(text.encode())
        written.replace(path)
    except PermissionError:
        message = f"{path} belongs to user {found.st_uid}, group {found.st_gid}: run the command as its owner"
        raise CommandError(message) from None
    finally:
        written.unlink(missing_ok=True)


@pair.command
def make(
    file: Path,
    /,
    *,
    caller: str,
    handler: str,
    receiver_url: str,
    service_url: str,
    operations: list[str],
    endpoint: str | None = None,
) -> None:
    """Make a file for two teams with new keys. Both teams then take it. Send it over a channel that keeps it secret.

    Args:
        file: File to write.
        caller: Name of the calling team, usually its Temporal namespace.
        handler: Name of the team that is called, usually its Temporal namespace.
        receiver_url: URL of the caller's receiver, as the handler reaches it.
        service_url: URL of the handler service, as the caller reaches it.
        operations: Operations that the caller may start: `Service/operation`, or `Service/*`.
        endpoint: Name that the caller's workflows use for the handler. By default the handler's name.
    """
    agreed = {"caller": caller, "handler": handler, "receiver_url": receiver_url, "service_url": service_url}
    made = checked(lambda: Pair.with_new_keys(**agreed, operations=operations, endpoint=endpoint or handler))
    write_new(file.parent, {file.name: made.text()})
    print(f"written: {file}\n{_fingerprints(made)}")
    print(f"Each team: callback-bridge pair take {file.name} --as caller, or --as handler")


@pair.command
def take(file: Path, /, *, side: Annotated[Side, Parameter(name="--as")], task_queue: str = "") -> None:
    """Write what a file of `make` says into the settings that BRIDGE_CONFIG names. Settings that do not exist are made.

    Args:
        file: File that `make` wrote.
        side: The side of the team that takes it.
        task_queue: Task queue of the handler's workflows, for new settings. By default the handler's name.
    """
    taken = checked(lambda: Pair.model_validate(read_toml(file, str(file))))
    path = Path(os.environ.get(CONFIG_VARIABLE) or f"{side}.toml")
    if not path.exists():
        write_new(path.parent, {path.name: taken.settings(side, task_queue=task_queue)})
    else:
        name, added = getattr(taken, side), taken.entry(side)
        if read_toml(path, str(path)).get("name") != name:
            message = f"{path} has not the name {name!r}: these are the settings of another side"
            raise CommandError(message)
        present = path.read_text(encoding="utf-8-sig")
        try:
            tree = tomllib.loads(present + added)
        except tomllib.TOMLDecodeError:
            message = f"{path} has an entry for this peer or endpoint already; it is not changed"
            raise CommandError(message) from None
        # Settings that are complete only with variables of the service cannot be checked here.
        with settings_folder(path.parent):
            problem, earlier = _problem(side, tree), _problem(side, tomllib.loads(present))
        if problem is not None and earlier is None:
            message = f"{path} is not changed, because no process could start with the new entry: {problem}"
            raise CommandError(message)
        replace_content(path, present + added)
    print(f"written: {path}\n{_fingerprints(taken)}\nCompare the fingerprints with the other team, and delete {file}.")
    print(f"Then: BRIDGE_CONFIG={path} callback-bridge pair check --as {side}")


@pair.command
async def check(peer: str | None = None, /, *, side: Annotated[Side, Parameter(name="--as")]) -> None:
    """Check both directions between this side and *peer* by signed echos, as `doctor` does. Both sides must run.

    Args:
        peer: Name of the other side in the settings. By default all peers.
        side: The side of the team that checks.
    """
    await import_module(f"{side}.admin.doctor").doctor(peer=peer)


def side_settings(side: Side) -> Any:
    """Return the class of a side's settings. By name, because this package depends on neither side."""
    return getattr(import_module(f"{side}.settings"), f"{side.title()}Settings")


def _problem(side: Side, tree: dict[str, Any]) -> str | None:
    """Why *tree* cannot be the settings of *side*; None if it can."""
    model = side_settings(side)
    try:
        checked(lambda: model(**{name: each for name, each in tree.items() if name not in model.other_side}))
    except CommandError as error:
        return str(error)
    return None


def checked(make: Callable[[], _T]) -> _T:
    """Return what *make* returns.

    Raises:
        CommandError: A value cannot be used. The text names its field.
    """
    try:
        return make()
    except ValidationError as error:
        found = error.errors(include_input=False, include_context=False, include_url=False)
        # The text of a rule for several fields begins with the field.
        fields = [f"{each['loc'][0]}: " if each["loc"] else "" for each in found]
        reasons = [each["msg"].removeprefix("Value error, ") for each in found]
        message = "; ".join(map("".join, zip(fields, reasons, strict=True)))
        raise CommandError(message) from None


def _text(value: object) -> str:
    """Return a text, or a list of texts, as TOML. JSON writes some characters as two escapes, which TOML refuses."""
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return _text(name) if "." in name else name


def _local(url: str) -> tuple[str, ...]:
    return _LOCAL if url.startswith("http:") else ()


def _inline(key_set: KeySet) -> str:
    keys = ", ".join(f'{key_id} = "{key.get_secret_value()}"' for key_id, key in key_set.keys.items())
    return f'{{ signing = "{key_set.signing}", keys = {{ {keys} }} }}'


def _fingerprints(pair: Pair) -> str:
    both = {"start_keys": pair.start_keys, "completion_keys": pair.completion_keys}
    return "\n".join(
        f"{name} {key_id}: {text}" for name, each in both.items() for key_id, text in each.fingerprints().items()
    )
