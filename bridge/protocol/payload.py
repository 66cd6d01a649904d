"""Payloads as HTTP content, and back: the same table as Temporal's own serializer, byte for byte.

A payload of any encoding is forwarded undecoded. Pure functions. The headers passed in are not changed.
Source of the rules: Temporal server, `common/nexus/payload_serializer.go`.
"""

import re
from collections.abc import Iterator, Mapping

from google.protobuf.message import DecodeError, Message
from temporalio.api.common.v1 import Payload

from bridge.errors import RemoteProtocolError

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Most bytes in the body of any message."""
MAX_PAYLOAD_BYTES = 2 * 1024 * 1024 - 1024
"""Largest payload that is delivered, slightly below Temporal's limit for one blob (`limit.blobSize.error`, 2 MiB). The
server answers OK to a completion above its limit and then fails the activity."""

MAX_PAYLOADS = 1000
"""Most payloads in one outcome."""

CONTENT_TYPE = "Content-Type"
JSON = "application/json"
PROTOBUF = "application/x-protobuf"
OCTETS = "application/octet-stream"
TEMPORAL_PAYLOAD = "application/x-temporal-payload"

_UNKNOWN = b"unknown/nexus-content"
_PARAMETER = re.compile(r';\s*([A-Za-z0-9!#$%&\'*+.^_`|~-]+)=(?:"([^"\\]*)"|([^\s;",]+))\s*')


def holds_reference(message: Message) -> bool:
    """Whether *message* is, or holds, a payload that refers to the SDK's external storage instead of holding a value.

    Workers fetch what such a payload names. Therefore only a peer that shares the external storage may send one.
    """
    return any(
        each.external_payloads
        or each.metadata.get("encoding") == b"json/external-storage-reference"
        or each.metadata.get("messageType") == b"temporal.api.sdk.v1.ExternalStorageReference"
        or "__temporal_external_storage_reference" in each.metadata
        for each in payloads_in(message)
    )


def payloads_in(message: Message) -> Iterator[Payload]:
    """Yield every payload that *message* is or holds."""
    if isinstance(message, Payload):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if isinstance(value, Message) else value:
                yield from payloads_in(each)


def is_json(headers: Mapping[str, str]) -> bool:
    """Whether the media type is JSON, with any parameters."""
    return headers.get(CONTENT_TYPE, "").partition(";")[0].strip().lower() == JSON


def is_known(payload: Payload) -> bool:
    """Whether *payload* comes from a data converter, and not from content that the table does not describe."""
    return payload.metadata.get("encoding") != _UNKNOWN


def encode_payload(payload: Payload | None) -> tuple[dict[str, str], bytes]:
    """Return the content headers and body of *payload*. None means that there is no value."""
    if payload is None:
        return {}, b""
    metadata = dict(payload.metadata)
    encoding = metadata.pop("encoding", b"").decode("latin-1")
    message_type = metadata.get("messageType", b"").decode("latin-1")
    keys = set(metadata)
    if payload.external_payloads:
        # The table is older than external payloads. Only a serialized payload carries them.
        keys.add("external_payloads")
    match encoding:
        case "binary/null" if not keys and not payload.data:
            return {}, b""
        case "json/plain" if not keys:
            return {CONTENT_TYPE: JSON}, payload.data
        case "binary/plain" if not keys:
            return {CONTENT_TYPE: OCTETS}, payload.data
        case "json/protobuf" if keys == {"messageType"} and _is_quotable(message_type):
            return {CONTENT_TYPE: f'{JSON}; format=protobuf; message-type="{message_type}"'}, payload.data
        case "binary/protobuf" if keys == {"messageType"} and _is_quotable(message_type):
            return {CONTENT_TYPE: f'{PROTOBUF}; message-type="{message_type}"'}, payload.data
        case _:
            # Lossless for every other payload: encrypted, compressed, or with further metadata.
            return {CONTENT_TYPE: TEMPORAL_PAYLOAD}, payload.SerializeToString(deterministic=True)


def decode_payload(headers: Mapping[str, str], body: bytes) -> Payload:
    """Read content back into the payload it was made from.

    *headers* may hold all headers of the message; only `Content-…` headers are read.

    Raises:
        RemoteProtocolError: The media type is that of a Temporal payload, and the content is not.
    """
    content = {name.lower().removeprefix("content-"): value for name, value in headers.items() if _describes(name)}
    if set(content) - {"type"}:
        return _unknown(content, body)
    if "type" not in content:
        return Payload(metadata={"encoding": b"binary/null"}) if not body else _unknown(content, body)
    media_type, parameters = _parse_media_type(content["type"])
    match media_type, sorted(parameters or {}):
        case "application/x-temporal-payload", _:
            try:
                return Payload.FromString(body)
            except DecodeError:
                message = "content is not a serialized temporal payload"
                raise RemoteProtocolError(message) from None
        case _, _ if parameters is None:
            return _unknown(content, body)
        case "application/json", []:
            return Payload(metadata={"encoding": b"json/plain"}, data=body)
        case "application/json", ["format", "message-type"] if (
            parameters["format"] == "protobuf" and parameters["message-type"]
        ):
            return _protobuf(b"json/protobuf", parameters["message-type"], body)
        case "application/x-protobuf", ["message-type"] if parameters["message-type"]:
            return _protobuf(b"binary/protobuf", parameters["message-type"], body)
        case "application/octet-stream", []:
            return Payload(metadata={"encoding": b"binary/plain"}, data=body)
        case _:
            return _unknown(content, body)


def _describes(name: str) -> bool:
    lower = name.lower()
    return lower.startswith("content-") and lower not in {"content-encoding", "content-length"}


def _is_quotable(message_type: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_.]+", message_type) is not None


def _parse_media_type(text: str) -> tuple[str, dict[str, str] | None]:
    """Media type in lower case, and its parameters, or None if they are unreadable."""
    media_type, _, _ = text.partition(";")
    rest, parameters = text[len(media_type) :], dict[str, str]()
    # Go's reader ignores one trailing semicolon and refuses a repeated parameter.
    while rest.strip() not in {"", ";"}:
        found = _PARAMETER.match(rest)
        if not found or found[1].lower() in parameters:
            return media_type.strip().lower(), None
        parameters[found[1].lower()] = found[2] if found[2] is not None else found[3]
        rest = rest[found.end() :]
    return media_type.strip().lower(), parameters


def _protobuf(encoding: bytes, message_type: str, body: bytes) -> Payload:
    return Payload(metadata={"encoding": encoding, "messageType": _bytes(message_type)}, data=body)


def _unknown(content: Mapping[str, str], body: bytes) -> Payload:
    metadata = {name: _bytes(value) for name, value in content.items()}
    return Payload(metadata={**metadata, "encoding": _UNKNOWN}, data=body)


def _bytes(header: str) -> bytes:
    # The bytes as received: aiohttp decodes a header as UTF-8, and other bytes as lone surrogates.
    return header.encode("utf-8", "surrogateescape")
