"""A payload of any kind arrives unchanged over every transport, and no process in between decodes it."""

import asyncio
import contextlib
import dataclasses
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from decimal import Decimal
from typing import Any, get_args

import pytest
import pytest_asyncio
from google.protobuf.message import Message
from temporalio.api.common.v1 import Payload, SearchAttributes
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, PayloadCodec, PayloadConverter
from temporalio.worker import Replayer, Worker

from bridge.workflow.call import MAX_INPUT_BYTES, Transport
from caller import CallerPlugin
from handler import HandlerPlugin
from scripts.environment.server import Server
from tests.support import echoes
from tests.support.codec import Scrambler
from tests.support.echoes import BigCaller, EchoCaller, NothingCaller, Paid, PayCaller, Route, echo_id
from tests.support.helpers import CALLER
from tests.support.releases import keeps_json_metadata
from tests.support.world import World, events, running_world, with_codec

TRANSPORTS: tuple[Transport, ...] = get_args(Transport)


class _Unreadable(PayloadConverter):
    """The converter of a process that must not decode values."""

    def to_payloads(self, values: Sequence[Any]) -> list[Payload]:
        raise AssertionError("a value was written")

    def from_payloads(self, payloads: Sequence[Payload], type_hints: list[type] | None = None) -> list[Any]:
        raise AssertionError("a value was read")


class _Keyless(PayloadCodec):
    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        raise AssertionError("a payload was encoded")

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        raise AssertionError("a payload was decoded")


BLIND = DataConverter(payload_converter_class=_Unreadable, payload_codec=_Keyless())


def _prepare(world: World) -> None:
    world.handler_options = {"nexus": True}
    world.peer_options = {"operations": ["EchoService/*"]}
    world.endpoint_options = {"poll_interval_s": 0.1}
    world.targets = [*echoes.TARGETS]


@contextlib.asynccontextmanager
async def _echoing(server: Server, converter: DataConverter = DataConverter.default) -> AsyncIterator[World]:
    """A world whose receiver can neither read nor write a value."""
    async with AsyncExitStack() as stack:
        without = ("caller", "handler", "receiver")
        world = await stack.enter_async_context(
            running_world(server, without=without, converters=(converter, converter), prepare=_prepare)
        )
        client = world.caller_client
        world.caller_client = await Client.connect(server.address, namespace=CALLER, data_converter=BLIND)
        await world.receiver.start()
        world.caller_client = client
        await world.create_nexus_endpoint()
        plugin = HandlerPlugin(world.handler_settings)
        await stack.enter_async_context(
            Worker(world.handler_client, task_queue=world.payment_queue, workflows=echoes.TARGETS, plugins=[plugin])
        )
        await stack.enter_async_context(
            Worker(
                client,
                task_queue=world.order_queue,
                workflows=echoes.CALLERS,
                plugins=[CallerPlugin(world.caller_settings)],
            )
        )
        yield world


# All cases share one world: every payload differs, and therefore starts its own target.
@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def world(server: Server) -> AsyncIterator[World]:
    async with _echoing(server) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def encrypted_world(server: Server) -> AsyncIterator[World]:
    async with _echoing(server, with_codec(Scrambler())) as made:
        yield made


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Transport:
    chosen: Transport = request.param
    return chosen


def _payload(data: bytes, **metadata: bytes) -> Payload:
    return Payload(metadata=metadata, data=data)


KINDS = {
    "json/plain": _payload(b'{"key": "KEY", "text": "Geb\xc3\xa4ck \\ud83c"}', encoding=b"json/plain"),
    "json/plain with extra metadata": _payload(b'"KEY"', encoding=b"json/plain", model=b"\x00\xff", empty=b""),
    "json/protobuf": _payload(b'{"key":"KEY"}', encoding=b"json/protobuf", messageType=b"shop.v1.Order"),
    "json/protobuf without a type": _payload(b'{"key":"KEY"}', encoding=b"json/protobuf"),
    "binary/protobuf": _payload(b"\x0a\x04KEY", encoding=b"binary/protobuf", messageType=b"shop.v1.Order"),
    "binary/protobuf with extra metadata": _payload(
        b"\x0a\x04KEY", encoding=b"binary/protobuf", messageType=b"shop.v1.Order", version=b"2"
    ),
    "binary/plain": _payload(b"\x00\xff\r\nKEY", encoding=b"binary/plain"),
    "binary/plain with extra metadata": _payload(b"\x00KEY", encoding=b"binary/plain", mime=b"image/png"),
    "encrypted": _payload(b"\x8fKEY", encoding=b"binary/encrypted", **{"encryption-key-id": b"k-7", "iv": b"\x01"}),
    "compressed": _payload(zlib.compress(b'"tea"' * 999) + b"KEY", encoding=b"binary/zlib", original=b"json/plain"),
    "without any metadata": _payload(b"KEY"),
    "null with extra metadata": _payload(b"", encoding=b"binary/null", type=b"KEY"),
}
"""The test replaces `KEY`, so that every call has another payload."""


