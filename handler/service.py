"""The handler service: an HTTP service that starts targets for callers it knows.

It keeps no state, so any number of copies may run. `{caller}` in a route selects whose keys must verify, nothing else.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.common.v1 import Callback

from bridge.errors import DestinationRefusedError, UntrustedError, bad_request, not_found
from bridge.protocol.cancel import decode_cancel
from bridge.protocol.echo import Echo, encode_echo
from bridge.protocol.headers import CALLBACK_TOKEN, LINK, REQUEST_ID
from bridge.protocol.openapi import describe_handler_service
from bridge.protocol.payload import MAX_PAYLOAD_BYTES, decode_payload
from bridge.protocol.start import Running, StartAnswer, StartRequest, decode_start, encode_answer
from bridge.runtime.http_server import FACTS, PROOF, Readiness, answer, create_app, read_body, refuse_unusable_headers
from bridge.runtime.settings import Name
from bridge.security.egress import AllowList
from bridge.security.keys import KeyRing
from bridge.security.signatures import MessageKind, MessageVerifier, Verified
from bridge.workflow.targets import Target, Targets
from handler.settings import CallerPeer, HandlerSettings
from handler.start.canceler import Canceler
from handler.start.starter import Starter
from handler.start.sync_operations import SyncOperations

_PROOFS = (CALLBACK_TOKEN.lower(), "temporal-callback-token")


@dataclass(frozen=True, kw_only=True)
class _Caller:
    name: str
    peer: CallerPeer
    verifier: MessageVerifier | None
    """None: this caller does not sign."""
    allow_list: AllowList


def create_service(
    settings: HandlerSettings,
    *,
    targets: Targets,
    operations: SyncOperations,
    starter: Starter,
    canceler: Canceler,
    readiness: Readiness,
) -> web.Application:
    """The handler service's application, serving *targets* and *operations*."""
    callers = {name: _caller(name, peer, settings) for name, peer in settings.callers.items()}

    async def start(request: web.Request) -> web.Response:
        facts, names = request[FACTS], request.match_info
        caller, verified = _authenticate(callers, MessageKind.START, request)
        refuse_unusable_headers(request, verified)
        headers: Mapping[str, str] = request.headers if verified is None else verified.headers
        facts |= {"bridge.caller": caller.name, "bridge.request_id": headers.get(REQUEST_ID, "")[:255]}
        target = _authorise(caller, targets, operations, names["service"], names["operation"])
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
            result: StartAnswer = await operations.start(start_request, payload)
        else:
            callback = _server_callback(caller.peer, target, start_request)
            result = await starter.start(caller.name, target, start_request, payload, server_callback=callback)
        if result.target is not None:
            facts |= {"bridge.target": result.target.workflow_id, "bridge.run_id": result.target.run_id}
        facts["bridge.state"] = "running" if isinstance(result, Running) else result.outcome.state.value
        return answer(*encode_answer(result))

    async def cancel(request: web.Request) -> web.Response:
        names = request.match_info
        caller, verified = _authenticate(callers, MessageKind.CANCEL, request)
        refuse_unusable_headers(request, verified)
        headers: Mapping[str, str] = request.headers if verified is None else verified.headers
        request[FACTS]["bridge.caller"] = caller.name
        _authorise(caller, targets, operations, names["service"], names["operation"])
        token = decode_cancel(headers, in_path=names.get("token"), in_query=request.query.getall("token", []))
        await read_body(request, verified)
        await canceler.cancel(caller.name, token)
        return web.Response(status=202)

    async def echo(request: web.Request) -> web.Response:
        caller, verified = _authenticate(callers, MessageKind.ECHO, request)
        request[FACTS]["bridge.caller"] = caller.name
        await read_body(request, verified)
        callback: Literal["allowed", "not allowed"] | None = None
        if "callback" in request.query:
            callback = "allowed" if caller.allow_list.allows(request.query["callback"]) else "not allowed"
        return answer(*encode_echo(Echo(name=settings.name, time=datetime.now(UTC), callback=callback)))

    async def let_go(_: web.Application) -> None:
        starter.close()

    app = create_app(readiness, description=describe_handler_service(), has_method_errors=False)
    app.on_shutdown.append(let_go)
    # A name may hold braces, which aiohttp's own pattern of a segment refuses.
    path = "/c/{caller}/{service:[^/]+}/{operation:[^/]+}"
    app.router.add_post("/c/{caller}", echo)
    app.router.add_post(path, start)
    app.router.add_post(f"{path}/cancel", cancel)
    # The form of Temporal's server 1.29.
    app.router.add_post(f"{path}/{{token:[^/]+}}/cancel", cancel)
    return app


