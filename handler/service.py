"""The handler service: an aiohttp application that starts targets for the callers in its settings.

It keeps no state, therefore any number of copies may run. `{caller}` in a route only selects the keys that must verify.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from types import ModuleType
from typing import Any, Self

from aiohttp import web
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.console import serving_console
from bridge.errors import UnavailableError, WrongHandlerError, bad_request, not_found
from bridge.http import application
from bridge.http.application import add_route, answer
from bridge.http.client import HttpClient
from bridge.http.incoming_message import FACTS, IncomingMessage, known_peer
from bridge.http.peer_exchanges import PeerExchanges, record_exchanges
from bridge.protocol.cancel import decode_cancel
from bridge.protocol.echo import Echo, encode_echo
from bridge.protocol.headers import OPERATION_TOKEN, REQUEST_ID
from bridge.protocol.payload import MAX_PAYLOAD_BYTES, decode_payload
from bridge.protocol.start import Running, StartAnswer, decode_start, encode_answer
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.settings import SettingsError
from bridge.runtime.tracing import span, trace_fields
from bridge.security.signatures import MessageKind
from bridge.temporal.connection import Namespace, connect
from bridge.temporal.lasting_client import lasting_client
from bridge.temporal.pollers import check_workers
from bridge.workflow.targets import Target, Targets
from handler.authentication import Caller, callers
from handler.authorization import Authorization, Authorize, authorize_in, require_in_settings
from handler.delivery.callback_client import CallbackClient
from handler.delivery.operation_token import OperationToken
from handler.reports.console import pages
from handler.reports.open_deliveries import watch_deliveries
from handler.settings import HandlerSettings
from handler.start.canceler import Canceler
from handler.start.held_starts import HeldStarts
from handler.start.limits import REFUSAL_DELAY_S
from handler.start.rpc_errors import handler_error_from_rpc
from handler.start.starter import Starter
from handler.sweep.activity import start_sweep
from handler.task_queues import task_queues
from handler.user_code.sync_operations import SyncOperations, service_handlers_in
from handler.user_code.threads import BoundedThreads

_log = event_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a team's module offers to callers."""

    targets: Targets
    """The decorated workflows."""
    services: Sequence[Any]
    """Instances of classes decorated with `nexusrpc.handler.service_handler`."""
    authorize: Authorize | None
    """Decides whether a start is allowed; None allows all that the settings allow."""

    @classmethod
    def by(cls, module: ModuleType) -> Self:
        """Collect the workflows, the service handlers and the function `authorize` that *module* defines or imports.

        Raises:
            bridge.runtime.settings.SettingsError: The module has no operation, two workflows claim one operation, or
                `authorize` has other parameters.
        """
        try:
            found = cls(
                targets=Targets.in_module(module),
                services=service_handlers_in(module),
                authorize=authorize_in(module),
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        if not list(found.targets) and not found.services:
            place = f"{module.__name__} ({getattr(module, '__file__', None)})"
            message = f"{place} has no workflow decorated with @emits_callback, and no service handler"
            raise SettingsError(message)
        return found


def create_app(
    settings: HandlerSettings,
    module: ModuleType,
    *,
    client: Client | None = None,
    is_eager: bool = False,
    executor: Executor | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> web.Application:
    """Return the handler service as an aiohttp application: run it alone, or mount it with `add_subapp`.

    If it is mounted, `service.url` of the settings includes the prefix. Without *client* the application connects to
    Temporal when it starts; `TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE` and similar variables give the connection.

    Args:
        settings: The handler's settings.
        module: The service serves its decorated workflows and service handlers. If it has a function `authorize`, the
            function decides about every start (`handler.authorization.Authorize`).
        client: Starts the targets.
        is_eager: Whether a worker for the task queue runs in this process and uses the same client.
        executor: Runs the team's functions that are not `async`; it is not closed. By default each caller has 32
            threads, so that none takes the threads of the others.
        clock: Returns the time.

    Raises:
        bridge.runtime.settings.SettingsError: The module has neither decorated workflows nor service handlers.
    """
    served = Served.by(module)
    peers = PeerExchanges(settings.callers, clock=clock)

    async def running(app: web.Application) -> AsyncIterator[None]:
        connected = client or lasting_client(await connect(settings, serves_metrics=True))
        threads = {caller: executor or BoundedThreads() for caller in settings.callers}
        http = HttpClient()
        app[_SERVICE] = _Service(
            settings, served, connected, http=http, is_eager=is_eager, threads=threads, clock=clock
        )
        watching = (
            asyncio.create_task(watch_deliveries(connected, app[_SERVICE].metrics, settings.callers)),
            asyncio.create_task(check_workers(connected, task_queues(served.targets, settings))),
        )
        try:
            if settings.sweep:
                try:
                    await start_sweep(connected, targets=served.targets, settings=settings)
                except ValueError as error:
                    raise SettingsError(str(error)) from None
            async with serving_console(settings.console, pages(connected, settings), peers, clock=clock):
                yield
        finally:
            for each in watching:
                each.cancel()
            await http.aclose()
            if executor is None:
                # Do not wait for functions that still run: their callers are disconnected already.
                for own in threads.values():
                    own.shutdown(wait=False, cancel_futures=True)

    async def is_ready() -> bool:
        # A service without requests would not see that a changed file is bad.
        app[_SERVICE].keys.look()
        return await app[_SERVICE].namespace.is_reachable()

    async def release_held_starts(app: web.Application) -> None:
        app[_SERVICE].holds.close()

    app = application.create_app(is_ready)
    app.middlewares.insert(0, record_exchanges("handler", lambda: app[_SERVICE].metrics, peers))
    app.cleanup_ctx.append(running)
    app.on_shutdown.append(release_held_starts)
    # A name may contain braces, which aiohttp's default pattern of a segment refuses.
    path = "/c/{caller}/{service:[^/]+}/{operation:[^/]+}"
    add_route(app, "/c/{caller}", _SERVICE, _Service.echo)
    add_route(app, path, _SERVICE, _Service.start)
    add_route(app, f"{path}/cancel", _SERVICE, _Service.cancel)
    # Temporal's server 1.29 sends this form.
    add_route(app, f"{path}/{{token:[^/]+}}/cancel", _SERVICE, _Service.cancel)
    return app


class _Service:
    """The routes and what they need. Created once there is a client."""

    def __init__(
        self,
        settings: HandlerSettings,
        served: Served,
        client: Client,
        *,
        http: HttpClient,
        is_eager: bool,
        threads: Mapping[str, Executor],
        clock: Callable[[], datetime],
    ) -> None:
        """Raises SettingsError if an operation is claimed twice."""
        self.metrics = Metrics.of(client)
        self.keys = keys = LiveKeys(settings, self.metrics)
        self._callbacks = CallbackClient(settings, keys=keys, http=http, metrics=self.metrics, clock=clock)
        self.namespace = Namespace(client, clock=clock)
        self._name = settings.name
        self._clock = clock
        self._callers = callers(settings, keys)
        self._targets = served.targets
        inline_converter = replace(client.data_converter, external_storage=None)
        self._operations = SyncOperations(
            served.services,
            targets=served.targets,
            converters={
                name: client.data_converter if each.shares_storage else inline_converter
                for name, each in settings.callers.items()
            },
            threads=threads,
            clock=clock,
        )
        self._offered = {(each.service, each.operation) for each in served.targets} | self._operations.names
        """Pairs of service and operation."""
        _log.info("bridge.serves: serves %s", ", ".join(sorted(map("/".join, self._offered))))
        self.holds = HeldStarts(client, limit=settings.service.held_starts)
        self._authorization = Authorization(served.authorize, threads)
        self._starter = Starter(
            client=client,
            namespace=self.namespace,
            settings=settings,
            holds=self.holds,
            threads=threads,
            clock=clock,
            authorization=self._authorization,
            is_eager=is_eager,
        )
        self._canceler = Canceler(client=client, namespace=self.namespace)

    async def start(self, request: web.Request) -> web.Response:
        """Start an operation, or answer a repeated start with the operation's state."""
        caller, message = self._received(request, MessageKind.START)
        with caller.in_flight.place(), span("bridge.start", request.headers, caller.peer.trace):
            request[FACTS].update(trace_fields())
            return await self._start(request, caller, message)

    async def _start(self, request: web.Request, caller: Caller, message: IncomingMessage) -> web.Response:
        facts, names = request[FACTS], request.match_info
        facts["bridge.request_id"] = message.headers.get(REQUEST_ID, "")[:255]
        try:
            caller.starts.take()
        except UnavailableError:
            await asyncio.sleep(REFUSAL_DELAY_S)
            raise
        await self._refuse_other_handlers(message.headers.get(OPERATION_TOKEN))
        target = self._authorized(caller, request)
        if target is None and OPERATION_TOKEN in message.headers:
            # Only a workflow has a token. A deployment has replaced the workflow since.
            refusal = (
                "the operation was started as a workflow and is not run again: the workflow's callback ends the call"
            )
            raise WrongHandlerError(refusal)
        start_request = decode_start(
            names["service"],
            names["operation"],
            callback_url=caller.callback_in(request),
            headers=message.headers,
            links=message.links,
        )
        facts["bridge.attempt"] = start_request.attempt
        payload = decode_payload(message.headers, await message.body())
        if payload.ByteSize() > MAX_PAYLOAD_BYTES:
            refusal = f"the input of {payload.ByteSize()} bytes is over the limit of {MAX_PAYLOAD_BYTES}"
            raise bad_request(refusal)
        if target is None:
            authorize = partial(self._authorization.require, caller.name, f"{names['service']}/{names['operation']}")
            result: StartAnswer = await self._operations.start(caller.name, start_request, payload, authorize)
        else:
            result = await self._starter.start(
                *(caller.name, target, start_request, payload), is_gone=lambda: request.transport is None
            )
        if result.target is not None:
            facts |= {"bridge.target": result.target.workflow_id, "bridge.run_id": result.target.run_id}
        facts["bridge.state"] = "running" if isinstance(result, Running) else result.outcome.state.value
        return answer(*encode_answer(result))

    async def cancel(self, request: web.Request) -> web.Response:
        """Request the end of an operation."""
        names = request.match_info
        caller, message = self._received(request, MessageKind.CANCEL)
        target = self._authorized(caller, request)
        token = decode_cancel(message.headers, in_path=names.get("token"), in_query=request.query.getall("token", []))
        with caller.in_flight.place():
            await message.body()
            if (named := OperationToken.decode(token)) is not None:
                request[FACTS] |= {"bridge.request_id": named.request_id, "bridge.target": named.workflow_id}
            await self._canceler.cancel(caller.name, target, token)
        return web.Response(status=202)

    async def echo(self, request: web.Request) -> web.Response:
        """Let a caller check its key, its clock, our URL and its callback URL. Starts nothing."""
        caller, message = self._received(request, MessageKind.ECHO)
        with caller.in_flight.place():
            await message.body()
            echo = Echo(name=self._name, time=self._clock())
            if caller.verifier is not None:
                callback = request.query.get("callback")
                problem = None if callback is None else await self._callbacks.problem_with(caller.name, callback)
                keys = self.keys.fingerprints(f"callers.{caller.name}")
                echo = echo.model_copy(update={"callback_problem": problem, "keys": keys})
        return answer(*encode_echo(echo))

    def _received(self, request: web.Request, kind: MessageKind) -> tuple[Caller, IncomingMessage]:
        request[FACTS]["bridge.message"] = kind.name.lower()
        caller = known_peer(self._callers, request.match_info["caller"], kind, request)
        message = caller.receive(kind, request)
        request[FACTS]["bridge.caller"] = caller.name
        return caller, message

    def _authorized(self, caller: Caller, request: web.Request) -> Target | None:
        """Return the operation's target; None if one of the service handlers has the operation.

        Raises:
            nexusrpc.HandlerError: NOT_FOUND, no such operation; UNAUTHORIZED, this caller may not start it.
        """
        service, operation = request.match_info["service"], request.match_info["operation"]
        if (service, operation) not in self._offered:
            is_known = any(service == each for each, _ in self._offered)
            message = "no such operation" if is_known else "no such service"
            raise not_found(message)
        request[FACTS]["bridge.operation"] = f"{service}/{operation}"
        require_in_settings(caller.peer, service, operation)
        return self._targets.get(service, operation)

    async def _refuse_other_handlers(self, operation_token: str | None) -> None:
        """Refuse the renewal of an operation that was started in another namespace. Here it would start a second time.

        Raises:
            WrongHandlerError: The token does not name our namespace.
            nexusrpc.HandlerError: UNAVAILABLE, Temporal did not describe our namespace.
        """
        if operation_token is None:
            return
        token = OperationToken.decode(operation_token)
        try:
            is_own = token is not None and token.namespace_id == await self.namespace.id()
        except RPCError as error:
            raise handler_error_from_rpc(error) from None
        if not is_own:
            message = (
                "the operation runs in another namespace than this handler's, and was not started again: "
                "point the endpoint's url back to the handler that started it. The callback of that handler still ends "
                "the call"
            )
            raise WrongHandlerError(message)


_SERVICE = web.AppKey("service", _Service)
