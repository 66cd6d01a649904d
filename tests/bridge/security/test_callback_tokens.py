"""Tokens: what is minted verifies, and however a text was made or spoiled, it is refused in one way only."""

import base64
import hashlib
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer
from yarl import URL

from bridge.errors import UntrustedError
from bridge.security.callback_tokens import (
    MAX_TOKEN_CHARACTERS,
    CallbackClaims,
    CallbackTokens,
)
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import CLOCK_SKEW
from tests.support.helpers import HANDLER, key_set

NOON = datetime(2027, 1, 15, 12, tzinfo=UTC)
DEADLINE = NOON + timedelta(hours=1)
KEY_SET = key_set()
CALLBACK_ID = secrets.token_urlsafe(16)
TOKENS = CallbackTokens(KEY_SET, namespace="orders")

ANY_TEXT = st.text(st.characters())


def mint(tokens: CallbackTokens = TOKENS, **changes: Any) -> str:
    claims: dict[str, Any] = {
        "callback_id": CALLBACK_ID,
        "peer": HANDLER,
        "workflow_id": "order-7",
        "run_id": "run-7",
        "request_id": "request-7",
        "now": NOON,
        "deadline": DEADLINE,
    }
    return str(tokens.mint(**(claims | changes)))


def serializer(salt: str, keys: KeySet = KEY_SET) -> URLSafeSerializer:
    return URLSafeSerializer(
        keys.signing_last(), salt=salt, signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256}
    )


def forged(salt: str = "bridge/callback/v1", *, without: str = "", **changes: Any) -> str:
    """A token with our own key and any claims: what only a bug of ours, or of an older version, could have made."""
    claims = TOKENS.verify(mint(), callback_id=CALLBACK_ID, now=NOON).model_dump() | changes
    claims.pop(without, None)
    return str(serializer(salt).dumps(claims))


def refuse(text: str, *, callback_id: str = CALLBACK_ID, now: datetime = NOON) -> None:
    with pytest.raises(UntrustedError) as caught:
        TOKENS.verify(text, callback_id=callback_id, now=now)
    error = caught.value
    assert str(error) == "not authenticated"
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__  # Temporal would write it into a history


@given(
    callback_id=st.binary(min_size=16, max_size=16),
    names=st.lists(st.text(max_size=40), min_size=4, max_size=4),
    lasts=st.integers(0, 10**8),
)
def test_what_is_minted_verifies(callback_id: bytes, names: list[str], lasts: int) -> None:
    """With any names, the receiver reads the claims that were minted."""
    peer, workflow_id, run_id, request_id = names
    text_id = base64.urlsafe_b64encode(callback_id).decode().rstrip("=")
    text = mint(
        callback_id=text_id,
        peer=peer,
        workflow_id=workflow_id,
        run_id=run_id,
        request_id=request_id,
        deadline=NOON + timedelta(seconds=lasts),
    )
    claims = TOKENS.verify(text, callback_id=text_id, now=NOON)
    assert claims == CallbackClaims(
        id=text_id,
        peer=peer,
        ns="orders",
        wf=workflow_id,
        run=run_id,
        rid=request_id,
        iat=int(NOON.timestamp()),
        exp=int(NOON.timestamp()) + lasts + 1,
    )


def test_an_ordinary_token_is_short_and_fits_a_url_as_it_is() -> None:
    """A callback URL has 1000 characters in all, and the token must need no quoting in it."""
    text = mint()
    assert len(text) < 600 < MAX_TOKEN_CHARACTERS
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", text)
    assert URL.build(scheme="https", host="orders.example", query={"sig": text}).raw_query_string == f"sig={text}"


def in_signature(text: str, junk: str) -> str:
    body, _, signature = text.rpartition(".")
    return f"{body}.{signature[:5]}{junk}{signature[5:]}"


def standard_base64(text: str) -> str:
    """Spelled with + and /, which the library takes for - and _."""
    while not set("-_") & set(text.rpartition(".")[2]):
        text = mint(run_id=secrets.token_hex(8))
    body, _, signature = text.rpartition(".")
    return f"{body}.{signature.replace('-', '+').replace('_', '/')}"


def other_claims(text: str) -> str:
    """The claims of one call under the signature of another."""
    return mint(workflow_id="order-8").rpartition(".")[0] + "." + text.rpartition(".")[2]


