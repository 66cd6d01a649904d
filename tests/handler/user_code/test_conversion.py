"""Inputs: only an instance of the contract's type is accepted, and an error names the wrong field."""

import asyncio
import dataclasses
import json
import threading
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal, NewType, Optional, Protocol, TypedDict

import pytest
from nexusrpc import HandlerError, HandlerErrorType
from pydantic import AfterValidator, BaseModel, Field
from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, DefaultPayloadConverter

from bridge.errors import UnavailableError
from handler.user_code.conversion import Conversion
from handler.user_code.threads import BoundedThreads
from tests.support.codec import Scrambler
from tests.support.helpers import assert_eventually
from tests.support.world import with_codec


@dataclasses.dataclass
class Line:
    item: str
    amount: float


@dataclasses.dataclass
class Order:
    order_id: str
    lines: list[Line]
    notes: dict[str, int] = dataclasses.field(default_factory=dict)


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


class Loose(TypedDict, total=False):
    a: int


class Shape(Protocol):
    def area(self) -> float: ...


class Currency(str, Enum):
    EUR = "EUR"


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
OrderId = NewType("OrderId", str)
SDK, PYDANTIC = Conversion(DataConverter.default), Conversion(pydantic_data_converter)


def plain(value: Any) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(value).encode())


NULL = Payload(metadata={"encoding": b"binary/null"})
BYTES = Payload(metadata={"encoding": b"binary/plain"}, data=b"{}")
[MESSAGE] = DataConverter.default.payload_converter.to_payloads([WorkflowExecution(workflow_id="w")])


def refusal(conversion: Conversion, payload: Payload, kind: Any) -> str:
    with pytest.raises(HandlerError) as raised:
        conversion.value(payload, kind)
    assert raised.value.type is HandlerErrorType.BAD_REQUEST
    return raised.value.message


