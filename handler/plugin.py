"""The plugin that makes a worker a handler: the worker delivers the outcomes of its targets, and sweeps."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker, WorkerConfig

from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.settings import SettingsError, load
from bridge.temporal.activity_guard import ActivityGuard
from bridge.temporal.connection import Namespace
from bridge.temporal.lasting_client import present_client
from bridge.temporal.worker_plugin import SessionPlugin
from bridge.workflow.targets import Targets
from handler.authorization import Authorization, Authorize
from handler.delivery.activities import DeliveryActivities, OnUndelivered, require_hook
from handler.delivery.callback_client import CallbackClient
from handler.delivery.caller_close_policy import CANCEL_ABANDONED_ACTIVITY, WATCH_CALLERS_ACTIVITY, CallerWatch
from handler.delivery.close_reporter import is_reporting
from handler.delivery.dispatcher import Dispatcher
from handler.delivery.interceptor import DeliveryInterceptor
from handler.delivery.workflow import (
    DELIVER_ACTIVITY,
    REPORT_UNDELIVERED_ACTIVITY,
    DeliveryWorkflow,
    VersionedDeliveryWorkflow,
)
from handler.settings import HandlerSettings
from handler.start.canceler import Canceler
from handler.start.held_starts import HeldStarts
from handler.start.native_nexus import TargetOperation, nexus_services
from handler.start.starter import Starter
from handler.sweep.activity import SweepActivities
from handler.sweep.workflow import SWEEP_ACTIVITY, SweepWorkflow, VersionedSweepWorkflow
from handler.user_code.threads import BoundedThreads, CallerThreads


class HandlerPlugin(SessionPlugin):
    """Give it to the worker that runs the targets: `Worker(..., plugins=[HandlerPlugin()])`."""

    def __init__(
        self,
        settings: HandlerSettings | None = None,
        *,
        on_undelivered: OnUndelivered | None = None,
        authorize: Authorize | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the settings if none are given.

        Args:
            settings: The handler's settings.
            on_undelivered: Called when a delivery ends without being accepted.
            authorize: Decides about the starts of native Nexus calls, as in the module of the handler service.
            clock: Returns the time.

        Raises:
            bridge.runtime.settings.SettingsError: The settings cannot be used.
            TypeError: *on_undelivered* cannot be called with an outcome.
        """
        super().__init__("bridge.HandlerPlugin")
        if on_undelivered is not None:
            require_hook(on_undelivered)
        self._settings = settings if settings is not None else load(HandlerSettings)
        self._clock = clock
        self._on_undelivered = on_undelivered
        self._authorize = authorize
        self._deliveries: list[DeliveryInterceptor] = []

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add delivery and sweep. If the worker's client has the plugin too, the worker is configured once.

        Raises:
            bridge.runtime.settings.SettingsError: Another plugin has configured the worker, and would not call the
                functions of this one.
        """
        if is_reporting(config.get("workflow_runner")):
            is_own = any(each in self._deliveries for each in config.get("interceptors", ()))
            if not is_own and (self._on_undelivered or self._authorize):
                message = "the worker's client has another HandlerPlugin: give on_undelivered and authorize to that one"
                raise SettingsError(message)
            return config
        self._settings.check_namespace(config["client"].namespace)
        config = super().configure_worker(config)
        metrics = Metrics.of(config["client"])
        keys = LiveKeys(self._settings, metrics)
        callbacks = CallbackClient(self._settings, keys=keys, http=self.http, metrics=metrics, clock=self._clock)
        dispatcher = Dispatcher(callbacks=callbacks, task_queue=config["task_queue"])
        deliveries = DeliveryActivities(callbacks=callbacks, metrics=metrics, on_undelivered=self._on_undelivered)
        watch = CallerWatch(callbacks=callbacks, first=timedelta(seconds=self._settings.abandoned_check_s))
        sweeps = SweepActivities(dispatcher=dispatcher)
        if self._settings.nexus:
            # Keep the Nexus services of the worker's author.
            native = self._nexus_services(present_client(lambda: config["client"]), config)
            config["nexus_service_handlers"] = [*config.get("nexus_service_handlers", ()), *native]
        own: dict[str, Callable[..., Any]] = {
            DELIVER_ACTIVITY: deliveries.deliver_completion,
            REPORT_UNDELIVERED_ACTIVITY: deliveries.report_undelivered,
            WATCH_CALLERS_ACTIVITY: watch.watch_callers,
            CANCEL_ABANDONED_ACTIVITY: watch.cancel_abandoned,
            SWEEP_ACTIVITY: sweeps.sweep,
        }
        config["activities"] = [*config.get("activities", ()), *own.values()]
        versioning = config.get("deployment_config")
        if versioning is not None and versioning.use_worker_versioning:
            workflows: list[type] = [VersionedDeliveryWorkflow, VersionedSweepWorkflow]
        else:
            workflows = [DeliveryWorkflow, SweepWorkflow]
        config["workflows"] = [*config.get("workflows", ()), *workflows]
        delivery = DeliveryInterceptor(dispatcher)
        delivery.configure(config)
        config["interceptors"] = [ActivityGuard(*own), *config["interceptors"]]
        self._deliveries.append(delivery)
        return config

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run the worker, and deliver what it closes.

        Raises:
            RuntimeError: Another plugin has replaced the workflow runner, so that nothing would be delivered.
        """
        interceptors = worker.config(active_config=True).get("interceptors", ())

        async def deliver(running: Worker) -> None:
            async with AsyncExitStack() as stack:
                for delivery in self._deliveries:
                    if delivery in interceptors:
                        await stack.enter_async_context(delivery.delivering(running))
                await next(running)

        await super().run_worker(worker, deliver)

    def _nexus_services(self, client: Client, config: WorkerConfig) -> list[Any]:
        namespace, threads = Namespace(client, clock=self._clock), CallerThreads(BoundedThreads)
        starter = Starter(
            client=client,
            namespace=namespace,
            settings=self._settings.model_copy(update={"task_queue": config["task_queue"]}),
            holds=HeldStarts(client, limit=0),
            threads=threads,
            clock=self._clock,
            authorization=Authorization(self._authorize, threads),
            # The worker that receives the call usually runs the target too.
            is_eager=True,
        )
        canceler = Canceler(client=client, namespace=namespace)
        converter = client.data_converter
        return nexus_services(
            Targets(config.get("workflows", ())),
            lambda target: TargetOperation(target, starter=starter, canceler=canceler, data_converter=converter),
        )