def _unique(kind: str) -> Payload:
    payload, key = Payload(), uuid.uuid4().hex.encode()
    payload.CopyFrom(KINDS[kind])
    payload.data = payload.data.replace(b"KEY", key)
    for name, value in KINDS[kind].metadata.items():
        payload.metadata[name] = value.replace(b"KEY", key)
    return payload


def _carried(payload: Payload, transport: Transport, server: Server) -> Payload:
    """What *transport* makes of *payload*.

    Every transport leaves it unchanged, with one exception: native Nexus in servers 1.29 to 1.31 sends `json/plain` as
    bare JSON and loses all metadata except the encoding, of inputs and of results.
    """
    if transport == "nexus" and payload.metadata["encoding"] == b"json/plain" and not keeps_json_metadata(server):
        return _payload(payload.data, encoding=b"json/plain")
    return payload


def _route(world: World, transport: Transport) -> Route:
    return Route(transport=transport, endpoint=world.nexus_endpoint if transport == "nexus" else "payments")


async def _call(world: World, payload: Payload, transport: Transport) -> WorkflowHandle[Any, RawValue]:
    return await world.caller_client.start_workflow(
        EchoCaller.run,
        args=[RawValue(payload), _route(world, transport)],
        id=f"echo-caller-{uuid.uuid4()}",
        task_queue=world.order_queue,
    )


async def _input_of(world: World, target_id: str) -> Payload:
    """The input in the target's history, undecoded."""
    target = world.handler_client.get_workflow_handle(target_id)
    started = (await target.fetch_history()).events[0].workflow_execution_started_event_attributes
    return started.input.payloads[0]


async def _result_of_call(handle: WorkflowHandle[Any, Any]) -> Payload:
    """The operation's result in the caller's history, undecoded."""
    for event in (await handle.fetch_history()).events:
        match event.event_type:
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                return event.activity_task_completed_event_attributes.result.payloads[0]
            case EventType.EVENT_TYPE_NEXUS_OPERATION_COMPLETED:
                return event.nexus_operation_completed_event_attributes.result
            case _:
                pass
    raise AssertionError("no result")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_payload_arrives_byte_for_byte(world: World, kind: str, transport: Transport) -> None:
    """Metadata and data are equal at the target and back at the caller."""
    payload = _unique(kind)
    expected = _carried(payload, transport, world.server)
    handle = await _call(world, payload, transport)
    assert (await handle.result()).payload == expected
    assert await _result_of_call(handle) == expected
    assert await _input_of(world, echo_id(RawValue(expected))) == expected


async def test_nothing_arrives_as_nothing(server: Server, transport: Transport) -> None:
    """The operation has no argument, and `None` as its result."""
    nothing, target_id = _payload(b"", encoding=b"binary/null"), f"nothing-{uuid.uuid4()}"
    echoes.declare_nothing(target_id)
    async with _echoing(server) as world:
        handle = await world.caller_client.start_workflow(
            NothingCaller.run, _route(world, transport), id=f"caller-{target_id}", task_queue=world.order_queue
        )
        await handle.result()
        assert await _input_of(world, target_id) == nothing
        assert await _result_of_call(handle) == nothing


# Only kinds that the SDK can decode, because the SDK decodes the details of every failure at once.
@pytest.mark.parametrize("kind", ["json/plain", "json/plain with extra metadata", "binary/plain with extra metadata"])
async def test_the_details_of_a_failure_arrive_byte_for_byte(world: World, kind: str, transport: Transport) -> None:
    """A payload inside a failure crosses undecoded, like any other payload."""
    payload = _unique(kind)
    payload.data = b'"' + echoes.FAILS + uuid.uuid4().hex.encode() + b'"'
    handle = await _call(world, payload, transport)
    with pytest.raises(WorkflowFailureError):
        await handle.result()
    closing = (await handle.fetch_history()).events[-1].workflow_execution_failed_event_attributes
    info = closing.failure.cause.application_failure_info
    assert (info.type, list(info.details.payloads)) == ("Echo", [_carried(payload, transport, world.server)])


