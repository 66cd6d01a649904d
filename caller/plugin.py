"""The plugin that makes a worker a caller: it brings the waiting activity and its HTTP session."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

from temporalio.worker import (
    Interceptor,
    Worker,
    WorkerConfig,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from bridge.runtime.settings import load
from bridge.runtime.worker_plugin import SessionPlugin
from bridge.workflow.call import CALL_ENDED
from caller.callback_urls import CallbackUrls
from caller.cancel_activity import CancelActivities
from caller.completer import Completer
from caller.endpoints import Endpoints
from caller.settings import CallerSettings
from caller.startup_check import check_endpoints
from caller.waiting_activity import OperationActivities

USER_AGENT = "callback-bridge-caller/0.1"


class CallerPlugin(SessionPlugin):
    """Give it to a worker whose workflows use `bridge.create_client`: `Worker(..., plugins=[CallerPlugin()])`."""

    def __init__(
        self, settings: CallerSettings | None = None, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Read the settings where none are given.

        Raises:
            bridge.runtime.settings.SettingsError: They cannot be used.
        """
        super().__init__("bridge.CallerPlugin", user_agent=USER_AGENT)
        self._settings = settings if settings is not None else load(CallerSettings)
        self._clock = clock
        self._activities: list[OperationActivities] = []
        self._endpoints: Endpoints | None = None
        self._check: asyncio.Task[None] | None = None

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add the waiting activity and the one that cancels, bound to the worker's own client."""
        client, settings = config["client"], self._settings
        endpoints = Endpoints(settings, http=self.http, clock=self._clock)
        activities = OperationActivities(
            client=client,
            endpoints=endpoints,
            callbacks=None
            if settings.receiver is None
            else CallbackUrls(receiver_url=settings.receiver.url, tokens=settings.callback_tokens(client.namespace)),
            completer=Completer(client=client),
            clock=self._clock,
        )
        cancels = CancelActivities(client=client, endpoints=endpoints, clock=self._clock)
        self._activities.append(activities)
        self._endpoints = endpoints
        own = (activities.start_operation, cancels.cancel_operation)
        config["activities"] = [*config.get("activities", ()), *own]
        config["interceptors"] = [*config.get("interceptors", ()), _EndedCalls(activities)]
        return super().configure_worker(config)

    async def run_worker(self, worker: Worker, next: Callable[[Worker], Awaitable[None]]) -> None:  # noqa: A002
        """Run the worker, and check meanwhile whether its endpoints are ready for calls."""
        if self._endpoints is not None and self._check is None:
            receiver = self._settings.receiver
            callback = None if receiver is None else f"{receiver.url.rstrip('/')}/callbacks"
            check = check_endpoints(self._endpoints, callback=callback, clock=self._clock)
            self._check = asyncio.create_task(check)
        await super().run_worker(worker, next)

    async def before_close(self) -> None:
        """Tell now which targets the calls wait for, where that was to be told a little later."""
        if self._check is not None:
            self._check.cancel()
            await asyncio.gather(self._check, return_exceptions=True)
        for activities in self._activities:
            await activities.close()


class _EndedCalls(Interceptor):
    """Lets the workflows of a worker tell its activities that a call has ended."""

    def __init__(self, activities: OperationActivities) -> None:
        self._activities = activities

    def workflow_interceptor_class(
        self,
        input: WorkflowInterceptorClassInput,  # noqa: A002
    ) -> type[WorkflowInboundInterceptor] | None:
        """Adds a function that can be called from inside the sandbox, and no interceptor."""
        input.unsafe_extern_functions[CALL_ENDED] = self._activities.forget
        return None
