"""The receiver: an HTTP service that turns completions into completed activities.

It trusts nothing before both proofs hold: the callback token, which says which wait may be ended and by whom, then the
message signature of that handler, over the headers before the body is read, over the body before it is parsed. Only a
token of our own minting can dispense with the signature: for completions that Temporal's server sends. It keeps no
state, so any number of copies may run.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import assert_never

from aiohttp import web
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import UnavailableError, UntrustedError, WaitOverError, bad_request
from bridge.protocol.completion import decode_completion
from bridge.protocol.echo import Echo, encode_echo
from bridge.protocol.headers import CALLBACK_TOKEN, LINK, OPERATION_STATE, OperationState, encode_handler_error
from bridge.protocol.openapi import describe_receiver
from bridge.runtime.http_server import FACTS, PROOF, Readiness, answer, create_app, read_body, refuse_unusable_headers
from bridge.security.callback_tokens import MAX_TOKEN_CHARACTERS, CallbackClaims, CallbackTokens
from bridge.security.signatures import SIGNATURE_INPUT, MessageKind, MessageVerifier, Verified
from caller.callback_urls import decode_task_token
from caller.completer import Completer, CompletionAnswer, Wait

GONE = 410


def create_receiver(
    *,
    completer: Completer,
    tokens: CallbackTokens,
    verifiers: Mapping[str, MessageVerifier | None],
    readiness: Readiness,
    clock: Callable[[], datetime],
    name: str,
) -> web.Application:
    """The receiver's application, of the caller *name*.

    *verifiers* are by handler name, None for one whose Temporal server completes.
    """

    async def complete(request: web.Request) -> web.Response:
        facts = request[FACTS]
        text = [*request.query.getall("sig", []), *request.headers.getall(CALLBACK_TOKEN, [])]
        if len(text) != 1 or len(text[0]) > MAX_TOKEN_CHARACTERS:
            reason = "callback token missing, repeated or too long"
            raise UntrustedError(reason)
        claims = tokens.verify(text[0], callback_id=request.match_info["callback_id"], now=clock())
        facts |= {"bridge.callback_id": claims.id, "bridge.request_id": claims.rid, "bridge.peer": claims.peer}
        verified = _verify(verifiers, claims, request)
        refuse_unusable_headers(request, verified)
        headers: Mapping[str, str] = request.headers if verified is None else verified.headers
        links = request.headers.getall(LINK, []) if verified is None else _lines(headers)
        body = await read_body(request, verified)
        wait = Wait(
            workflow_id=claims.wf,
            run_id=claims.run,
            request_id=claims.rid,
            task_token=decode_task_token(claims.tt),
        )
        if headers.get(OPERATION_STATE) == OperationState.RUNNING.value:
            # Not a completion but a question of ours: does anybody still wait? It completes nothing.
            return _respond(await completer.is_waiting(wait))
        completion = decode_completion(headers, links, body)
        if completion.outcome.fitted() is not completion.outcome:
            message = "the outcome is too large to complete an activity with"
            raise bad_request(message)
        result = await completer.complete(wait, completion.outcome, completion.target, is_late=claims.is_over(clock()))
        facts |= {"bridge.state": completion.outcome.state.value, "bridge.answer": result.value}
        return _respond(result)

    async def echo(request: web.Request) -> web.Response:
        verifier = verifiers.get(request.query.get("handler", ""))
        if verifier is None:
            reason = "unknown handler"
            raise UntrustedError(reason)
        verified = _signed(verifier, MessageKind.ECHO, request)
        await read_body(request, verified)
        return answer(*encode_echo(Echo(name=name, time=clock())))

    app = create_app(readiness, description=describe_receiver(), has_method_errors=True)
    app.router.add_post("/callbacks", echo)
    app.router.add_post("/callbacks/{callback_id}", complete)
    return app


def _verify(
    verifiers: Mapping[str, MessageVerifier | None], claims: CallbackClaims, request: web.Request
) -> Verified | None:
    """What the handler vouches for; None where the token says that nobody signs.

    Raises:
        UntrustedError: The signature does not hold, or the settings and the token disagree about who has to sign.
    """
    verifier = verifiers.get(claims.peer)
    if claims.auth == "server":
        if claims.peer not in verifiers or verifier is not None or SIGNATURE_INPUT in request.headers:
            reason = "a signature where the token expects none"
            raise UntrustedError(reason)
        return None
    if verifier is None:
        reason = "unknown handler"
        raise UntrustedError(reason)
    return _signed(verifier, MessageKind.COMPLETION, request)


def _signed(verifier: MessageVerifier, kind: MessageKind, request: web.Request) -> Verified:
    verified = verifier.verify(kind, method=request.method, raw_path=request.raw_path, headers=request.headers)
    request[PROOF] = verified.proof
    return verified


def _lines(headers: Mapping[str, str]) -> list[str]:
    return [headers[LINK]] if LINK in headers else []


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
