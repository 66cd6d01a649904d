"""The records of a call: which of several records of one call counts."""

import base64
import zlib
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from handler.delivery.records import CallMemo, deliveries, packed_reply


def reply(callback_url: str | None) -> str:
    return packed_reply(operation_token="token", callback_url=callback_url)


CALL = CallMemo(
    caller="order-prod",
    request_id="one",
    input_hash="",
    service="PaymentService",
    operation="process",
    reply=reply("http://receiver/callbacks/first"),
    deadline_ms=0,
)
RENEWAL = replace(CALL, reply=reply("http://receiver/callbacks/renewal"))
OTHER = replace(CALL, request_id="two")
STRANGER = replace(CALL, caller="stock-prod", reply=reply("http://elsewhere/callbacks/first"))
POLLING = replace(CALL, request_id="three", reply=reply(None))


def nested(depth: int) -> str:
    """A packed array in arrays."""
    return base64.urlsafe_b64encode(zlib.compress(b"[" * depth)).decode()


def kept(*calls: CallMemo | None) -> list[CallMemo]:
    found = deliveries(calls, "payment-7", "run", datetime(2026, 1, 1, tzinfo=UTC))
    assert {(each.workflow_id, each.run_id, each.start_time_ms) for each in found} <= {
        ("payment-7", "run", 1767225600000)
    }
    return [each.call for each in found]


def test_each_call_with_a_callback_url_is_delivered_once_to_its_first_url() -> None:
    """An unreadable record, a record without a callback URL and the records of renewals add no delivery."""
    assert kept(CALL, RENEWAL, None, OTHER, POLLING) == [OTHER, CALL]
    assert kept(None, POLLING) == []


@pytest.mark.parametrize("foreign", ["", "not base64!", "AAAA", nested(100_000)])
def test_a_record_with_an_unreadable_reply_is_a_value_error(foreign: str) -> None:
    """Any other error would fail the workflow task of a target to which another program sends it, for ever."""
    with pytest.raises(ValueError, match=r".+"):
        replace(CALL, reply=foreign)


def test_two_callers_may_use_one_request_id() -> None:
    """Each counts for itself: both calls are delivered, and by delivery workflows of their own."""
    assert kept(CALL, STRANGER, RENEWAL) == [CALL, STRANGER]
    found = deliveries([CALL, STRANGER], "payment-7", "run", datetime(2026, 1, 1, tzinfo=UTC))
    assert {each.key for each in found} == {"bridge-delivery-order-prod:one-run", "bridge-delivery-stock-prod:one-run"}