def _caller(name: Name, peer: CallerPeer, settings: HandlerSettings) -> _Caller:
    verifier = None
    if peer.start_keys is not None:
        verifier = MessageVerifier(peer.start_keys, public_base=settings.service.url)
    return _Caller(name=name, peer=peer, verifier=verifier, allow_list=peer.allow_list)


def _authenticate(
    callers: Mapping[str, _Caller], kind: MessageKind, request: web.Request
) -> tuple[_Caller, Verified | None]:
    caller = callers.get(request.match_info["caller"])
    if caller is None:
        reason = "unknown caller"
        raise UntrustedError(reason)
    if caller.verifier is not None:
        verified = caller.verifier.verify(
            kind, method=request.method, raw_path=request.raw_path, headers=request.headers
        )
        request[PROOF] = verified.proof
        return caller, verified
    if caller.peer.bearer_keys is not None:
        _check_bearer(caller.peer.bearer_keys, request.headers.getall("Authorization", []))
    else:
        _check_network(caller.peer, request)
    return caller, None


def _check_bearer(ring: KeyRing, found: Sequence[str]) -> None:
    scheme, _, text = found[0].partition(" ") if len(found) == 1 else ("", "", "")
    given = hashlib.sha256(text.strip().encode(errors="surrogateescape")).digest()
    # Every key is compared, and by digests: how long it takes tells nothing.
    known = [hashlib.sha256(key.get_secret_value().encode()).digest() for key in ring.keys.values()]
    if scheme.lower() != "bearer" or not sum(hmac.compare_digest(given, each) for each in known):
        reason = "bearer secret missing or unknown"
        raise UntrustedError(reason)


def _check_network(peer: CallerPeer, request: web.Request) -> None:
    address = request.remote
    # Behind a proxy, whose address this then is, it tells nothing of where the request comes from.
    is_forwarded = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
    if address is None or is_forwarded or not any(ipaddress.ip_address(address) in each for each in peer.networks):
        reason = "unsigned, and from outside the caller's networks"
        raise UntrustedError(reason)


def _server_callback(peer: CallerPeer, target: Target, request: StartRequest) -> Callback.Nexus | None:
    """The callback to be left to Temporal's server; None where the target's worker has to tell, or has to sign.

    Only one that carries its own proof can be left to a server, which does not sign. Nothing else is passed to it: its
    sender lets a callback's header replace the protocol's own, and be routed by one named `source`.
    """
    if target.delivery != "server" or request.callback_url is None or peer.completion_keys is not None:
        return None
    proofs = {name: request.callback_headers[name] for name in _PROOFS if name in request.callback_headers}
    return Callback.Nexus(url=request.callback_url, header=proofs) if proofs else None


def _authorise(
    caller: _Caller, targets: Targets, operations: SyncOperations, service: str, operation: str
) -> Target | None:
    """The operation's target; None if it is one of *operations*."""
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
        caller.allow_list.check(callbacks[0])
    except DestinationRefusedError as error:
        message = f"{error}: the handler's settings need its address in callers.{caller.name}.callbacks"
        # A fault of the deployment. Of a caller that signs it ends no call: it is asked again, and shown meanwhile.
        is_retryable = True if caller.verifier is not None else None
        raise HandlerError(message, type=HandlerErrorType.BAD_REQUEST, retryable_override=is_retryable) from None
    return callbacks[0]


def _lines(headers: Mapping[str, str]) -> list[str]:
    return [headers[LINK]] if LINK in headers else []
