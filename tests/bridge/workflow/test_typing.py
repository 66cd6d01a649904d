"""The client is typed: mypy refuses what the contract refuses."""

import textwrap
from pathlib import Path

import pytest
from mypy import api

from scripts.environment.stack import ROOT

GOOD = """
    import bridge
    from examples.payments.contract import PaymentRequest, PaymentResponse, PaymentService

    async def call() -> PaymentResponse:
        client = bridge.create_client(service=PaymentService, endpoint="payments")
        return await client.execute_operation(PaymentService.process, PaymentRequest(order_id="1", amount=1.0))
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param("x", "x", "", id="good"),
        pytest.param('PaymentRequest(order_id="1", amount=1.0)', '"1"', "_InputT", id="wrong input"),
        pytest.param("-> PaymentResponse", "-> str", "Operation[PaymentRequest, str]", id="wrong result"),
        pytest.param("amount=1.0))", "amount=1.0), timeout=3)", "call-arg", id="unknown parameter"),
    ],
)
def test_a_wrong_type_is_a_mypy_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, says: str
) -> None:
    """Of the input, of the result, and of the call's own parameters."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "snippet.py"
    path.write_text(textwrap.dedent(GOOD).replace(old, new))
    out, _, code = api.run(["--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(path)])
    assert code == (1 if says else 0), out
    assert says in out
