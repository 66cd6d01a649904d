"""What a service records of the last exchange with each peer."""

from datetime import UTC, datetime

import pytest

from bridge.http.peer_exchanges import PeerExchanges

NOW = datetime(2026, 11, 29, tzinfo=UTC)


@pytest.mark.parametrize(
    ("status", "is_good"),
    [(200, True), (201, True), (202, True), (424, True), (400, False), (429, False), (503, False)],
)
def test_the_answer_that_an_operation_has_failed_refuses_no_message(status: int, is_good: bool) -> None:
    """Status 424 is the outcome of an operation. The start that it answers was accepted."""
    peers = PeerExchanges(["orders"], clock=lambda: NOW)
    peers.record("orders", status, "why")
    entry, _ = peers.all()
    assert (entry.last_good, entry.last_refusal) == ((NOW, None) if is_good else (None, NOW))
