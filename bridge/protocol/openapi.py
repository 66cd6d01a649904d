"""Both services described as OpenAPI 3.1, the same for every deployment: served at `/openapi.json`.

Schemas come from the models that read and write the messages, header names from the wire's own constants. What OpenAPI
cannot say (what a signature covers, what to repeat) is in docs/protocol.md.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from nexusrpc import HandlerErrorType
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bridge.protocol import headers as wire
from bridge.protocol import payload as payloads
from bridge.protocol.echo import Echo
from bridge.protocol.failure import HANDLER_ERROR_TYPE, WireFailure
from bridge.protocol.start import OperationInfo
from bridge.security import signatures
from bridge.security.egress import MAX_CALLBACK_URL

Json = dict[str, Any]

_SCHEMA = "#/components/schemas/{model}"
_TEXT: Json = {"type": "string"}
_INSTANT: Json = {"type": "string", "format": "date-time"}
_DURATION: Json = {"type": "string", "examples": ["10000ms", "90s", "1h30m"]}
_ID: Json = {"type": "string", "minLength": 1, "maxLength": 255}
_TOKEN: Json = {"type": "string", "minLength": 1, "maxLength": wire.MAX_OPERATION_TOKEN}
_HEADERS: Mapping[str, tuple[str, Json]] = {
    wire.REQUEST_ID: ("Names the call: the same on every repeat.", _ID),
    wire.REQUEST_TIMEOUT: ("How long the sender waits for this answer.", _DURATION),
    wire.OPERATION_TIMEOUT: ("How long the caller is still willing to wait for the operation.", _DURATION),
    wire.SCHEDULED_TIME: ("When the caller scheduled the operation.", _INSTANT),
    wire.ATTEMPT: ("Above 1 the start is a renewal. Information only.", {"type": "integer", "minimum": 1}),
    wire.PREFER: ("`wait=N`: hold the start open for up to N seconds.", _TEXT),
    wire.LINK: ('`<URL>; type="TYPE"`, comma-separated.', _TEXT),
    wire.OPERATION_TOKEN: ("The handler's name for the operation.", _TOKEN),
    wire.OPERATION_STATE: ("How it stands.", {"type": "string", "enum": [each.value for each in wire.OperationState]}),
    wire.OPERATION_START_TIME: ("When the operation was started: an HTTP date.", _TEXT),
    wire.OPERATION_CLOSE_TIME: ("When the operation ended.", _INSTANT),
    wire.REQUEST_RETRYABLE: ("Whether repeating may help.", {"type": "string", "enum": ["true", "false"]}),
    wire.RETRY_AFTER: ("Seconds to wait before repeating the request.", {"type": "integer", "minimum": 1}),
    signatures.REPR_DIGEST: ("RFC 9530: SHA-256 of the body, of an empty one too.", _TEXT),
    signatures.SIGNATURE_INPUT: ("RFC 9421.", _TEXT),
    signatures.SIGNATURE: ("RFC 9421.", _TEXT),
}
_PROOFS = (signatures.REPR_DIGEST, signatures.SIGNATURE_INPUT)
_ANSWER_PROOFS = (*_PROOFS, signatures.SIGNATURE)
_SECURITY: Json = {
    "signature": {"type": "apiKey", "in": "header", "name": signatures.SIGNATURE, "description": "RFC 9421."},
    "bearer": {"type": "http", "scheme": "bearer"},
    "callbackToken": {"type": "apiKey", "in": "query", "name": "sig"},
}
_ANY: Json = {name: {} for name in (payloads.JSON, payloads.PROTOBUF, payloads.OCTETS, payloads.TEMPORAL_PAYLOAD)}


def describe_handler_service() -> Json:
    """The handler service: starts and cancels."""
    path, always = "/c/{caller}/{service}/{operation}", (*_PROOFS, wire.REQUEST_TIMEOUT)
    known = (wire.OPERATION_TIMEOUT, wire.SCHEDULED_TIME, wire.ATTEMPT, wire.PREFER, wire.LINK, *always)
    outcome = wire.OPERATION_STATE, wire.LINK
    callback = {**_TEXT, "format": "uri", "maxLength": MAX_CALLBACK_URL}
    start = _operation(
        "startOperation",
        "Start an operation, or ask again how it stands.",
        _header(wire.REQUEST_ID, required=True),
        _parameter("callback", "query", callback, "Where to POST the outcome, byte for byte."),
        *map(_header, known),
        body=_ANY,
        answers={
            "200": _answer("It has ended well; the body is its result.", _ANY, *outcome),
            "201": _answer("It goes on.", _json("OperationInfo"), wire.LINK),
            "424": _answer("It has failed or was canceled.", _json("WireFailure"), *outcome),
        },
    )
    taken = {"202": _answer("It was asked to end; it may still end otherwise.", {})}
    token = _header(wire.OPERATION_TOKEN), _parameter("token", "query", _TOKEN, "If the header is not there.")
    cancel = _operation("cancelOperation", "Ask an operation to end.", *token, *map(_header, always), answers=taken)
    old = _operation("cancelOperationByPath", "As Temporal 1.29 asks.", *map(_header, always), answers=taken)
    asked = _parameter("callback", "query", callback, "Whether a start may name a callback URL like this one.")
    echo = _operation("echo", "Say that we are here. Starts nothing.", asked, *map(_header, _PROOFS), answers=_ECHOED)
    posts = {"/c/{caller}": echo, path: start, f"{path}/cancel": cancel, f"{path}/{{token}}/cancel": old}
    return _document("Callback bridge: handler service", posts, [{"signature": []}, {"bearer": []}, {}])


def describe_receiver() -> Json:
    """The receiver: completions."""
    known = wire.OPERATION_TOKEN, wire.OPERATION_START_TIME, wire.OPERATION_CLOSE_TIME, wire.LINK
    complete = _operation(
        "completeOperation",
        "Tell an outcome. Or, with state running and no body, ask whether anybody waits for one.",
        _header(wire.OPERATION_STATE, required=True),
        *map(_header, (*known, *_PROOFS)),
        body=_ANY,
        answers={"200": _answer("Taken, now or before. Or: somebody waits.", {})},
    )
    asked = _parameter("handler", "query", _TEXT, "Who asks.", required=True)
    echo = _operation(
        "echo", "Say that we are here. Completes nothing.", asked, *map(_header, _PROOFS), answers=_ECHOED
    )
    posts = {"/callbacks": echo, "/callbacks/{callback_id}": complete}
    return _document("Callback bridge: receiver", posts, [{"callbackToken": [], "signature": []}])


def _document(title: str, posts: Mapping[str, Json], security: list[Json]) -> Json:
    models: list[tuple[type[BaseModel], Literal["validation"]]]
    models = [(WireFailure, "validation"), (OperationInfo, "validation"), (Echo, "validation")]
    _, found = models_json_schema(models, ref_template=_SCHEMA)
    kinds = [each.value for each in HandlerErrorType if each is not HandlerErrorType.UNKNOWN]
    details = {"type": {"enum": kinds}, "retryableOverride": {"type": "boolean"}}
    error = {
        "metadata": {"required": ["type"], "properties": {"type": {"const": HANDLER_ERROR_TYPE}}},
        "details": {"required": ["type"], "properties": details},
    }
    schemas = found["$defs"]
    schemas["HandlerError"] = {"$ref": _SCHEMA.format(model="WireFailure"), "required": [*error], "properties": error}
    paths: Json = {}
    for path, post in posts.items():
        names = [_parameter(name, "path", _TEXT) for name in re.findall(r"{(\w+)}", path)]
        paths[path] = {"parameters": names, "post": {**post, "security": security}}
    ok, not_ok = _answer("Yes.", {"text/plain": {}}), _answer("No.", {"text/plain": {}})
    this = {"200": _answer("This document.", {payloads.JSON: {}})}
    for path, answers in (("/livez", {"200": ok}), ("/readyz", {"200": ok, "503": not_ok}), ("/openapi.json", this)):
        paths[path] = {"get": {"security": [], "responses": answers}}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "1", "description": "Nexus RPC over HTTP. The rules: docs/protocol.md."},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": _SECURITY},
    }


def _operation(name: str, summary: str, *parameters: Json, answers: Json, body: Json | None = None) -> Json:
    error = _answer("The request failed.", _json("HandlerError"), wire.REQUEST_RETRYABLE, wire.RETRY_AFTER)
    told = {"operationId": name, "summary": summary, "parameters": list(parameters)}
    content = {} if body is None else {"requestBody": {"content": body}}
    return {**told, **content, "responses": {**answers, "4XX": error, "5XX": error}}


def _answer(description: str, content: Json, *headers: str) -> Json:
    known = {name: _HEADERS[name] for name in (*headers, *_ANSWER_PROOFS)}
    told = {name: {"description": text, "schema": schema} for name, (text, schema) in known.items()}
    return {"description": description, "headers": told, "content": content}


def _header(name: str, *, required: bool = False) -> Json:
    description, schema = _HEADERS[name]
    return _parameter(name, "header", schema, description, required=required)


def _parameter(name: str, where: str, schema: Json, description: str = "", *, required: bool = False) -> Json:
    told = {"name": name, "in": where, "required": required or where == "path", "schema": schema}
    return {**told, "description": description} if description else told


def _json(model: str) -> Json:
    return {payloads.JSON: {"schema": {"$ref": _SCHEMA.format(model=model)}}}


_ECHOED: Json = {"200": _answer("We are.", _json("Echo"))}
