"""What is taken out of texts before they are shown."""

import base64
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.security.keys import new_key
from bridge.security.redaction import without_keys, without_task_tokens

TOKEN = base64.b64encode(secrets.token_bytes(90)).decode()


@pytest.mark.parametrize(
    "spelled",
    [
        f"TaskToken({TOKEN})",
        f"task_token=TaskToken({TOKEN}) details=Status",
        f"{{'task_token': 'TaskToken({TOKEN})', 'details': 'none'}}",
        f'task_token: b"{TOKEN}", identity',
        f"Completion {{ task_token: [{', '.join(str(each) for each in TOKEN.encode())}] }}",
        f'"taskToken": "{TOKEN}"',
        f"cut off TaskToken({TOKEN}",
    ],
)
def test_no_task_token_of_the_core_is_shown(spelled: str) -> None:
    """In each of the core's spellings. The words around it stay."""
    shown = without_task_tokens(f"Activity not found on completion. {spelled} afterwards")
    assert TOKEN not in shown
    assert str(TOKEN.encode()[0]) + ", " not in shown
    assert shown.startswith("Activity not found on completion. ")
    assert "…" in shown


@given(st.sampled_from(["callers.{}.auth: bad", "'{}'", "{}: needed", "no key {} in", "({})"]), st.binary(min_size=32))
def test_no_text_as_long_as_a_key_is_shown(sentence: str, key: bytes) -> None:
    """In base64url, base64 or hexadecimal form."""
    for text in (base64.urlsafe_b64encode(key).decode(), key.hex()):
        assert text not in without_keys(sentence.format(text))


@pytest.mark.parametrize(
    "text",
    [
        "callers.order-prod.start_keys and callers.second.start_keys share a key; every key set needs keys of its own",
        "callers.payments-eu-central-1.limits.burst: Input should be greater than or equal to 1",
        "no such file: /run/secrets/payments/handler/start_keys/current/keys.toml",
    ],
)
def test_names_and_paths_are_shown(text: str) -> None:
    """An operator must be able to find the field."""
    assert without_keys(text) == text
    assert new_key() not in without_keys(f"{text} {new_key()}")
