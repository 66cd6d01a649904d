"""The calls in memos and signals: a foreign payload is no call, and a codec that fails is not a foreign payload."""

import dataclasses
from collections.abc import Sequence

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.converter import DataConverter, PayloadCodec

from bridge.errors import UnavailableError
from bridge.security.packing import packed
from handler.delivery.calls import read_call
from handler.delivery.operation_token import OperationToken
from handler.delivery.records import CallMemo, packed_reply

CALL = CallMemo(
    caller="order-prod",
    request_id="one",
    input_hash="",
    service="PaymentService",
    operation="process",
    reply=packed_reply(operation_token=OperationToken("id", "one", "payment-7").encode(), callback_url=None),
    deadline_ms=0,
)


class Reversing(PayloadCodec):
    """Encodes by reversing the bytes; cannot decode while its keys are missing."""

    def __init__(self, *, has_keys: bool = True) -> None:
        self._has_keys = has_keys

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        return [Payload(metadata={"encoding": b"reversed"}, data=each.SerializeToString()[::-1]) for each in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        if not self._has_keys:
            message = "no keys"
            raise RuntimeError(message)
        return [Payload.FromString(each.data[::-1]) for each in payloads]


def converter(*, has_keys: bool = True) -> DataConverter:
    return dataclasses.replace(DataConverter.default, payload_codec=Reversing(has_keys=has_keys))


async def test_a_call_is_read_through_the_codec() -> None:
    """Temporal stores memos as the codec has encoded them."""
    [payload] = await converter().encode([CALL])
    assert await read_call(converter(), payload, target="payment-7") == CALL


@pytest.mark.parametrize("codec", [True, False])
async def test_the_call_of_another_workflow_is_not_a_call(codec: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A target may pass its memo to a child. That is no mistake, and the log does not name it."""
    [payload] = await (converter() if codec else DataConverter.default).encode([CALL])
    assert await read_call(converter(), payload, target="payment-7-child") is None
    assert not caplog.records


@pytest.mark.parametrize("reply", [[7, None, {}], ["token", 7, {}], ["token", None, []], ["token"], None])
async def test_a_call_with_a_reply_of_another_form_is_not_a_call(reply: object) -> None:
    """The codec that wrote it is ours, and the program may not be."""
    fields = dataclasses.asdict(CALL) | {"reply": packed(reply)}
    [payload] = await DataConverter.default.encode([fields])
    assert await read_call(DataConverter.default, payload, target="payment-7") is None


@pytest.mark.parametrize("value", [7, None, "text", {"caller": "half a call"}])
async def test_a_foreign_payload_is_no_call(value: object, caplog: pytest.LogCaptureFixture) -> None:
    """Another program wrote it. No error is raised, and no line of the log quotes the value."""
    [payload] = await converter().encode([value])
    assert await read_call(converter(), payload, target="payment-7") is None
    assert "half a call" not in caplog.text
    assert {each.__dict__["bridge.target"] for each in caplog.records} <= {"payment-7"}


async def test_a_codec_that_fails_makes_the_call_unavailable(caplog: pytest.LogCaptureFixture) -> None:
    """If the call counted as foreign, a closed run would never be delivered. One line of the log names the run."""
    [payload] = await converter().encode([CALL])
    with pytest.raises(UnavailableError, match="cannot decode memos"):
        await read_call(converter(has_keys=False), payload, target="payment-7")
    assert [each.__dict__["bridge.target"] for each in caplog.records] == ["payment-7"]
