"""Operation tokens: what is encoded is read, and no other spelling is."""

import re
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.delivery.operation_token import OperationToken

TOKEN = OperationToken("0190a1b2-0000-7000-8000-000000000001", "request-7", "payment-7")
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(namespace_id=NAMES, request_id=NAMES, workflow_id=NAMES)
def test_a_token_is_the_same_for_the_same_call(namespace_id: str, request_id: str, workflow_id: str) -> None:
    """A repeated start answers with the same token, which fits a path, a query and a header as it is."""
    token = OperationToken(namespace_id, request_id, workflow_id)
    text = token.encode()
    assert text == OperationToken(namespace_id, request_id, workflow_id).encode()
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", text)
    assert OperationToken.decode(text) == token


def test_a_token_of_the_longest_names_is_within_nexus_limit() -> None:
    """Nexus allows 4096 bytes. Temporal's ids have at most 1000 bytes, request ids 255 characters."""
    token = OperationToken("n" * 36, "\u00fc" * 255, secrets.token_hex(500))
    assert len(token.encode()) <= 4096
    assert OperationToken.decode(token.encode()) == token


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param(TOKEN.encode() + "=", id="padding"),
        pytest.param(TOKEN.encode() + ".", id="a part too many"),
        pytest.param(TOKEN.encode().rpartition(".")[0], id="a part too few"),
        pytest.param(TOKEN.encode().replace(".", " ."), id="blank"),
        pytest.param(TOKEN.encode() + "\n", id="newline"),
        pytest.param(TOKEN.encode().replace(".", ".!", 1), id="junk that base64 readers skip"),
        pytest.param("_w.YQ.YQ", id="not UTF-8"),
        pytest.param("YR.YQ.YQ", id="spare bits"),
        pytest.param("\udcff.YQ.YQ", id="lone surrogate"),
        pytest.param("eyJ0IjoxLCJucyI6InBheW1lbnRzIn0", id="Temporal's own"),
    ],
)
def test_another_spelling_is_no_token(text: str) -> None:
    """A token has one spelling."""
    assert OperationToken.decode(text) is None


@given(st.text(st.characters()))
def test_arbitrary_text_is_read_without_an_error(text: str) -> None:
    """Any peer may send any text."""
    token = OperationToken.decode(text)
    assert token is None or token.encode() == text
