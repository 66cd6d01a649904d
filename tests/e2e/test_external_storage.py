"""External storage: a reference crosses only if both sides' settings share the store; otherwise its value crosses."""

import dataclasses
import uuid
from collections.abc import Sequence

import pytest
from aiohttp import web
from temporalio.api.common.v1 import Payload
from temporalio.client import WorkflowFailureError
from temporalio.converter import (
    DataConverter,
    ExternalStorage,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)
from temporalio.exceptions import ApplicationError, NexusOperationError

from bridge.protocol.headers import OperationState
from bridge.protocol.outcome import decode_outcome
from bridge.protocol.payload import encode_payload, holds_reference
from bridge.security.signatures import MessageSigner
from scripts.environment.server import Server
from tests.support.callers import CallPlan
from tests.support.codec import Scrambler
from tests.support.helpers import HANDLER, assert_eventually
from tests.support.peer import Answered, send, start
from tests.support.services import Quotes
from tests.support.targets import Ask, Reply
from tests.support.world import World, running_world

LONG = CallPlan(first_lease=600)
BIG = 3 * 1024 * 1024


class Store(StorageDriver):
    """A store that keeps payloads in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def name(self) -> str:
        return "store"

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        claims = []
        for payload in payloads:
            key = uuid.uuid4().hex
            self.kept[key] = payload.SerializeToString()
            claims.append(StorageDriverClaim(claim_data={"key": key}))
        return claims

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        return [Payload.FromString(self.kept[each.claim_data["key"]]) for each in claims]


def storing(store: Store, threshold: int, *, codec: Scrambler | None = None) -> DataConverter:
    storage = ExternalStorage(drivers=[store], payload_size_threshold=threshold)
    return dataclasses.replace(DataConverter.default, external_storage=storage, payload_codec=codec)


def sharing(world: World) -> None:
    world.peer_options = {"shares_storage": True}
    keys = {"start_keys": world.keys.start, "completion_keys": world.keys.completion}
    world.caller_options = {"handlers": {HANDLER: {**keys, "shares_storage": True}}}


@pytest.mark.parametrize("has_codec", [False, True])
@pytest.mark.parametrize("behaviour", ["return", "fail"])
@pytest.mark.parametrize("way", ["callback", "delivery workflow", "renewal"])
async def test_a_stored_outcome_arrives_as_its_value(server: Server, way: str, behaviour: str, has_codec: bool) -> None:
    """The caller has no such store. Every way of delivery resolves the reference, also through a codec."""
    codec = Scrambler() if has_codec else None
    caller = dataclasses.replace(DataConverter.default, payload_codec=codec)
    converters = (caller, storing(Store(), 16, codec=codec))
    async with running_world(server, converters=converters) as world:
        if way != "callback":

            async def unavailable(_: web.Request) -> web.StreamResponse:
                return web.Response(status=503)

            world.receiver.before = unavailable
        plan = CallPlan(first_lease=2, renewal=1) if way == "renewal" else LONG
        ask = Ask(key=world.key(), behaviour=behaviour, text="x" * 1000)
        handle = await world.call(ask, plan)
        if way == "delivery workflow":

            async def refused() -> None:
                assert len(await world.receiver.answered()) >= 2

            await assert_eventually(refused)
            world.receiver.before = None
        if behaviour == "return":
            assert await handle.result() == Reply("x" * 1000)
        else:
            with pytest.raises(WorkflowFailureError) as raised:
                await handle.result()
            assert isinstance(raised.value.cause, NexusOperationError)
            failure = raised.value.cause.cause
            assert isinstance(failure, ApplicationError)
            assert failure.details == ({"key": ask.key}, "two")


class UnavailableStore(Store):
    """Refuses to return the first values that are asked for."""

    refuses = 2

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        self.refuses -= 1
        if self.refuses >= 0:
            raise ConnectionError
        return await super().retrieve(context, claims)


async def test_a_store_that_is_unavailable_for_a_while_costs_no_outcome(server: Server) -> None:
    """The delivery goes on as a workflow until the store returns the value."""
    async with running_world(server, converters=(DataConverter.default, storing(UnavailableStore(), 16))) as world:
        handle = await world.call(Ask(key=world.key(), text="x" * 1000), CallPlan(first_lease=600, deadline=30))
        assert await handle.result() == Reply("x" * 1000)


async def test_values_over_two_mebibytes_cross_as_references_where_the_store_is_shared(server: Server) -> None:
    """References cross in both directions; no payload of that size fits into a history."""
    store = Store()
    async with running_world(server, converters=(storing(store, 4096), storing(store, 4096)), prepare=sharing) as world:
        ask = Ask(key=world.key(), text="t" * BIG, size=BIG)
        reply = await (await world.call(ask, dataclasses.replace(LONG, max_input_bytes=None))).result()
        assert (len(reply.text), len(reply.blob)) == (BIG, BIG)


async def test_our_own_memos_stay_in_the_history(server: Server) -> None:
    """With a threshold of 0 bytes, starts and deliveries do not read the store."""
    async with running_world(server, converters=(DataConverter.default, storing(Store(), 0))) as world:
        ask = Ask(key=world.key(), text="small")
        assert await (await world.call(ask, LONG)).result() == Reply("small")
        described = await world.target(ask).describe()
        memo = described.raw_description.workflow_execution_info.memo.fields["bridge"]
        assert memo.metadata["encoding"] == b"json/plain"


async def quoted(world: World, ask: Ask, converter: DataConverter) -> Answered:
    """Call an operation that runs within its start, with the input as *converter* encodes it."""
    [payload] = await converter.encode([ask])
    message = start(world, {})
    message.url = message.url.replace("ProbeService/probe", "QuoteService/quote")
    content, message.body = encode_payload(payload)
    message.headers.update(content)
    return await send(message, MessageSigner(world.keys.start))


@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_sync_operation_reads_and_writes_references_only_where_the_store_is_shared(
    server: Server, is_shared: bool
) -> None:
    """A reference could name any value in the handler's store. A caller without the store could not read one."""

    def prepare(world: World) -> None:
        world.services = [Quotes()]
        if is_shared:
            sharing(world)

    handlers = storing(Store(), 512)
    converters, without = (DataConverter.default, handlers), ("caller", "handler", "receiver")
    async with running_world(server, without=without, converters=converters, prepare=prepare) as world:
        refused = await quoted(world, Ask(key="k", text="of another caller" * 100), handlers)
        assert refused.status == (200 if is_shared else 400)
        assert is_shared or "does not share" in refused.message
        for ask in (Ask(key="k", text="x", size=3000), Ask(key="k", behaviour="unwritable failure", text="x" * 1000)):
            answer = await quoted(world, ask, DataConverter.default)
            assert answer.status in {200, 424}
            outcome = decode_outcome(
                OperationState(answer.headers["Nexus-Operation-State"]), answer.headers, answer.body
            )
            part = outcome.result or outcome.failure
            assert part is not None
            assert holds_reference(part) is (is_shared and ask.size > 0)


async def test_a_reference_of_a_caller_that_shares_nothing_is_refused(server: Server) -> None:
    """The reference could name any value in the handler's store."""
    async with running_world(server, converters=(DataConverter.default, storing(Store(), 512))) as world:
        message = start(world, {"key": world.key()})
        message.headers["Content-Type"] = "application/x-temporal-payload"
        reference = Payload(metadata={"encoding": b"json/external-storage-reference"}, data=b"{}")
        message.body = reference.SerializeToString()
        answer = await send(message, MessageSigner(world.keys.start))
        assert answer.status == 400
        assert b"external storage" in answer.body
