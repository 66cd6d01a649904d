"""The receiver inside the worker's process. All workers of a plugin share it, and it serves while one of them runs.

The port is bound when the first worker is created, because the SDK cannot report an error of a worker that has not
started.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime

from temporalio.worker import Worker

from bridge.http.listener import bind, listening
from bridge.runtime.settings import SettingsError
from bridge.temporal.lasting_client import present_client
from caller.receiver import create_app
from caller.settings import CallerSettings


class HostedReceiver:
    """A receiver that several workers share."""

    def __init__(self, settings: CallerSettings, *, clock: Callable[[], datetime]) -> None:
        """Raises SettingsError if the settings have no receiver."""
        self._settings, self._place, self._clock = settings, settings.required_receiver(), clock
        self._sockets: list[socket.socket] = []
        self._namespace = ""
        self._workers: list[Worker] = []
        self._lock = asyncio.Lock()
        self._stack = AsyncExitStack()

    def reserve(self, namespace: str) -> None:
        """Bind the port for workers of *namespace*.

        Raises:
            SettingsError: Another process has bound the port, or a worker of another namespace has reserved it.
        """
        if self._sockets:
            if namespace != self._namespace:
                message = (
                    f"the receiver on port {self._place.port} completes calls of namespace {self._namespace}; give the "
                    f"workers of {namespace} a plugin with settings of their own (receiver.url, receiver.port)"
                )
                raise SettingsError(message)
            return
        try:
            self._sockets = bind(self._place.host, self._place.port)
        except OSError as error:
            message = (
                f"{error.strerror}. If another worker serves the receiver there, that one is enough: use its "
                "CallerPlugin for every worker of the process, and serve_receiver=False in other processes; or choose "
                "another port by receiver.port (BRIDGE_RECEIVER__PORT) and put a proxy at receiver.url"
            )
            raise SettingsError(message) from None
        self._namespace = namespace

    @asynccontextmanager
    async def serving(self, worker: Worker) -> AsyncIterator[None]:
        """Serve while *worker* runs. After the last worker, wait until all requests are answered."""
        async with self._lock:
            if not self._workers:
                self.reserve(worker.client.namespace)
                client = present_client(lambda: (self._workers or [worker])[-1].client)
                app = create_app(self._settings, client=client, clock=self._clock)
                await self._stack.enter_async_context(listening(app, self._sockets))
            self._workers.append(worker)
        try:
            yield
        finally:
            async with self._lock:
                try:
                    if len(self._workers) == 1:
                        self._sockets = []
                        await self._stack.aclose()
                finally:
                    # The app that is closing still asks for the client of this worker.
                    self._workers.remove(worker)