SPOILED = [
    pytest.param(lambda text: "", id="empty"),
    pytest.param(lambda text: text[:-1], id="cut short"),
    pytest.param(lambda text: text[1:], id="beginning lost"),
    pytest.param(lambda text: text[: len(text) // 2], id="half"),
    pytest.param(lambda text: text.rpartition(".")[0], id="no signature"),
    pytest.param(lambda text: text.rpartition(".")[0] + ".", id="empty signature"),
    pytest.param(lambda text: "." + text.rpartition(".")[2], id="no claims"),
    pytest.param(lambda text: text + "\udcff", id="lone surrogate"),
    pytest.param(lambda text: text + "=", id="padding appended"),
    pytest.param(lambda text: text + "==", id="more padding appended"),
    pytest.param(lambda text: text + "\n", id="newline appended"),
    pytest.param(lambda text: " " + text, id="blank before"),
    pytest.param(lambda text: in_signature(text, "!!"), id="junk inside"),
    pytest.param(lambda text: in_signature(text, " "), id="blank inside"),
    pytest.param(lambda text: in_signature(text, "\x00"), id="NUL inside"),
    pytest.param(lambda text: text.replace(".", "%2E"), id="percent-encoded"),
    pytest.param(standard_base64, id="standard base64"),
    pytest.param(lambda text: text + text, id="twice"),
    pytest.param(lambda text: text.swapcase(), id="other case"),
    pytest.param(other_claims, id="signature of another"),
    pytest.param(lambda text: text.rpartition(".")[0] + "." + "A" * 43, id="guessed signature"),
    pytest.param(lambda text: "." * 50, id="dots"),
    pytest.param(lambda text: "A" * 10**6, id="a megabyte"),
    pytest.param(lambda text: "\uff21" + text[1:], id="full-width letter"),
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_spoiled_callback_token_is_refused(spoil: Callable[[str], str]) -> None:
    """However a token was damaged, verify raises UntrustedError and nothing else."""
    refuse(spoil(mint()))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(mint(CallbackTokens(key_set(), namespace="orders")), id="key"),
        pytest.param(mint(CallbackTokens(KEY_SET, namespace="other")), id="namespace"),
        pytest.param(forged("bridge/other/v1"), id="purpose"),
        pytest.param(forged("bridge/callback/v2"), id="version in the salt"),
        pytest.param(forged(""), id="no salt"),
        pytest.param(mint(callback_id=secrets.token_urlsafe(16)), id="callback"),
    ],
)
def test_a_token_of_another_is_refused(text: str) -> None:
    """Key, namespace, purpose and callback id must all be those of this receiver and this URL."""
    refuse(text)


@pytest.mark.parametrize(
    "callback_id",
    [
        pytest.param("", id="empty"),
        pytest.param(CALLBACK_ID[:-1], id="cut"),
        pytest.param(CALLBACK_ID + "\n", id="newline"),
        pytest.param("\udcff", id="lone surrogate"),
    ],
)
def test_a_token_under_another_path_is_refused(callback_id: str) -> None:
    """The id in the callback URL's path is the one in the token, to the letter."""
    refuse(mint(), callback_id=callback_id)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(forged(auth="none"), id="auth none"),
        pytest.param(forged(auth=None), id="auth null"),
        pytest.param(forged(extra="claim"), id="claim too many"),
        pytest.param(forged(id="short"), id="short id"),
        pytest.param(forged(id=CALLBACK_ID + "\n"), id="newline in the id"),
        pytest.param(forged(iat=str(int(NOON.timestamp()))), id="time as text"),
        pytest.param(forged(exp=str(int(DEADLINE.timestamp()))), id="end as text"),
        pytest.param(forged(exp=DEADLINE.timestamp() + 0.5), id="time with a fraction"),
        pytest.param(forged(exp=float("inf")), id="time infinite"),
        pytest.param(forged(exp=float("nan")), id="time not a number"),
        pytest.param(forged(iat=10**400), id="absurdly late"),
        pytest.param(forged(iat=True), id="time true"),
        pytest.param(forged(exp=None), id="no end"),
        pytest.param(forged(wf=7), id="workflow id a number"),
        pytest.param(forged(peer=None), id="peer null"),
        pytest.param(forged(peer=[HANDLER]), id="peer a list"),
        *(
            pytest.param(forged(without=name), id=f"without {name}")
            for name in ("id", "peer", "ns", "wf", "run", "rid", "iat", "exp")
        ),
        pytest.param(str(serializer("bridge/callback/v1").dumps([])), id="a list"),
        pytest.param(str(serializer("bridge/callback/v1").dumps(None)), id="null"),
        pytest.param(str(serializer("bridge/callback/v1").dumps("text")), id="a string"),
        pytest.param(serializer("bridge/callback/v1").make_signer().sign(b"bm90IGpzb24").decode(), id="not JSON"),
        pytest.param(serializer("bridge/callback/v1").make_signer().sign(b".AAAA").decode(), id="not deflated"),
    ],
)
def test_a_signed_token_of_other_claims_is_refused(text: str) -> None:
    """A signature alone is not enough: every claim is required, of its type, and known."""
    refuse(text)


