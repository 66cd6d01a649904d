"""The plugin that makes a worker a caller: waiting activity, HTTP session and, on request, the receiver."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from weakref import WeakSet

from temporalio.worker import Worker, WorkerConfig

from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.settings import SettingsError, load
from bridge.security.callback_tokens import CallbackTokens
from bridge.temporal.pollers import check_workers
from bridge.temporal.worker_plugin import SessionPlugin
from caller.endpoint_client import Endpoints
from caller.hosted_receiver import HostedReceiver
from caller.interceptor import CallerInterceptor
from caller.settings import CallerSettings
from caller.startup_check import check_endpoints
from caller.waiting.callback_urls import CallbackUrls
from caller.waiting.cancel_activity import CancelActivities
from caller.waiting.waiting_activity import OperationActivities


class CallerPlugin(SessionPlugin):
    """Give it to a worker whose workflows use `bridge.create_client`: `Worker(..., plugins=[CallerPlugin()])`."""

    def __init__(
        self,
        settings: CallerSettings | None = None,
        *,
        serve_receiver: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the settings if none are given.

        Args:
            settings: The caller's settings.
            serve_receiver: Run the receiver in this process, on `receiver.host` and `receiver.port` of the settings,
                while at least one worker with this plugin runs. All workers of a process share one plugin.
            clock: Returns the time.

        Raises:
            bridge.runtime.settings.SettingsError: The settings cannot be used. If another process listens on the
                receiver's port, creating a worker raises the same error.
        """
        super().__init__("bridge.CallerPlugin")
        self._settings = settings if settings is not None else load(CallerSettings)
        self._clock = clock
        self._activities: list[OperationActivities] = []
        self._receiver = HostedReceiver(self._settings, clock=clock) if serve_receiver else None
        self._checks: list[asyncio.Task[None]] = []
        self._workers = WeakSet[Worker]()

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add the waiting activity, the cancel activity, and the interceptor that protects both.

        If the worker's client has the plugin too, the worker is configured once.
        """
        if any(isinstance(each, CallerInterceptor) for each in config.get("interceptors", ())):
            if self._receiver is not None and not self._activities:
                message = "the worker's client has another CallerPlugin: give serve_receiver=True to that one"
                raise SettingsError(message)
            return config
        client, settings = config["client"], self._settings
        settings.check_namespace(client.namespace)
        if self._receiver is not None:
            self._receiver.reserve(client.namespace)
        metrics = Metrics.of(client)
        keys = LiveKeys(settings, metrics)
        endpoints = Endpoints(settings, keys=keys, http=self.http, metrics=metrics)
        activities = OperationActivities(
            endpoints=endpoints,
            callbacks=None
            if settings.receiver is None
            else CallbackUrls(
                receiver_url=settings.receiver.url,
                tokens=CallbackTokens(keys("callback_keys"), namespace=client.namespace),
            ),
            metrics=metrics,
            clock=self._clock,
        )
        cancels = CancelActivities(endpoints=endpoints)
        self._activities.append(activities)
        bridge_activities = (activities.start_operation, cancels.cancel_operations)
        config["activities"] = [*config.get("activities", ()), *bridge_activities]
        config["interceptors"] = [CallerInterceptor(activities, settings=settings), *config.get("interceptors", ())]
        return super().configure_worker(config)

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run the worker and, around it, the receiver. The receiver accepts outcomes until the activities have ended.

        Meanwhile tasks check whether the endpoints and the workers of the task queue are ready for calls.
        """
        if worker in self._workers or not self._activities:
            # The worker and its client have the plugin, and the other of the two does the work.
            await next(worker)
            return
        self._workers.add(worker)
        for each in worker.config(active_config=True).get("interceptors", ()):
            if isinstance(each, CallerInterceptor):
                await each.serve(worker)
        async with self._receiver.serving(worker) if self._receiver is not None else nullcontext():
            if not self._checks:
                check = check_endpoints(self._settings, worker.client.namespace, clock=self._clock)
                self._checks.append(asyncio.create_task(check))
            self._checks.append(asyncio.create_task(check_workers(worker.client, {worker.task_queue: "CallerPlugin"})))
            await super().run_worker(worker, next)

    async def before_close(self) -> None:
        """Stop the checks. Record at once the heartbeat details that held attempts have not recorded yet."""
        for each in self._checks:
            each.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        for activities in self._activities:
            await activities.close()
