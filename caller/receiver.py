"""The receiver: an aiohttp application that turns completions into completed activities.

The receiver verifies two proofs before it trusts a request. The callback token names the wait and the handler that may
end it. The message signature proves that this handler wrote the request. It is verified over the headers before the
body is read, and over the body before it is parsed. The receiver keeps no state, so that any number of copies may run.
"""

from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.client import Client

from bridge.console import serving_console
from bridge.errors import UnavailableError, UntrustedError, WaitOverError, bad_request
from bridge.http import application
from bridge.http.application import add_route, answer
from bridge.http.in_flight import InFlight
from bridge.http.incoming_message import FACTS, IncomingMessage, known_peer
from bridge.http.peer_exchanges import PeerExchanges, record_exchanges
from bridge.protocol.completion import decode_completion
from bridge.protocol.echo import Echo, encode_echo
from bridge.protocol.handler_error import encode_handler_error
from bridge.protocol.headers import OPERATION_STATE, OperationState
from bridge.protocol.payload import holds_reference
from bridge.runtime.event_log import event_logger
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from bridge.runtime.tracing import span, trace_fields
from bridge.security.callback_tokens import MAX_TOKEN_CHARACTERS, CallbackClaims, CallbackTokens
from bridge.security.signatures import MessageKind, MessageVerifier
from bridge.temporal.connection import Namespace, connect
from bridge.temporal.lasting_client import lasting_client
from caller.completer import Completer
from caller.receipt import CompletionAnswer
from caller.reports.console import pages
from caller.settings import CallerSettings

GONE = 410

_log = event_logger(__name__)


