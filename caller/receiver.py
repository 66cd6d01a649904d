"""The receiver: an HTTP service that turns completions into completed activities.

It trusts nothing before both proofs hold: the callback token, which says which wait may be ended and by whom, then the
message signature of that handler, over the headers before the body is read, over the body before it is parsed. It keeps
no state, so any number of copies may run.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import assert_never

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import UnavailableError, UntrustedError, WaitOverError, bad_request
from bridge.protocol.completion import decode_completion
from bridge.protocol.headers import LINK, OPERATION_STATE, OperationState, encode_handler_error
from bridge.protocol.openapi import describe_receiver
from bridge.protocol.payload import holds_reference
from bridge.runtime.http_server import FACTS, Readiness, answer, create_app, read_body, refuse_unusable_headers
from bridge.security.callback_tokens import MAX_TOKEN_CHARACTERS, CallbackClaims, CallbackTokens
from bridge.security.signatures import MessageKind, MessageVerifier, Verified
from caller.completer import Completer, CompletionAnswer, Wait

GONE = 410

_log = logging.getLogger(__name__)


def create_receiver(
    *,
    completer: Completer,
    tokens: CallbackTokens,
    verifiers: Mapping[str, MessageVerifier],
    shares_storage: Callable[[str], bool] = lambda _: False,
    readiness: Readiness,
    clock: Callable[[], datetime],
) -> web.Application:
    """The receiver's application; *verifiers* and *shares_storage* by the name of a handler."""

    async def complete(request: web.Request) -> web.Response:
        facts = request[FACTS]
        text = request.query.getall("sig", [])
        if len(text) != 1 or len(text[0]) > MAX_TOKEN_CHARACTERS:
            reason = "callback token missing, repeated or too long"
            raise UntrustedError(reason)
        claims = tokens.verify(text[0], callback_id=request.match_info["callback_id"], now=clock())
        facts |= {"bridge.callback_id": claims.id, "bridge.request_id": claims.rid, "bridge.peer": claims.peer}
        verified = _verify(verifiers, claims, request)
        refuse_unusable_headers(request)
        headers = verified.headers
        body = await read_body(request)
        verified.check_body(body)
        wait = Wait(workflow_id=claims.wf, run_id=claims.run, request_id=claims.rid)
        if headers.get(OPERATION_STATE) == OperationState.RUNNING.value:
            # Not a completion but a question of ours: does anybody still wait? It completes nothing.
            return _respond(await completer.is_waiting(wait))
        completion = decode_completion(headers, [headers[LINK]] if LINK in headers else [], body)
        content = completion.outcome.result or completion.outcome.failure
        if content is not None and holds_reference(content) and not shares_storage(claims.peer):
            _log.error("bridge.reference_not_taken", extra={"bridge.peer": claims.peer})
            message = "the outcome is a reference to external storage that is not shared: see shares_storage"
            raise UnavailableError(message)
        if completion.outcome.fitted() is not completion.outcome:
            message = "the outcome is too large to complete an activity with"
            raise bad_request(message)
        result = await completer.complete(wait, completion.outcome, completion.target)
        facts |= {"bridge.state": completion.outcome.state.value, "bridge.answer": result.value}
        return _respond(result)

    app = create_app(readiness, description=describe_receiver(), has_method_errors=True)
    app.router.add_post("/callbacks/{callback_id}", complete)
    return app


def _verify(verifiers: Mapping[str, MessageVerifier], claims: CallbackClaims, request: web.Request) -> Verified:
    """What the handler vouches for.

    Raises:
        UntrustedError: The signature does not hold, or the handler is not in the settings.
    """
    verifier = verifiers.get(claims.peer)
    if verifier is None:
        reason = "unknown handler"
        raise UntrustedError(reason)
    return verifier.verify(
        MessageKind.COMPLETION, method=request.method, raw_path=request.raw_path, headers=request.headers
    )


def _respond(result: CompletionAnswer) -> web.Response:
    """The receiver's answer sheet."""
    match result:
        case CompletionAnswer.COMPLETED | CompletionAnswer.REPEATED:
            return web.Response(status=200)
        case CompletionAnswer.CONFLICT:
            message = "another outcome is recorded for this callback"
            raise HandlerError(message, type=HandlerErrorType.CONFLICT)
        case CompletionAnswer.OVER:
            # The body's type makes servers from 1.31 stop, the status older ones.
            error = WaitOverError("nobody waits for this outcome any more: timed out, canceled or closed")
            _, headers, body = encode_handler_error(error)
            return answer(GONE, headers, body)
        case CompletionAnswer.UNKNOWN:
            message = "no such call"
            raise WaitOverError(message)
        case CompletionAnswer.AGAIN_LATER:
            message = "not now, try again"
            raise UnavailableError(message)
        case CompletionAnswer.INVALID:
            message = "this callback cannot be completed"
            raise bad_request(message)
        case _:
            assert_never(result)