@pytest.mark.parametrize("kind", KINDS)
async def test_a_codec_on_both_sides_is_undone_at_the_ends_only(encrypted_world: World, kind: str) -> None:
    """Over every transport the values are equal, and every payload in the histories is encrypted."""
    await asyncio.gather(*(_crosses_encrypted(encrypted_world, _unique(kind), transport) for transport in TRANSPORTS))


async def _crosses_encrypted(world: World, payload: Payload, transport: Transport) -> None:
    handle = await _call(world, payload, transport)
    assert (await handle.result()).payload == payload, transport
    target = world.handler_client.get_workflow_handle(echo_id(RawValue(payload)), result_type=RawValue)
    assert (await target.result()).payload == payload
    for each in (handle, target):
        stored = [found for event in (await each.fetch_history()).events for found in _payloads_in(event)]
        assert len(stored) > 1
        assert {found.metadata["encoding"] for found in stored} == {b"binary/scrambled"}, transport


def _payloads_in(message: Message) -> Iterator[Payload]:
    """Every payload in *message* except those of search attributes, which no codec encodes."""
    if isinstance(message, Payload):
        yield message
    elif not isinstance(message, SearchAttributes):
        for field, value in message.ListFields():
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                yield from (each for part in value.values() if isinstance(part, Message) for each in _payloads_in(part))
            elif field.message_type is not None:
                yield from (each for part in (value if field.is_repeated else [value]) for each in _payloads_in(part))


@pytest.mark.parametrize("codec", [None, Scrambler()], ids=["plain", "encrypted"])
async def test_pydantic_models_arrive_as_they_were(server: Server, codec: PayloadCodec | None) -> None:
    """Nested models, decimals, times and enums arrive over every transport."""
    async with _echoing(server, dataclasses.replace(pydantic_data_converter, payload_codec=codec)) as world:

        async def pay(transport: Transport) -> Paid:
            number = f"{transport}-{world.id}"
            return await world.caller_client.execute_workflow(
                PayCaller.run, args=[number, _route(world, transport)], id=f"pay-{number}", task_queue=world.order_queue
            )

        for paid in await asyncio.gather(*map(pay, TRANSPORTS)):
            assert paid.total == Decimal("3.300")
            assert str(paid.total) == "3.300"


async def _call_with(world: World, size: int, transport: Transport) -> WorkflowHandle[BigCaller, str]:
    return await world.caller_client.start_workflow(
        BigCaller.run,
        args=[uuid.uuid4().hex, size, _route(world, transport)],
        id=f"big-caller-{uuid.uuid4()}",
        task_queue=world.order_queue,
    )


async def test_an_input_at_the_limit_arrives(world: World, transport: Transport) -> None:
    assert await (await _call_with(world, MAX_INPUT_BYTES, transport)).result() == echoes.SHORT.decode()


async def test_an_input_at_the_limit_arrives_encrypted(encrypted_world: World, transport: Transport) -> None:
    """The limit leaves room for the bytes that an encrypting codec adds."""
    assert await (await _call_with(encrypted_world, MAX_INPUT_BYTES, transport)).result() == echoes.SHORT.decode()


@pytest.mark.parametrize("size", [MAX_INPUT_BYTES + 1, 2 * 1024 * 1024 + 100, 8 * 1024 * 1024])
async def test_an_input_over_the_limit_is_refused_by_name_and_starts_nothing(
    world: World, transport: Transport, size: int
) -> None:
    """The check comes before scheduling, because the server would terminate the workflow for such a command."""
    already = len(world.service.requests)
    handle = await _call_with(world, size, transport)
    answer = await handle.result()

    assert answer == f"BAD_REQUEST: the operation's input of {size} bytes is over the limit of {MAX_INPUT_BYTES}"
    assert len(world.service.requests) == already
    assert not {"ACTIVITY_TASK_SCHEDULED", "NEXUS_OPERATION_SCHEDULED"} & set(await events(handle))
    await Replayer(workflows=echoes.CALLERS).replay_workflow(await handle.fetch_history())