@pytest.mark.parametrize("payload", [NULL, BYTES, MESSAGE, plain(None)], ids=["null", "bytes", "message", "JSON null"])
@pytest.mark.parametrize(
    "kind",
    [
        *(str, int, float, bool, Order, dict, dict[str, int], list[Line], Sequence[str], Mapping[str, Any]),
        *(tuple[int, ...], datetime, uuid.UUID, Currency, Order | Line, OrderId, Literal["a"], Cat, Pet, Loose),
        *(Annotated[str, "text"], list[Annotated[int, "number"]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("conversion", [SDK, PYDANTIC], ids=["sdk", "pydantic"])
def test_another_encoding_does_not_get_past_the_contracts_type(
    conversion: Conversion, kind: Any, payload: Payload
) -> None:
    """Bytes, a message or null is refused if the contract's type is another."""
    assert "the input is not a" in refusal(conversion, payload, kind)


@pytest.mark.parametrize(
    ("kind", "payload", "value"),
    [
        (bytes, BYTES, b"{}"),
        (type(None), NULL, None),
        (Optional[str], NULL, None),  # noqa: UP045 - the older spelling
        (str | None, plain(None), None),
        (WorkflowExecution, MESSAGE, WorkflowExecution(workflow_id="w")),
        (Any, BYTES, b"{}"),
        (object, NULL, None),
        (float, plain(7), 7.0),
        (OrderId, plain("7"), "7"),
        (Literal["a", "b"], plain("b"), "b"),
        (Currency, plain("EUR"), Currency.EUR),
        (Sequence[str], plain(["a"]), ["a"]),
        (tuple[int, ...], plain([1]), (1,)),
        (Order, plain({"order_id": "7", "lines": []}), Order("7", [])),
        (str, plain("\U0001f600"), "\U0001f600"),
    ],
    ids=str,
)
def test_an_instance_of_the_contracts_type_gets_through(kind: Any, payload: Payload, value: Any) -> None:
    """Null, bytes and a message are accepted if the contract's type allows them."""
    assert SDK.value(payload, kind) == value


def test_a_value_that_pydantic_converted_gets_through() -> None:
    """The cases are a discriminated union and a validator that returns another type."""
    assert PYDANTIC.value(plain({"kind": "dog", "name": "Rex"}), Pet) == Dog(kind="dog", name="Rex")
    assert PYDANTIC.value(plain([{"kind": "cat", "lives": 9}]), list[Pet]) == [Cat(kind="cat", lives=9)]
    assert PYDANTIC.value(plain("7"), Annotated[str, AfterValidator(int)]) == 7


def test_a_type_that_cannot_be_checked_lets_the_value_through() -> None:
    """A protocol exists only for the type checker. A contract without a type accepts every value."""
    assert SDK.value(MESSAGE, Shape) == SDK.value(MESSAGE, None) == WorkflowExecution(workflow_id="w")


@pytest.mark.parametrize(
    ("conversion", "kind", "value", "says"),
    [
        (SDK, Order, {"order_id": "7"}, "not a Order: lines (missing)"),
        (SDK, Order, {}, "not a Order: order_id (missing), lines (missing)"),
        (SDK, Order, {"order_id": 4111, "lines": []}, "not a Order: order_id (TypeError)"),
        (
            SDK,
            Order,
            {"order_id": "7", "lines": [{"item": "a", "amount": 1}, {"item": "b"}]},
            "lines.1.amount (missing)",
        ),
        (SDK, Order, {"order_id": "7", "lines": [{"item": "a", "amount": "4111"}]}, "lines.0.amount (TypeError)"),
        (SDK, Order, {"order_id": "7", "lines": [], "notes": {"4111 1111": "x"}}, "notes.… (TypeError)"),
        (SDK, Order, "4111", "not a Order: TypeError"),
        (PYDANTIC, Cat, {"kind": "cat"}, "not a Cat: lives (missing)"),
        (PYDANTIC, Cat, {"kind": "4111", "lives": "4111 1111"}, "kind (literal_error), lives (int_parsing)"),
        (PYDANTIC, Pet, {"kind": "4111"}, "the whole (union_tag_invalid)"),
        (PYDANTIC, Pet, {"kind": "dog"}, "dog.name (missing)"),
        (PYDANTIC, Order, {"order_id": "7", "lines": [{"item": "a"}]}, "lines.0.amount (missing)"),
        (PYDANTIC, dict[str, int], {"4111 1111": "x"}, "… (int_parsing)"),
        (SDK, Order, {"order_id": "7", "lines": [{"item": "\ud800", "amount": 1}]}, "lines.0.item (not valid Unicode)"),
        (SDK, Order, {"order_id": "7", "lines": [], "notes": {"\udfff": 1}}, "notes.… (not valid Unicode)"),
        (SDK, str, "\ud83d", "not a str: the whole (not valid Unicode)"),
    ],
)
def test_an_error_names_the_wrong_field(conversion: Conversion, kind: Any, value: Any, says: str) -> None:
    """The error quotes none of the input's values."""
    message = refusal(conversion, plain(value), kind)
    assert says in message
    assert "4111" not in message


def test_surrogates_that_stand_in_the_bytes_are_found_too() -> None:
    """Some peers write lone surrogates as raw bytes in JSON."""
    payload = Payload(metadata={"encoding": b"json/plain"}, data=b'"\xed\xa0\x80"')
    assert "the input is not a str" in refusal(SDK, payload, str)


async def test_a_reference_to_a_storage_that_is_not_here_is_a_bad_request() -> None:
    """The answer is final, because every repeat would fail. A failing codec gives a retryable error."""
    reference = Payload(metadata={"encoding": b"json/plain"}, data=b"{}")
    reference.external_payloads.add(size_bytes=7)
    with pytest.raises(HandlerError, match="external storage"):
        await SDK.open(reference)
    with pytest.raises(UnavailableError, match="cannot decode payloads"):
        await Conversion(with_codec(Scrambler())).open(plain("not scrambled"))


async def test_a_value_crosses_the_codec_both_ways() -> None:
    """This holds for every payload converter."""
    conversion = Conversion(with_codec(Scrambler()))
    closed = await conversion.close(conversion.payload(Currency.EUR))
    assert closed.metadata["encoding"] == b"binary/scrambled"
    assert conversion.value(await conversion.open(closed), Currency) is Currency.EUR


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        (b"json/plain", b'{"order_id": '),
        (b"json/plain", b"[" * 100_000),
        (b"binary/zip", b"x"),
        (b"json/protobuf", b"{}"),
    ],
)
def test_an_input_that_cannot_be_read_is_refused_also_without_a_type(encoding: bytes, data: bytes) -> None:
    """Every repeat would fail equally: an internal error would be repeated to the deadline."""
    conversion = Conversion(DataConverter.default)
    with pytest.raises(HandlerError) as raised:
        conversion.value(Payload(metadata={"encoding": encoding}, data=data), None)
    assert raised.value.type is HandlerErrorType.BAD_REQUEST
    assert raised.value.message.startswith("the input is not a value of its encoding: ")


class Slow(DefaultPayloadConverter):
    """Converts when `released` is set."""

    released = threading.Event()
    begun = 0

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        Slow.begun += 1
        assert Slow.released.wait(20)
        return super().from_payloads(payloads, type_hints)


async def test_a_large_input_blocks_neither_the_event_loop_nor_other_callers() -> None:
    """Some types take many seconds for 2 MB of empty values. One caller's inputs wait for each other."""
    Slow.begun = 0
    Slow.released.clear()
    slow = Conversion(DataConverter(payload_converter_class=Slow))
    large = plain(["x" * 5000])
    orders, stock = BoundedThreads(threads=4), BoundedThreads(threads=4)
    waiting = [asyncio.create_task(slow.read(large, list, orders)) for _ in range(3)]

    async def one_begun() -> None:
        assert Slow.begun == 1

    async def another_begun() -> None:
        assert Slow.begun == 2

    await assert_eventually(one_begun)
    other = asyncio.create_task(slow.read(large, list, stock))
    await assert_eventually(another_begun)
    Slow.released.set()
    assert [len(each) for each in await asyncio.gather(*waiting, other)] == [1] * 4


async def test_a_large_input_that_does_not_fit_is_refused_as_a_small_one() -> None:
    """Not with an object for each of a million wrong values."""
    with pytest.raises(HandlerError) as raised:
        await PYDANTIC.read(plain([1] * 5000), list[dict[str, int]], BoundedThreads(threads=1))
    assert raised.value.type is HandlerErrorType.BAD_REQUEST
    assert raised.value.message == "the input is not a list: 5000 errors"
