"""Key sets: which texts are keys, which key signs, and that no key is ever shown."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from bridge.security.keys import MAX_KEYS, MIN_KEY_BYTES, KeySet, decode_key, new_key

ANY_TEXT = st.text(st.characters())


def test_a_new_key_is_strong_enough_and_never_the_same() -> None:
    """What `keys new` prints can be pasted into the settings as it is."""
    first, second = new_key(), new_key()
    assert first != second
    assert len(decode_key(SecretStr(first))) == MIN_KEY_BYTES
    assert KeySet.model_validate({"signing": "k1", "keys": {"k1": first}}).raw()["k1"] == decode_key(SecretStr(first))


@given(st.binary(min_size=MIN_KEY_BYTES, max_size=100), st.booleans())
def test_every_long_enough_key_is_read_back(key: bytes, padded: bool) -> None:
    """base64url in the settings, with or without padding, is exactly the bytes that sign."""
    text = base64.urlsafe_b64encode(key).decode()
    assert decode_key(SecretStr(text if padded else text.rstrip("="))) == key


@given(st.binary(max_size=MIN_KEY_BYTES - 1))
def test_a_short_key_is_refused(key: bytes) -> None:
    """HMAC would take any bytes, even none: we do not."""
    with pytest.raises(ValueError, match="at least 32 bytes"):
        decode_key(SecretStr(base64.urlsafe_b64encode(key).decode()))


@given(ANY_TEXT)
def test_arbitrary_text_is_a_key_or_a_value_error(text: str) -> None:
    """Any text in the settings is a key of 32 bytes, or raises one kind of error, which does not quote the text."""
    refused = None
    try:
        assert len(decode_key(SecretStr(text))) >= MIN_KEY_BYTES
    except ValueError as error:
        refused = error
    if refused is not None:
        assert type(refused) is ValueError
        assert refused.__suppress_context__ or refused.__context__ is None


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("hunter2", id="password"),
        pytest.param("!" * 43, id="not base64"),
        pytest.param("A" * 41, id="impossible length"),
        pytest.param("A" * 20 + "=" + "A" * 22, id="padding inside"),
        pytest.param("A" * 42 + "\n", id="newline"),
        pytest.param("é" * 43, id="not ASCII"),
        pytest.param("\udcff" * 43, id="lone surrogates"),
    ],
)
def test_a_bad_key_is_refused_and_not_quoted(text: str) -> None:
    """The key set names the key by its id, and never shows it."""
    with pytest.raises(ValidationError) as caught:
        KeySet.model_validate({"signing": "k1", "keys": {"k1": text}})
    assert "'k1'" in str(caught.value)
    assert not text or text not in str(caught.value)


KEYS = {f"k{number}": new_key() for number in range(MAX_KEYS + 1)}


@pytest.mark.parametrize(
    ("key_set", "named"),
    [
        pytest.param({"signing": "k1", "keys": {}}, "keys", id="empty key set"),
        pytest.param({"signing": "k1", "keys": KEYS}, "keys", id="more keys than are tried"),
        pytest.param({"signing": "k9", "keys": {"k1": KEYS["k1"]}}, "k9", id="signing id not in the key set"),
        pytest.param({"keys": {"k1": KEYS["k1"]}}, "signing", id="no signing id"),
        pytest.param({"signing": "k1"}, "keys", id="no keys"),
        pytest.param({"signing": "K1", "keys": {"K1": KEYS["k1"]}}, "K1", id="upper-case id"),
        pytest.param({"signing": "k1", "keys": {"k1": KEYS["k1"], "k1\n": KEYS["k2"]}}, "keys", id="newline in an id"),
        pytest.param({"signing": "", "keys": {"": KEYS["k1"]}}, "signing", id="empty id"),
        pytest.param({"signing": "k" * 65, "keys": {"k" * 65: KEYS["k1"]}}, "signing", id="long id"),
        pytest.param({"signing": "k1", "keys": {"k1": KEYS["k1"]}, "algorithm": "none"}, "algorithm", id="more fields"),
    ],
)
def test_a_weak_or_inconsistent_ring_is_refused(key_set: dict[str, object], named: str) -> None:
    """A key set that cannot sign is refused, and so is one that the libraries would accept although it is weak."""
    with pytest.raises(ValidationError) as caught:
        KeySet.model_validate(key_set)
    assert named in str(caught.value)
    assert not [key for key in KEYS.values() if key in str(caught.value)]


@given(st.permutations(list(KEYS)[:MAX_KEYS]), st.integers(0, MAX_KEYS - 1))
def test_the_signing_key_is_last_wherever_it_stands(order: list[str], signing: int) -> None:
    """itsdangerous signs with the last of its keys: the role decides the place, not the order in the settings."""
    key_set = KeySet.model_validate({"signing": order[signing], "keys": {key_id: KEYS[key_id] for key_id in order}})
    raw = key_set.raw()
    assert key_set.signing_last()[-1] == raw[order[signing]]
    assert sorted(key_set.signing_last()) == sorted(raw.values())


def test_a_ring_shows_its_ids_and_no_key() -> None:
    """Neither `repr` nor a dump for the log shows a key."""
    key_set = KeySet.model_validate({"signing": "k1", "keys": {"k1": KEYS["k1"]}})
    shown = f"{key_set!r} {key_set} {key_set.model_dump()} {key_set.model_dump_json()}"
    assert "k1" in shown
    assert KEYS["k1"] not in shown
