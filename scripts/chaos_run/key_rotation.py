"""A rotation of keys in the steps of docs/operations.md, while both sides use them.

Every running process reads its changed settings file by itself.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bridge.admin.pair import replace_content
from bridge.runtime.settings import read_toml
from bridge.security.keys import new_key

SIGNING_SIDES = {"start_keys": "caller", "completion_keys": "handler"}
"""Name of each key set that is rotated, and the side that signs with it. Both sides have both sets."""
_PEERS = {"caller": "handlers", "handler": "callers"}

KeySets = Mapping[str, Mapping[str, Any]]
"""Key sets by name, each as the settings have it: `signing` and `keys`."""


def rotation(old: KeySets, new_id: str) -> Sequence[Mapping[str, KeySets]]:
    """The key sets of each side after each step that replaces *old* by new keys with the id *new_id*."""
    new = {name: new_key() for name in old}
    added = {name: {**each, "keys": {**each["keys"], new_id: new[name]}} for name, each in old.items()}
    signing = {name: {**each, "signing": new_id} for name, each in added.items()}
    alone = {name: {"signing": new_id, "keys": {new_id: new[name]}} for name in old}

    def by_side(of_signer: KeySets, of_verifier: KeySets) -> Mapping[str, KeySets]:
        return {
            side: {name: (of_signer if SIGNING_SIDES[name] == side else of_verifier)[name] for name in old}
            for side in _PEERS
        }

    return [by_side(added, added), by_side(signing, added), by_side(alone, added), by_side(alone, alone)]


async def rotate(folder: Path, new_id: str, pause_s: float) -> None:
    """Rotate the keys of the settings in *folder*, with *pause_s* seconds between two steps."""
    [peer] = read_toml(folder / "caller.toml", "caller.toml")[_PEERS["caller"]].values()
    for step in rotation({name: peer[name] for name in SIGNING_SIDES}, new_id):
        for side, key_sets in step.items():
            file = folder / f"{side}.toml"
            replace_content(file, with_key_sets(file.read_text(), key_sets))
        await asyncio.sleep(pause_s)


def with_key_sets(settings: str, key_sets: KeySets) -> str:
    """Return the text of *settings* with other *key_sets*, each of which is on a line of its own."""
    for name, key_set in key_sets.items():
        keys = ", ".join(f'"{key_id}" = "{key}"' for key_id, key in key_set["keys"].items())
        line = f'{name} = {{ signing = "{key_set["signing"]}", keys = {{ {keys} }} }}'
        settings, count = re.subn(rf"^{name} = .*$", line, settings, flags=re.MULTILINE)
        if count != 1:
            message = f"{count} lines of the settings have {name}"
            raise ValueError(message)
    return settings