def test_absurd_but_signed_times_are_compared() -> None:
    """A time beyond every float is compared like any other: this one says from ever to ever."""
    assert TOKENS.verify(forged(iat=-(10**400), exp=10**400), callback_id=CALLBACK_ID, now=NOON).id == CALLBACK_ID


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(NOON, id="when minted"),
        pytest.param(NOON - CLOCK_SKEW, id="five minutes before"),
        pytest.param(DEADLINE, id="at the deadline"),
        pytest.param(DEADLINE + CLOCK_SKEW, id="as late as clocks may differ"),
    ],
)
def test_a_token_holds_within_its_time(now: datetime) -> None:
    """The clocks of the minter and the receiver may differ."""
    claims = TOKENS.verify(mint(), callback_id=CALLBACK_ID, now=now)
    assert claims.id == CALLBACK_ID
    assert not claims.is_over(now)


@pytest.mark.parametrize(
    ("text", "now"),
    [
        pytest.param(mint(), DEADLINE + CLOCK_SKEW + 2 * SECOND, id="just over"),
        pytest.param(mint(), NOON + timedelta(days=10000), id="long after"),
        pytest.param(forged(exp=-(10**400)), NOON, id="absurdly early"),
    ],
)
def test_a_token_whose_deadline_is_over_says_so(text: str, now: datetime) -> None:
    """It is not refused: a repeat is to be known from a completion that comes too late."""
    assert TOKENS.verify(text, callback_id=CALLBACK_ID, now=now).is_over(now)


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(NOON - CLOCK_SKEW - SECOND, id="not yet valid"),
        pytest.param(NOON - timedelta(days=10000), id="long before"),
    ],
)
def test_a_token_of_the_future_is_refused(now: datetime) -> None:
    """Its minter's clock is wrong, or ours."""
    refuse(mint(), now=now)


@given(ANY_TEXT)
def test_arbitrary_text_is_refused_in_one_way_only(text: str) -> None:
    """For any text, also with surrogates, the only exception is UntrustedError."""
    refuse(text)


@given(st.data())
def test_an_edited_token_is_refused_or_says_the_same(data: st.DataObject) -> None:
    """Spare bits of base64 may be spelled in more than one way; the claims may not."""
    text = mint()
    at = data.draw(st.integers(0, len(text) - 1))
    edited = text[:at] + data.draw(st.text(st.characters(), max_size=3)) + text[at + data.draw(st.integers(0, 3)) :]
    try:
        claims = TOKENS.verify(edited, callback_id=CALLBACK_ID, now=NOON)
    except UntrustedError:
        return
    assert claims == TOKENS.verify(text, callback_id=CALLBACK_ID, now=NOON)


@given(
    claims=st.dictionaries(
        st.sampled_from([*CallbackClaims.model_fields, "x"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()),
    )
)
def test_arbitrary_signed_claims_are_refused_in_one_way_only(claims: dict[str, Any]) -> None:
    """Even under our own signature, claims of any type lead to UntrustedError and nothing else."""
    refuse(forged(**{"iat": "never"} | claims | {"id": "short"}))


def rotated(signing: str, **keys: str) -> KeySet:
    return KeySet.model_validate({"signing": signing, "keys": keys})


def tokens(keys: KeySet) -> CallbackTokens:
    return CallbackTokens(keys, namespace="orders")


def test_keys_roll_over_without_losing_a_token() -> None:
    """A new key is checked before anyone signs with it, and an old one after."""
    old, new = new_key(), new_key()
    steps = [
        tokens(rotated("old", old=old)),
        tokens(rotated("old", old=old, new=new)),
        tokens(rotated("new", old=old, new=new)),
        tokens(rotated("new", new=new)),
    ]
    for before, after in pairwise(steps):
        for minter, checker in ((before, after), (after, before)):
            assert checker.verify(mint(minter), callback_id=CALLBACK_ID, now=NOON).wf == "order-7"
    with pytest.raises(UntrustedError):
        steps[-1].verify(mint(steps[0]), callback_id=CALLBACK_ID, now=NOON)


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")], ids=["signing key last", "signing key first"])
def test_the_signing_key_signs_wherever_it_stands_in_the_settings(order: tuple[str, str]) -> None:
    """The id decides which key signs; the order of a table in a file does not."""
    keys = {"old": new_key(), "new": new_key()}
    text = mint(tokens(rotated("new", **{key_id: keys[key_id] for key_id in order})))
    with_new, with_old = (tokens(rotated(name, **{name: keys[name]})) for name in ("new", "old"))
    assert with_new.verify(text, callback_id=CALLBACK_ID, now=NOON).ns == "orders"
    with pytest.raises(UntrustedError):
        with_old.verify(text, callback_id=CALLBACK_ID, now=NOON)
