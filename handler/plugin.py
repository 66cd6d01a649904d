"""The plugin that makes a worker a handler: it puts the interceptor around its workflows, delivers, and sweeps."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import Client
from temporalio.converter import DataConverter
from temporalio.worker import ReplayerConfig, WorkerConfig

from bridge.runtime.settings import load
from bridge.runtime.temporal import Namespace
from bridge.runtime.worker_plugin import SessionPlugin
from bridge.security.callback_tokens import OperationTokens
from bridge.security.keys import decode_key
from bridge.workflow.targets import Targets
from handler.delivery.abandoned import OrphanActivities
from handler.delivery.activity import DeliveryActivities
from handler.delivery.callback_client import Courier
from handler.delivery.interceptor import DELIVERY_BUDGET, DeliveryInterceptor
from handler.delivery.workflow import DeliveryWorkflow
from handler.settings import HandlerSettings
from handler.start.canceler import Canceler
from handler.start.held_starts import Holds
from handler.start.native_nexus import TargetOperation, nexus_services
from handler.start.starter import Starter
from handler.sweep.activity import SweepActivities
from handler.sweep.workflow import SweepWorkflow

USER_AGENT = "callback-bridge-handler/0.1"

_BLOB_LIMIT = 2 * 1024 * 1024
_RECORD_BYTES = 64 * 1024
"""What the delivery activity's input may hold beside the outcome."""


class HandlerPlugin(SessionPlugin):
    """Give it to the worker that runs the targets: `Worker(..., plugins=[HandlerPlugin()])`."""

    def __init__(
        self,
        settings: HandlerSettings | None = None,
        *,
        max_outcome_bytes: int | None = None,
        delivery_budget: timedelta = DELIVERY_BUDGET,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the settings where none are given.

        Args:
            settings: The handler's settings.
            max_outcome_bytes: Largest outcome, before the payload codec, that is told as it is. The default leaves
                room for what a codec adds: a quarter of the server's limit of 2 MiB where there is one.
            delivery_budget: How long a target stays open for its delivery.
            clock: Tells the time.

        Raises:
            bridge.runtime.settings.SettingsError: The settings cannot be used.
        """
        super().__init__("bridge.HandlerPlugin", user_agent=USER_AGENT, workflows=[DeliveryWorkflow, SweepWorkflow])
        self._settings = settings if settings is not None else load(HandlerSettings)
        self._max_outcome_bytes = max_outcome_bytes
        self._delivery_budget = delivery_budget
        self._clock = clock

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add interceptor, delivery and sweep, bound to the worker's own client."""
        client = config["client"]
        courier = Courier(self._settings, http=self.http, clock=self._clock)
        deliveries = DeliveryActivities(client=client, courier=courier, clock=self._clock)
        orphans = OrphanActivities(
            client=client,
            courier=courier,
            first_check=timedelta(seconds=self._settings.orphan_check_s),
            clock=self._clock,
        )
        sweeps = SweepActivities(client=client, max_outcome_bytes=self._limit(client.data_converter))
        if self._settings.nexus:
            # Beside what the worker's author serves himself.
            native = self._nexus_services(client, config)
            config["nexus_service_handlers"] = [*config.get("nexus_service_handlers", ()), *native]
        own = (deliveries.deliver_completion, sweeps.sweep, orphans.watch_callers, orphans.cancel_orphan)
        config["activities"] = [*config.get("activities", ()), *own]
        config["interceptors"] = [*config.get("interceptors", ()), self._interceptor(client.data_converter)]
        return super().configure_worker(config)

    def _nexus_services(self, client: Client, config: WorkerConfig) -> list[Any]:
        tokens = OperationTokens(self._settings.operation_keys)
        starter = Starter(
            client=client,
            tokens=tokens,
            hash_key=decode_key(self._settings.hash_key),
            task_queue=config.get("task_queue") or self._settings.task_queue,
            retention=Namespace(client, clock=self._clock).retention,
            holds=Holds(client, limit=0),
            clock=self._clock,
            # The worker that takes the call runs the target too, most often.
            is_eager=True,
        )
        canceler = Canceler(client=client, tokens=tokens)
        targets = Targets(config.get("workflows", ()))
        return nexus_services(
            targets,
            lambda target: TargetOperation(
                target, starter=starter, canceler=canceler, data_converter=client.data_converter
            ),
        )

    def configure_replayer(self, config: ReplayerConfig) -> ReplayerConfig:
        """Add the interceptor: histories hold its commands."""
        converter = config.get("data_converter") or DataConverter.default
        config["interceptors"] = [*config.get("interceptors", ()), self._interceptor(converter)]
        return super().configure_replayer(config)

    def _interceptor(self, converter: DataConverter) -> DeliveryInterceptor:
        return DeliveryInterceptor(
            failure_converter=converter.failure_converter,
            max_outcome_bytes=self._limit(converter),
            budget=self._delivery_budget,
        )

    def _limit(self, converter: DataConverter) -> int:
        if self._max_outcome_bytes is not None:
            return self._max_outcome_bytes
        room = _BLOB_LIMIT // 4 if converter.payload_codec is not None else 0
        return _BLOB_LIMIT - _RECORD_BYTES - room
