"""The plugin that makes a worker a caller: it brings the waiting activity and its HTTP session."""

from collections.abc import Callable
from datetime import UTC, datetime

from temporalio.worker import WorkerConfig

from bridge.runtime.settings import load
from bridge.runtime.worker_plugin import SessionPlugin
from caller.callback_urls import CallbackUrls
from caller.cancel_activity import CancelActivities
from caller.endpoints import Endpoints
from caller.interceptor import CallerInterceptor
from caller.settings import CallerSettings
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

    def configure_worker(self, config: WorkerConfig) -> WorkerConfig:
        """Add the waiting activity, the one that cancels, and the interceptor that keeps them as they are."""
        client, settings = config["client"], self._settings
        endpoints = Endpoints(settings, http=self.http, clock=self._clock)
        activities = OperationActivities(
            endpoints=endpoints,
            callbacks=None
            if settings.receiver is None
            else CallbackUrls(receiver_url=settings.receiver.url, tokens=settings.callback_tokens(client.namespace)),
            clock=self._clock,
        )
        cancels = CancelActivities(endpoints=endpoints)
        self._activities.append(activities)
        own = (activities.start_operation, cancels.cancel_operations)
        config["activities"] = [*config.get("activities", ()), *own]
        config["interceptors"] = [CallerInterceptor(activities), *config.get("interceptors", ())]
        return super().configure_worker(config)

    async def before_close(self) -> None:
        """Tell now which targets the calls wait for, where that was to be told a little later."""
        for activities in self._activities:
            await activities.close()
