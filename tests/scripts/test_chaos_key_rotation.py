"""The rotation of keys in a chaos run: after each step, each side accepts what the other one signs."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from bridge.admin.init import local_settings
from bridge.runtime.settings import read_toml
from bridge.security.keys import KeySet
from scripts.chaos_run.key_rotation import SIGNING_SIDES, KeySets, rotate, rotation, with_key_sets

OLD: KeySets = {
    name: {"signing": "k1", "keys": {"k1": letter * 43}} for name, letter in zip(SIGNING_SIDES, "ab", strict=True)
}


def test_in_every_step_the_verifying_side_has_the_key_that_signs() -> None:
    """Also while only one of the two files of a step is written, in either order."""
    steps = [{"caller": OLD, "handler": OLD}, *rotation(OLD, "k2")]
    for before, after in itertools.pairwise(steps):
        for signing, verifying in itertools.product((before, after), repeat=2):
            for name, signer in SIGNING_SIDES.items():
                verifier = "handler" if signer == "caller" else "caller"
                assert signing[signer][name]["signing"] in verifying[verifier][name]["keys"]


def test_the_new_keys_replace_the_old_ones_by_an_overlap() -> None:
    """Some step has both keys, and signs with the new one. The last one has only new keys, and no two are equal."""
    steps = rotation(OLD, "k2")
    last = steps[-1]
    assert any(
        step["caller"]["start_keys"]["signing"] == "k2" and set(step["caller"]["start_keys"]["keys"]) == {"k1", "k2"}
        for step in steps
    )
    assert last["caller"] == last["handler"]
    keys = {key for key_set in last["caller"].values() for key in key_set["keys"].values()}
    assert len(keys) == len(SIGNING_SIDES)
    assert not keys & {key for key_set in OLD.values() for key in key_set["keys"].values()}


async def test_the_settings_of_both_sides_are_rewritten_and_stay_usable(tmp_path: Path) -> None:
    """A second rotation begins with the keys of the first. Everything else stays."""

    def content(side: str) -> dict[str, Any]:
        return read_toml(tmp_path / f"{side}.toml", side)

    for name, text in local_settings().items():
        (tmp_path / name).write_text(text)
    first = content("caller")
    for new_id in ("k2", "k3"):
        await rotate(tmp_path, new_id, 0)
        theirs, ours = content("caller")["handlers"]["payment-prod"], content("handler")["callers"]["order-prod"]
        for name in SIGNING_SIDES:
            assert theirs[name] == ours[name]
            assert set(KeySet.model_validate(ours[name]).keys) == {new_id}
    assert content("caller")["callback_keys"] == first["callback_keys"]
    assert content("caller")["endpoints"] == first["endpoints"]


def test_settings_without_such_a_line_are_refused() -> None:
    """A rotation that changes nothing would be no harm."""
    with pytest.raises(ValueError, match="0 lines of the settings have start_keys"):
        with_key_sets("", OLD)