def create_app(
    settings: CallerSettings, *, client: Client | None = None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> web.Application:
    """Return the receiver as an aiohttp application: run it alone, or mount it with `add_subapp`.

    If it is mounted, `receiver.url` of the settings includes the prefix. Without *client* the application connects to
    Temporal when it starts; `TEMPORAL_ADDRESS`, `TEMPORAL_NAMESPACE` and similar variables give the connection.

    Raises:
        bridge.runtime.settings.SettingsError: The settings have no receiver.
    """
    settings.required_receiver()
    peers = PeerExchanges(settings.handlers, clock=clock)

    async def running(app: web.Application) -> AsyncIterator[None]:
        connected = client or lasting_client(await connect(settings, serves_metrics=True))
        app[_RECEIVER] = _Receiver(settings, connected, clock)
        async with serving_console(settings.console, pages(connected, settings), peers, clock=clock):
            yield

    async def is_ready() -> bool:
        # A service without requests would not see that a changed file is bad.
        app[_RECEIVER].keys.look()
        return await app[_RECEIVER].namespace.is_reachable()

    app = application.create_app(is_ready)
    app.middlewares.insert(0, record_exchanges("receiver", lambda: app[_RECEIVER].metrics, peers))
    app.cleanup_ctx.append(running)
    add_route(app, "/callbacks", _RECEIVER, _Receiver.echo)
    add_route(app, "/callbacks/{callback_id}", _RECEIVER, _Receiver.complete)
    return app


class _Receiver:
    """The routes and what they need. Created once there is a client."""

    def __init__(self, settings: CallerSettings, client: Client, clock: Callable[[], datetime]) -> None:
        self.namespace = Namespace(client, clock=clock)
        self.metrics = Metrics.of(client)
        self._name = settings.name
        self._served = client.namespace
        self._completer = Completer(client=client)
        self.keys = keys = LiveKeys(settings, self.metrics)
        self._tokens = CallbackTokens(keys("callback_keys"), namespace=client.namespace)
        public_base = settings.required_receiver().url
        self._verifiers = {
            name: MessageVerifier(keys(f"handlers.{name}.completion_keys"), public_base=public_base)
            for name in settings.handlers
        }
        self._handlers = settings.handlers
        self._in_flight = {name: InFlight() for name in settings.handlers}
        self._clock = clock

    async def echo(self, request: web.Request) -> web.Response:
        """Let a handler check its key, its clock and our URL. Completes nothing."""
        request[FACTS]["bridge.message"] = "echo"
        handler = request.query.get("handler", "")
        verifier = known_peer(self._verifiers, handler, MessageKind.ECHO, request)
        message = IncomingMessage(request, MessageKind.ECHO, verifier)
        with self._in_flight[handler].place():
            await message.body()
        request[FACTS]["bridge.peer"] = handler
        asked = request.query.get("namespace", self._served)
        problem = None
        if asked != self._served:
            problem = f"the receiver serves namespace {self._served}, but the calls are in {asked}: move one of them"
        keys = self.keys.fingerprints(f"handlers.{handler}")
        return answer(*encode_echo(Echo(name=self._name, time=self._clock(), callback_problem=problem, keys=keys)))

    async def complete(self, request: web.Request) -> web.Response:
        """Verify one completion, and complete the activity that waits for it."""
        facts = request[FACTS]
        facts["bridge.message"] = "completion"
        text = request.query.getall("sig", [])
        if len(text) != 1 or len(text[0]) > MAX_TOKEN_CHARACTERS:
            reason = "callback token missing, repeated or too long"
            raise UntrustedError(reason)
        claims = self._tokens.verify(text[0], callback_id=request.match_info["callback_id"], now=self._clock())
        facts |= {"bridge.callback_id": claims.id, "bridge.request_id": claims.rid, "bridge.peer": claims.peer}
        verifier = known_peer(self._verifiers, claims.peer, MessageKind.COMPLETION, request)
        message = IncomingMessage(request, MessageKind.COMPLETION, verifier)
        with self._in_flight[claims.peer].place():
            return await self._complete(request, claims, message)

    async def _complete(self, request: web.Request, claims: CallbackClaims, message: IncomingMessage) -> web.Response:
        facts, body = request[FACTS], await message.body()
        if message.headers.get(OPERATION_STATE) == OperationState.RUNNING.value:
            # Not a completion but a question: does the call still wait? Answering it completes nothing.
            facts["bridge.message"] = "question"
            return _respond(await self._completer.is_waiting(claims))
        completion = decode_completion(message.headers, message.links, body)
        content = completion.outcome.result or completion.outcome.failure
        if content is not None and holds_reference(content) and not self._handlers[claims.peer].shares_storage:
            _log.error("bridge.reference_not_taken", extra={"bridge.peer": claims.peer})
            refusal = "the outcome is a reference to external storage that is not shared: see shares_storage"
            raise UnavailableError(refusal)
        if completion.outcome.within_size_limit() is not completion.outcome:
            refusal = "the outcome is too large to complete an activity with"
            raise bad_request(refusal)
        is_late = claims.is_over(self._clock())
        with span("bridge.complete", request.headers, self._handlers[claims.peer].trace):
            facts |= trace_fields()
            result = await self._completer.complete(claims, completion.outcome, completion.target, is_late=is_late)
        facts |= {"bridge.state": completion.outcome.state.value, "bridge.answer": result.value}
        if result is CompletionAnswer.COMPLETED and completion.close_time is not None:
            since_close = self._clock() - completion.close_time
            self.metrics.observe("bridge_callback_to_resume", since_close, handler=claims.peer)
        return _respond(result)


_RECEIVER = web.AppKey("receiver", _Receiver)


def _respond(result: CompletionAnswer) -> web.Response:
    """Turn the result of a completion into the HTTP answer."""
    if result in {CompletionAnswer.COMPLETED, CompletionAnswer.REPEATED}:
        return web.Response(status=200)
    error: HandlerError = {
        CompletionAnswer.CONFLICT: HandlerError(
            "another outcome is recorded for this callback", type=HandlerErrorType.CONFLICT
        ),
        CompletionAnswer.OVER: WaitOverError("no call waits for this outcome any more: timed out, canceled or closed"),
        CompletionAnswer.UNKNOWN: WaitOverError("no such call"),
        CompletionAnswer.AGAIN_LATER: UnavailableError("not now, try again"),
    }[result]
    status, headers, body = encode_handler_error(error)
    # Servers from 1.31 stop because of the body's type, older servers because of the status.
    return answer(GONE if result is CompletionAnswer.OVER else status, headers, body)
