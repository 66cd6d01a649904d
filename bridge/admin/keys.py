"""The commands `callback-bridge keys`: new keys, the start of a rotation, and what both sides of a pair have.

Only `new` prints a key. The settings that BRIDGE_CONFIG names decide whether `list` and `check` act for a caller or for
a handler, or the variables if there is no file. The settings of that side name the echos for its peers.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cyclopts import App
from pydantic import ValidationError
from temporalio.common import MetricMeter

from bridge.admin.command import CommandError
from bridge.admin.output import JsonOutput, print_list, to_json
from bridge.admin.pair import checked, replace_content, side_settings
from bridge.http.peer_check import ask_peers
from bridge.protocol.echo import Echo
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.settings import CONFIG_VARIABLE, PREFIX, load, read_toml
from bridge.security.keys import KeySet, new_key

keys = App(name="keys", help="Make, rotate and compare keys.")

Fingerprints = Mapping[Any, Mapping[str, str]]
"""Fingerprints by key set, by key id."""


@dataclass(frozen=True, kw_only=True)
class KeyReport:
    """One key of one key set."""

    key_set: str
    """Name of the key set in the settings."""
    key_id: str
    """Id of the key."""
    signs: bool
    """Whether it is the signing key."""
    made: datetime | None
    """When the key was made, if its id begins with a date, as the ids that we choose do."""
    fingerprint: str
    """The same for the same key. It does not reveal the key."""


@dataclass(frozen=True, kw_only=True)
class KeyComparison:
    """One key, as both sides of a pair have it."""

    peer: str
    """The endpoint or the callback URL that was asked."""
    key_set: str
    """`start_keys` or `completion_keys`."""
    key_id: str
    """Id of the key."""
    result: str
    """`same`, `differs`, `only here`, `only there`, or why the peer did not answer."""


@keys.command
def new(*, id: str | None = None, as_json: JsonOutput = False) -> None:  # noqa: A002 - the option's name
    """Print a key set with one new random key, as TOML. Never use one key in two key sets.

    Args:
        id: Key id. By default today's date.
    """
    key_id = id or time.strftime("%Y-%m-%d", time.gmtime())
    key_set = {"signing": key_id, "keys": {key_id: new_key()}}
    # The settings would refuse it later.
    checked(lambda: KeySet.model_validate(key_set))
    print(to_json(key_set) if as_json else _toml(key_set))


@keys.command
def rotate(file: Path, /, *, as_json: JsonOutput = False) -> None:
    """Add a new key to a key file, and print the steps that follow. The new key does not sign yet.

    Args:
        file: A key file: what `{ file = "..." }` in the settings names.
    """
    key_set, key_id = read_toml(file, str(file)), time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    try:
        old = KeySet.model_validate(key_set).signing
        key_set["keys"][key_id] = new_key()
        KeySet.model_validate(key_set)
    except ValidationError:
        message = f"{file} is no key file as `callback-bridge keys new` prints it, or has ten keys: remove an old one"
        raise CommandError(message) from None
    replace_content(file, _toml(key_set) + "\n")
    steps = [
        "copy the file to all processes of both sides that have this key set; each reads it when it next uses a key",
        "callback-bridge keys check: the new key must be the same on both sides",
        f'set signing = "{key_id}" in the file, and copy it to all processes of the side that signs',
        f"when bridge_key_uses_total of {old} grows no more, remove it, first on the side that signs",
        "in callback_keys, remove it when the calls that began before step 3 have ended",
    ]
    if as_json:
        print(to_json({"file": str(file), "added": key_id, "signing": old, "steps": steps}))
    else:
        print(f"{file}: added key {key_id}; {old} still signs. Next:")
        print("\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)))


@keys.command(name="list")
def list_(*, as_json: JsonOutput = False) -> None:
    """Show the keys of the settings: ids, ages and fingerprints."""
    reports = [
        KeyReport(key_set=name, key_id=each, signs=each == key_set.signing, made=_made(each), fingerprint=fingerprint)
        for name, key_set in load(_side()).key_sets.items()
        for each, fingerprint in key_set.fingerprints().items()
    ]
    print_list(reports, "key_set key_id signs made fingerprint", as_json=as_json)
    if not as_json:
        print("\nuses since the start of each process: the metric bridge_key_uses_total, by peer and key_id")


@keys.command
async def check(*, as_json: JsonOutput = False) -> None:
    """Ask each peer by a signed echo which keys it has, and compare fingerprints. No key leaves this machine.

    A peer that does not verify our signatures or does not sign its answers is not asked.
    """
    settings = load(_side())
    ours = LiveKeys(settings, Metrics(MetricMeter.noop))
    rows = []
    for probe, result in await ask_peers(settings.probes()):
        if result is not None:
            theirs = result.keys if isinstance(result, Echo) else str(result)
            rows += compared(probe.name, ours.fingerprints(probe.peer), theirs)
    print_list(rows, "peer key_set key_id result", as_json=as_json)
    if any(each.result != "same" for each in rows):
        message = "keys differ: see callback-bridge keys rotate, or a peer did not answer: see `pair check`"
        raise CommandError(message)


def compared(peer: str, ours: Fingerprints, theirs: Fingerprints | str) -> list[KeyComparison]:
    """One row for each key that at least one side has, or one in all if *theirs* says why *peer* did not answer."""
    if isinstance(theirs, str):
        return [KeyComparison(peer=peer, key_set="?", key_id="?", result=theirs)]
    rows = []
    for key_set, key_id in sorted({(name, each) for side in (ours, theirs) for name in side for each in side[name]}):
        here, there = (side.get(key_set, {}).get(key_id) for side in (ours, theirs))
        result = "same" if here == there else "differs"
        if here is None or there is None:
            result = "only there" if here is None else "only here"
        rows.append(KeyComparison(peer=peer, key_set=key_set, key_id=key_id, result=result))
    return rows


def _side() -> Any:
    path = os.environ.get(CONFIG_VARIABLE)
    content = read_toml(Path(path), path) if path else {}
    has_variable = any(each.upper().startswith(f"{PREFIX}CALLERS") for each in os.environ)
    return side_settings(
        "handler" if "callers" in content or (has_variable and "handlers" not in content) else "caller"
    )


def _toml(key_set: Mapping[str, Any]) -> str:
    listed = ", ".join(f'"{key_id}" = "{text.strip()}"' for key_id, text in key_set["keys"].items())
    return f'signing = "{key_set["signing"]}"\nkeys = {{ {listed} }}'


def _made(key_id: str) -> datetime | None:
    try:
        return datetime.fromisoformat(key_id[:10]).replace(tzinfo=UTC)
    except ValueError:
        return None
