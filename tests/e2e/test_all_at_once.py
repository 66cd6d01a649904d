"""What a team may have already, all of it at once on both workers."""

import dataclasses
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from types import ModuleType

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from temporalio.client import Client, WorkflowFailureError
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.contrib.opentelemetry import OpenTelemetryPlugin, create_tracer_provider
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.converter import DataConverter, ExternalStorage
from temporalio.exceptions import ApplicationError, NexusOperationError
from temporalio.plugin import SimplePlugin
from temporalio.worker import Plugin, Worker, WorkerDeploymentConfig

from bridge.testing import Pair
from scripts.environment.server import Server
from tests.e2e.test_external_storage import Store
from tests.support.codec import Scrambler
from tests.support.helpers import CALLER, HANDLER, make_current
from tests.support.pydantic_payments import Payment, PayWorkflow, Receipt, SandboxedOrder, UnsandboxedOrder
from tests.support.team_interceptors import MapsErrors, Reports, SetsTimeouts, WrapsHandles

NOTE = "deliver to the back door"


def converter(store: Store) -> DataConverter:
    """Pydantic values, encrypted, and stored elsewhere if they are longer than a few bytes."""
    storage = ExternalStorage(drivers=[store], payload_size_threshold=64)
    return dataclasses.replace(pydantic_data_converter, payload_codec=Scrambler(), external_storage=storage)


def ordered(ours: Plugin, position: int) -> list[Plugin]:
    """Three plugins, ours at *position*. The team's plugin sets interceptors for all activities."""
    team = [MapsErrors(), Reports(), SetsTimeouts(), WrapsHandles()]
    plugins: list[Plugin] = [OpenTelemetryPlugin(add_temporal_spans=True), SimplePlugin("team", interceptors=team)]
    plugins.insert(position, ours)
    return plugins


@pytest.mark.parametrize("position", [0, 1, 2])
async def test_a_call_with_all_that_a_team_may_have(
    server: Server, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The typed result and the failure arrive, nothing is in clear sight, and the trace has both sides."""
    exporter = InMemorySpanExporter()
    provider = create_tracer_provider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The provider of a process can be set only once, and other tests have theirs.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    mine, theirs = Store(), Store()
    caller = await Client.connect(server.address, namespace=CALLER, data_converter=converter(mine))
    handler = await Client.connect(server.address, namespace=HANDLER, data_converter=converter(theirs))
    module, name = ModuleType("payments"), uuid.uuid4().hex[:8]
    vars(module)["PayWorkflow"] = PayWorkflow

    def versioned(client: Client, workflows: list[type], ours: Plugin) -> Worker:
        version = WorkerDeploymentVersion(deployment_name=f"{client.namespace}-{name}", build_id="1")
        return Worker(
            client,
            task_queue=f"{client.namespace}-{name}",
            workflows=workflows,
            plugins=ordered(ours, position),
            deployment_config=WorkerDeploymentConfig(
                version=version, use_worker_versioning=True, default_versioning_behavior=VersioningBehavior.PINNED
            ),
        )

    pair = Pair(module, task_queue=f"{HANDLER}-{name}", handler_client=handler, caller_client=caller)
    async with (
        pair,
        versioned(handler, [PayWorkflow], pair.handler_plugin),
        versioned(caller, [SandboxedOrder, UnsandboxedOrder], pair.caller_plugin),
    ):
        for client in (caller, handler):
            await make_current(client, WorkerDeploymentVersion(f"{client.namespace}-{name}", "1"))
        for order in (SandboxedOrder, UnsandboxedOrder):
            key = f"{name}-{order.__name__}"
            payment = Payment(key=key, amount=Decimal("12.50"), due=datetime(2030, 1, 1, tzinfo=UTC), note=NOTE)
            handle = await caller.start_workflow(order.run, payment, id=f"order-{key}", task_queue=f"{CALLER}-{name}")
            assert await handle.result() == Receipt(amount=payment.amount, due=payment.due, note=NOTE)
            for history in (
                await handle.fetch_history(),
                await handler.get_workflow_handle(f"pay-{key}").fetch_history(),
            ):
                assert NOTE not in history.to_json()
            refused = payment.model_copy(update={"key": f"{key}-2", "amount": Decimal(-1)})
            with pytest.raises(WorkflowFailureError) as raised:
                await caller.execute_workflow(order.run, refused, id=f"order-{key}-2", task_queue=f"{CALLER}-{name}")
            assert isinstance(raised.value.cause, NexusOperationError)
            failure = raised.value.cause.cause
            assert isinstance(failure, ApplicationError)
            assert (failure.type, failure.message) == ("ValueError", "a negative amount")
    assert mine.kept
    assert theirs.kept
    spans = {each.name for each in exporter.get_finished_spans()}
    assert {"RunWorkflow:SandboxedOrder", "RunActivity:bridge.start_operation", "RunWorkflow:PayWorkflow"} <= spans
