"""The OpenAPI 3.1 descriptions of both services, served at `/openapi.json` and equal in every deployment.

Schemas come from the models that read and write the messages. Header names come from the constants of the protocol.
docs/protocol.md has the rules that OpenAPI cannot express: what a signature covers, and what to repeat.
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
    wire.REQUEST_ID: ("Id of the call, the same on every repeat.", _ID),
    wire.REQUEST_TIMEOUT: ("How long the sender waits for this answer.", _DURATION),
    wire.OPERATION_TIMEOUT: ("How long the caller is still willing to wait for the operation.", _DURATION),
    wire.SCHEDULED_TIME: ("When the caller scheduled the operation.", _INSTANT),
    wire.ATTEMPT: ("Above 1 the start is a renewal. Information only.", {"type": "integer", "minimum": 1}),
    wire.PREFER: ("`wait=N`: hold the start open for up to N seconds.", _TEXT),
    wire.LINK: ('`<URL>; type="TYPE"`, comma-separated.', _TEXT),
    wire.OPERATION_TOKEN: ("The handler's name for the operation.", _TOKEN),
    wire.OPERATION_STATE: ("State.", {"type": "string", "enum": [each.value for each in wire.OperationState]}),
    wire.OPERATION_START_TIME: ("When the operation was started: an HTTP date.", _TEXT),
    wire.OPERATION_CLOSE_TIME: ("When the operation ended.", _INSTANT),
    wire.REQUEST_RETRYABLE: ("Whether repeating may help.", {"type": "string", "enum": ["true", "false"]}),
    wire.RETRY_AFTER: ("Seconds to wait before repeating the request.", {"type": "integer", "minimum": 1}),
    signatures.REPR_DIGEST: ("RFC 9530: SHA-256 of the body, also of an empty body.", _TEXT),
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
    """The handler service's OpenAPI document: starts and cancels."""
    path, always = "/c/{caller}/{service}/{operation}", (*_PROOFS, wire.REQUEST_TIMEOUT)
    known = (wire.OPERATION_TIMEOUT, wire.SCHEDULED_TIME, wire.ATTEMPT, wire.PREFER, wire.LINK, *always)
    outcome = wire.OPERATION_STATE, wire.LINK
    callback = {**_TEXT, "format": "uri", "maxLength": MAX_CALLBACK_URL}
    start = _operation(
        "startOperation",
        "Start an operation, or ask again for its state.",
        _header(wire.REQUEST_ID, required=True),
        _parameter("callback", "query", callback, "Where to POST the outcome, byte for byte."),
        *map(_header, known),
        body=_ANY,
        answers={
            "200": _answer("The operation has succeeded. The body is its result.", _ANY, *outcome),
            "201": _answer("The operation is running.", _json("OperationInfo"), wire.LINK),
            "424": _answer("The operation has failed or was canceled.", _json("WireFailure"), *outcome),
        },
    )
    accepted = {"202": _answer("The cancel was requested. The operation may still succeed or fail.", {})}
    token = _header(wire.OPERATION_TOKEN), _parameter("token", "query", _TOKEN, "If the header is missing.")
    cancel = _operation("cancelOperation", "Cancel an operation.", *token, *map(_header, always), answers=accepted)
    old = _operation("cancelOperationByPath", "As Temporal 1.29 sends it.", *map(_header, always), answers=accepted)
    asked = _parameter("callback", "query", callback, "Whether a start may name a callback URL like this one.")
    echo = _operation("echo", "Say that we are here. Starts nothing.", asked, *map(_header, _PROOFS), answers=_ECHOED)
    posts = {"/c/{caller}": echo, path: start, f"{path}/cancel": cancel, f"{path}/{{token}}/cancel": old}
    return _document("Callback bridge: handler service", posts, [{"signature": []}, {"bearer": []}, {}])


def describe_receiver() -> Json:
    """The receiver's OpenAPI document: completions."""
    known = wire.OPERATION_TOKEN, wire.OPERATION_START_TIME, wire.OPERATION_CLOSE_TIME, wire.LINK
    complete = _operation(
        "completeOperation",
        "Deliver an outcome. Or, with state running and no body, ask whether the caller still waits.",
        _header(wire.OPERATION_STATE, required=True),
        *map(_header, (*known, *_PROOFS)),
        body=_ANY,
        answers={"200": _answer("The outcome was accepted, now or before. Or: the caller waits.", {})},
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
    content = {} if body is None else {"requestBody": {"content": body}}
    responses = {**answers, "4XX": error, "5XX": error}
    return {"operationId": name, "summary": summary, "parameters": list(parameters), **content, "responses": responses}


def _answer(description: str, content: Json, *headers: str) -> Json:
    known = {name: _HEADERS[name] for name in (*headers, *_ANSWER_PROOFS)}
    described = {name: {"description": text, "schema": schema} for name, (text, schema) in known.items()}
    return {"description": description, "headers": described, "content": content}


def _header(name: str, *, required: bool = False) -> Json:
    description, schema = _HEADERS[name]
    return _parameter(name, "header", schema, description, required=required)


def _parameter(name: str, where: str, schema: Json, description: str = "", *, required: bool = False) -> Json:
    parameter = {"name": name, "in": where, "required": required or where == "path", "schema": schema}
    return {**parameter, "description": description} if description else parameter


def _json(model: str) -> Json:
    return {payloads.JSON: {"schema": {"$ref": _SCHEMA.format(model=model)}}}


_ECHOED: Json = {"200": _answer("We are.", _json("Echo"))}
