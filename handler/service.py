"""The handler service: an aiohttp application that starts targets for the callers in its settings.

It keeps no state, therefore any number of copies may run. `{caller}` in a route only selects the keys that must verify.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Self

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import Client

from bridge.errors import DestinationRefusedError, UntrustedError, bad_request, not_found
from bridge.protocol.cancel import decode_cancel
from bridge.protocol.echo import Echo, encode_echo
from bridge.protocol.headers import LINK, REQUEST_ID
from bridge.protocol.payload import MAX_PAYLOAD_BYTES, decode_payload
from bridge.protocol.start import Running, StartAnswer, decode_start, encode_answer
from bridge.runtime import http_server
from bridge.runtime.http_client import HttpClient
from bridge.runtime.http_server import FACTS, PROOF, answer, path_below_mount, read_body, refuse_unusable_headers
from bridge.runtime.settings import Name, SettingsError
from bridge.runtime.temporal import Namespace, connect
from bridge.security.callback_tokens import OperationTokens
from bridge.security.egress import allowed_destination
from bridge.security.keys import KeySet, decode_key
from bridge.security.signatures import MessageKind, MessageVerifier, Verified
from bridge.workflow.targets import Target, Targets
from handler.delivery.callback_client import USER_AGENT, CallbackClient
from handler.settings import CallerPeer, HandlerSettings
from handler.start.canceler import Canceler
from handler.start.held_starts import HeldStarts
from handler.start.starter import Starter
from handler.start.sync_operations import SyncOperations, service_handlers_in
from handler.start.threads import BoundedThreads
from handler.sweep.activity import start_sweep


@dataclass(frozen=True, kw_only=True)
class _Caller:
    name: str
    """Key of the caller in the settings."""
    peer: CallerPeer
    """Settings of the caller."""
    verifier: MessageVerifier | None
    """None if this caller does not sign."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a team's module offers to callers."""

    targets: Targets
    """The decorated workflows."""
    services: Sequence[Any]
    """Instances of classes decorated with `nexusrpc.handler.service_handler`."""

    @classmethod
    def by(cls, module: ModuleType) -> Self:
        """Collect the workflows and service handlers that *module* defines or imports.

        Raises:
            bridge.runtime.settings.SettingsError: The module has neither, or two workflows claim one operation.
        """
        try:
            found = cls(targets=Targets.in_module(module), services=service_handlers_in(module))
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
        module: The service serves its decorated workflows and service handlers.
        client: Starts the targets.
        is_eager: Whether a worker for the task queue runs in this process and uses the same client.
        executor: Runs the team's functions that are not `async`; it is not closed. By default 32 threads of our own.
        clock: Returns the time.

    Raises:
        bridge.runtime.settings.SettingsError: The module has neither decorated workflows nor service handlers.
    """
    served = Served.by(module)

    async def running(app: web.Application) -> AsyncIterator[None]:
        connected = client if client is not None else await connect(settings.data_converter)
        threads = executor or BoundedThreads()
        http = HttpClient(user_agent=USER_AGENT)
        app[_SERVICE] = _Service(
            settings, served, connected, http=http, is_eager=is_eager, executor=threads, clock=clock
        )
        try:
            if settings.sweep:
                try:
                    await start_sweep(connected, targets=served.targets, settings=settings)
                except ValueError as error:
                    raise SettingsError(str(error)) from None
            yield
        finally:
            await http.aclose()
            if executor is None:
                # Do not wait for functions that still run: their callers are disconnected already.
                threads.shutdown(wait=False, cancel_futures=True)

    async def is_ready() -> bool:
        return await app[_SERVICE].namespace.is_reachable()

    async def start(request: web.Request) -> web.Response:
        return await request.app[_SERVICE].start(request)

    async def cancel(request: web.Request) -> web.Response:
        return await request.app[_SERVICE].cancel(request)

    async def echo(request: web.Request) -> web.Response:
        return await request.app[_SERVICE].echo(request)

    async def release_held_starts(app: web.Application) -> None:
        app[_SERVICE].holds.close()

    app = http_server.create_app(is_ready, has_method_errors=False)
    app.cleanup_ctx.append(running)
    app.on_shutdown.append(release_held_starts)
    # A name may contain braces, which aiohttp's default pattern of a segment refuses.
    path = "/c/{caller}/{service:[^/]+}/{operation:[^/]+}"
    app.router.add_post("/c/{caller}", echo)
    app.router.add_post(path, start)
    app.router.add_post(f"{path}/cancel", cancel)
    # Temporal's server 1.29 sends this form.
    app.router.add_post(f"{path}/{{token:[^/]+}}/cancel", cancel)
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
        executor: Executor,
        clock: Callable[[], datetime],
    ) -> None:
        """Raises SettingsError if an operation is claimed twice."""
        self._callbacks = CallbackClient(settings, http=http, clock=clock)
        self.namespace = Namespace(client, clock=clock)
        self._name = settings.name
        self._clock = clock
        self._callers = {name: _caller(name, peer, settings) for name, peer in settings.callers.items()}
        self._targets = served.targets
        try:
            self._operations = SyncOperations(
                served.services,
                targets=served.targets,
                data_converter=client.data_converter,
                executor=executor,
                clock=clock,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None
        tokens = OperationTokens(settings.operation_keys)
        self.holds = HeldStarts(client, limit=settings.service.held_starts)
        self._starter = Starter(
            client=client,
            tokens=tokens,
            hash_key=decode_key(settings.hash_key),
            task_queue=settings.task_queue,
            retention=self.namespace.retention,
            holds=self.holds,
            executor=executor,
            clock=clock,
            is_eager=is_eager,
            callers=settings.callers,
        )
        self._canceler = Canceler(client=client, tokens=tokens)

    async def start(self, request: web.Request) -> web.Response:
        facts, names = request[FACTS], request.match_info
        caller, verified = _authenticate(self._callers, MessageKind.START, request)
        refuse_unusable_headers(request, verified)
        headers: Mapping[str, str] = request.headers if verified is None else verified.headers
        facts |= {"bridge.caller": caller.name, "bridge.request_id": headers.get(REQUEST_ID, "")[:255]}
        target = _authorise(caller, self._targets, self._operations, names["service"], names["operation"])
        links = request.headers.getall(LINK, []) if verified is None else _lines(headers)
        start_request = decode_start(
            names["service"], names["operation"], callback_url=_callback(caller, request), headers=headers, links=links
        )
        facts["bridge.attempt"] = start_request.attempt
        payload = decode_payload(headers, await read_body(request, verified))
        if payload.ByteSize() > MAX_PAYLOAD_BYTES:
            message = f"the input of {payload.ByteSize()} bytes is over the limit of {MAX_PAYLOAD_BYTES}"
            raise bad_request(message)
        if target is None:
            result: StartAnswer = await self._operations.start(start_request, payload)
        else:
            result = await self._starter.start(
                *(caller.name, target, start_request, payload), is_gone=lambda: request.transport is None
            )
        if result.target is not None:
            facts |= {"bridge.target": result.target.workflow_id, "bridge.run_id": result.target.run_id}
        facts["bridge.state"] = "running" if isinstance(result, Running) else result.outcome.state.value
        return answer(*encode_answer(result))

    async def cancel(self, request: web.Request) -> web.Response:
        names = request.match_info
        caller, verified = _authenticate(self._callers, MessageKind.CANCEL, request)
        refuse_unusable_headers(request, verified)
        headers: Mapping[str, str] = request.headers if verified is None else verified.headers
        request[FACTS]["bridge.caller"] = caller.name
        _authorise(caller, self._targets, self._operations, names["service"], names["operation"])
        token = decode_cancel(headers, in_path=names.get("token"), in_query=request.query.getall("token", []))
        await read_body(request, verified)
        await self._canceler.cancel(caller.name, token)
        return web.Response(status=202)

    async def echo(self, request: web.Request) -> web.Response:
        """Let a caller check its key, its clock, our URL and its callback URL. Starts nothing."""
        caller, verified = _authenticate(self._callers, MessageKind.ECHO, request)
        request[FACTS]["bridge.caller"] = caller.name
        await read_body(request, verified)
        problem = None
        if verified is not None and (callback := request.query.get("callback")) is not None:
            problem = await self._callbacks.problem_with(caller.name, callback)
        return answer(*encode_echo(Echo(name=self._name, time=self._clock(), callback_problem=problem)))


_SERVICE = web.AppKey("service", _Service)


def _caller(name: Name, peer: CallerPeer, settings: HandlerSettings) -> _Caller:
    verifier = None
    if peer.start_keys is not None:
        verifier = MessageVerifier(peer.start_keys, public_base=settings.service.url)
    return _Caller(name=name, peer=peer, verifier=verifier)


def _authenticate(
    callers: Mapping[str, _Caller], kind: MessageKind, request: web.Request
) -> tuple[_Caller, Verified | None]:
    caller = callers.get(request.match_info["caller"])
    if caller is None:
        reason = "unknown caller"
        raise UntrustedError(reason)
    if caller.verifier is not None:
        verified = caller.verifier.verify(
            kind, method=request.method, raw_path=path_below_mount(request), headers=request.headers
        )
        request[PROOF] = verified.proof
        return caller, verified
    if caller.peer.bearer_keys is not None:
        _check_bearer(caller.peer.bearer_keys, request.headers.getall("Authorization", []))
    else:
        _check_network(caller.peer, request)
    return caller, None


def _check_bearer(key_set: KeySet, found: Sequence[str]) -> None:
    scheme, _, text = found[0].partition(" ") if len(found) == 1 else ("", "", "")
    given = hashlib.sha256(text.strip().encode(errors="surrogateescape")).digest()
    # Compare digests against every key, so that timing reveals nothing.
    known = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in key_set.keys.values()]
    if scheme.lower() != "bearer" or not sum(hmac.compare_digest(given, each) for each in known):
        reason = "bearer secret missing or unknown"
        raise UntrustedError(reason)


def _check_network(peer: CallerPeer, request: web.Request) -> None:
    address = request.remote
    # Behind a proxy, `remote` is the proxy's address and does not identify the sender.
    is_forwarded = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    if address is None or is_forwarded or not any(ipaddress.ip_address(address) in each for each in peer.networks):
        reason = "unsigned, and from outside the caller's networks"
        raise UntrustedError(reason)


def _authorise(
    caller: _Caller, targets: Targets, operations: SyncOperations, service: str, operation: str
) -> Target | None:
    """Return the operation's target; None if a service handler in *operations* has the operation.

    Raises:
        nexusrpc.HandlerError: NOT_FOUND, no such operation; UNAUTHORIZED, this caller may not start it.
    """
    target = targets.get(service, operation)
    if target is None and (service, operation) not in operations.names:
        is_known = targets.has_service(service) or any(service == each for each, _ in operations.names)
        message = "no such operation" if is_known else "no such service"
        raise not_found(message)
    if not caller.peer.may_start(service, operation):
        message = "this caller may not start this operation"
        raise HandlerError(message, type=HandlerErrorType.UNAUTHORIZED)
    return target


def _callback(caller: _Caller, request: web.Request) -> str | None:
    callbacks = request.query.getall("callback", [])
    if not callbacks:
        return None
    if len(callbacks) > 1:
        message = "more than one callback url"
        raise bad_request(message)
    try:
        allowed_destination(callbacks[0], caller.peer.callbacks)
    except DestinationRefusedError as error:
        # The deployment is at fault. A caller that signs retries, so that a change of the settings saves its calls.
        is_retryable = True if caller.verifier is not None else None
        raise HandlerError(str(error), type=HandlerErrorType.BAD_REQUEST, retryable_override=is_retryable) from None
    return callbacks[0]


def _lines(headers: Mapping[str, str]) -> list[str]:
    return [headers[LINK]] if LINK in headers else []
