"""Both sides of the bridge in one process, on real sockets of the loopback, with faults that a test chooses.

The services, plugins, signatures and deliveries are those of production. Only the settings are made by the pair. With
its client a test of a handler needs no caller.
"""

import asyncio
import tomllib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from types import ModuleType
from typing import Literal, Self

import nexusrpc
from aiohttp import web
from temporalio.client import Client

from bridge.admin.init import local_settings
from bridge.http.listener import bind, listening
from caller import receiver
from caller.client import create_client
from caller.plugin import CallerPlugin
from caller.settings import CallerSettings
from handler import service
from handler.plugin import HandlerPlugin
from handler.settings import HandlerSettings

_HOST = "127.0.0.1"

Fault = Literal["lost", "answer lost"] | int | timedelta
"""What happens to one request. "lost": it has no effect, and the sender gets no answer. "answer lost": it has its
effect, but the sender gets no answer and therefore repeats it. A number: a proxy answers with this status. A duration:
the request arrives so much later."""


class PairService:
    """The receiver or the handler service of a pair."""

    def __init__(self, make: Callable[[], web.Application]) -> None:
        [free] = bind(_HOST, 0)
        self._port, self._make, self._running = free.getsockname()[1], make, AsyncExitStack()
        free.close()
        self.url = f"http://{_HOST}:{self._port}"
        """Base URL of the service."""
        self.faults: list[Fault] = []
        """What happens to the next requests, one fault for each. Later requests are undisturbed."""

    async def start(self) -> None:
        """Listen, for the first time or after `stop`."""
        app = self._make()
        app.middlewares.insert(0, self._disturb)
        await self._running.enter_async_context(listening(app, bind(_HOST, self._port)))

    async def stop(self) -> None:
        """Stop listening: requests are refused until `start`."""
        await self._running.aclose()

    @web.middleware
    async def _disturb(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        # The check at the start of a worker is no part of a call. Its path has fewer segments.
        is_check = request.path.count("/") < 3 and not request.path.startswith("/callbacks/")
        match None if is_check or not self.faults else self.faults.pop(0):
            case int() as status:
                return web.Response(status=status)
            case "lost" | "answer lost" as fault:
                if fault == "answer lost":
                    await handler(request)
                if isinstance(request.transport, asyncio.Transport):
                    request.transport.abort()
                return web.Response()
            case timedelta() as delay:
                await asyncio.sleep(delay.total_seconds())
            case None:
                pass
        return await handler(request)


class Pair:
    """The receiver, the handler service, and the plugins for the workers of a test.

    Use it as an async context manager around the workers. It listens on free ports of the loopback.
    """

    def __init__(
        self,
        module: ModuleType,
        *,
        task_queue: str,
        handler_client: Client,
        caller_client: Client | None = None,
        endpoint: str = "payments",
    ) -> None:
        """Make settings with new keys.

        Args:
            module: What the handler serves, as for `handler serve --module`.
            task_queue: Task queue of the targets that name none.
            handler_client: Connected to the handler's namespace.
            caller_client: Connected to the caller's namespace; by default the handler's client.
            endpoint: Name of the endpoint that the calling workflows use.

        Raises:
            bridge.runtime.settings.SettingsError: The module has neither decorated workflows nor service handlers.
        """
        self.receiver = PairService(lambda: receiver.create_app(for_caller, client=caller_client or handler_client))
        """The caller's receiver."""
        self.service = PairService(lambda: service.create_app(for_handler, module, client=handler_client))
        """The handler's service."""
        texts = local_settings(
            receiver_url=self.receiver.url, service_url=self.service.url, endpoint=endpoint, task_queue=task_queue
        )
        # The clients of a test choose its namespaces.
        ours, tree = ({**tomllib.loads(text), "namespace": None} for text in texts.values())
        for_caller, served = CallerSettings(**ours), service.Served.by(module)
        definitions = filter(None, (nexusrpc.get_service_definition(type(each)) for each in served.services))
        names = {each.service for each in served.targets} | {each.name for each in definitions}
        [peer] = tree["callers"].values()
        peer["operations"] = [f"{each}/*" for each in names]
        for_handler = HandlerSettings(**tree)
        self.caller_plugin = CallerPlugin(for_caller)
        """For the worker of the calling workflows."""
        self.handler_plugin = HandlerPlugin(for_handler)
        """For the worker of the targets."""
        converter = handler_client.data_converter
        self.client = partial(create_client, endpoint=endpoint, settings=for_caller, data_converter=converter)
        """`caller.client.create_client` without its other arguments: `client(service=…)` calls a handler in a test."""

    async def __aenter__(self) -> Self:
        await self.receiver.start()
        await self.service.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.service.stop()
        await self.receiver.stop()
