"""Payloads as HTTP content: the server's table row by row, both ways, and everything that falls out of it."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload

from bridge.errors import RemoteProtocolError
from bridge.protocol.payload import decode_payload, encode_payload
from tests.support.helpers import multi

CONTENT_TYPE = "Content-Type"
MESSAGE = b"shop.v1.Order"


def payload(data: bytes = b"", **metadata: bytes) -> Payload:
    return Payload(metadata=metadata, data=data)


def unknown(data: bytes, **metadata: bytes) -> Payload:
    return Payload(metadata={"encoding": b"unknown/nexus-content", **metadata}, data=data)


WITH_A_NOTE = payload(b"{}", encoding=b"json/plain")
WITH_A_NOTE.external_payloads.add(size_bytes=3)

ROWS = [
    pytest.param(payload(encoding=b"binary/null"), None, b"", id="null"),
    pytest.param(payload(b'{"a":1}', encoding=b"json/plain"), "application/json", b'{"a":1}', id="json"),
    pytest.param(
        payload(b"{}", encoding=b"json/protobuf", messageType=MESSAGE),
        'application/json; format=protobuf; message-type="shop.v1.Order"',
        b"{}",
        id="protobuf as json",
    ),
    pytest.param(
        payload(b"\x08\x01", encoding=b"binary/protobuf", messageType=MESSAGE),
        'application/x-protobuf; message-type="shop.v1.Order"',
        b"\x08\x01",
        id="protobuf",
    ),
    pytest.param(payload(b"\x00\xff", encoding=b"binary/plain"), "application/octet-stream", b"\x00\xff", id="bytes"),
    pytest.param(payload(encoding=b"binary/plain"), "application/octet-stream", b"", id="no bytes are not null"),
]

ODD = [
    pytest.param(payload(), id="no metadata, no data"),
    pytest.param(payload(b"x"), id="no metadata"),
    pytest.param(payload(b"\x01", encoding=b"binary/encrypted", key=b"\xff"), id="encrypted"),
    pytest.param(payload(b"{}", encoding=b"json/plain", version=b"2"), id="json with a further key"),
    pytest.param(payload(b"{}", encoding=b"json/plain", messageType=MESSAGE), id="plain json with a message type"),
    pytest.param(payload(b"x", encoding=b"binary/plain", version=b"2"), id="bytes with a further key"),
    pytest.param(payload(encoding=b"binary/null", version=b"2"), id="null with a further key"),
    pytest.param(payload(b"x", encoding=b"binary/null"), id="null with data"),
    pytest.param(payload(b"{}", encoding=b"json/protobuf"), id="protobuf json without a message type"),
    pytest.param(payload(b"x", encoding=b"binary/protobuf", messageType=b""), id="empty message type"),
    pytest.param(payload(b"x", encoding=b"binary/protobuf", messageType=b'a"b'), id="message type with a quote"),
    pytest.param(payload(b"x", encoding=b"binary/protobuf", messageType=b"a\r\nX: y"), id="message type with lines"),
    pytest.param(payload(b"x", encoding=b"binary/protobuf", messageType=b"\xff"), id="message type outside ASCII"),
    pytest.param(payload(b"x", encoding=b"JSON/plain"), id="encoding in other case"),
    pytest.param(unknown(b"x", type=b"text/plain"), id="content unknown to Nexus"),
    pytest.param(WITH_A_NOTE, id="offloaded payload"),
]


@pytest.mark.parametrize(("one", "content_type", "body"), ROWS)
def test_a_payload_becomes_the_content_of_its_row(one: Payload, content_type: str | None, body: bytes) -> None:
    """Temporal's own serializer writes the same header and bytes."""
    assert encode_payload(one) == ({} if content_type is None else {CONTENT_TYPE: content_type}, body)


@pytest.mark.parametrize(("one", "content_type", "body"), ROWS)
def test_the_content_of_a_row_becomes_its_payload(one: Payload, content_type: str | None, body: bytes) -> None:
    """Temporal's own serializer reads the same payload. Other headers than `Content-…` have no effect."""
    headers = multi({"content-length": str(len(body)), "Nexus-Request-Id": "r", "Repr-Digest": "x"})
    if content_type is not None:
        headers[CONTENT_TYPE] = content_type
    assert decode_payload(headers, body) == one


def test_no_payload_is_no_content() -> None:
    """A workflow without a result sends an empty body without a content type."""
    assert encode_payload(None) == ({}, b"")


@pytest.mark.parametrize("odd", ODD)
def test_any_other_payload_crosses_as_a_serialized_message(odd: Payload) -> None:
    """Encrypted, compressed or with further metadata: the one form that loses nothing."""
    headers, body = encode_payload(odd)
    assert headers == {CONTENT_TYPE: "application/x-temporal-payload"}
    assert Payload.FromString(body) == odd
    assert decode_payload(headers, body) == odd


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        pytest.param("APPLICATION/JSON", payload(b"1", encoding=b"json/plain"), id="media type in capitals"),
        pytest.param("application/json ;", payload(b"1", encoding=b"json/plain"), id="trailing semicolon"),
        pytest.param(
            "application/json;MESSAGE-TYPE=a.B;format=protobuf",
            payload(b"1", encoding=b"json/protobuf", messageType=b"a.B"),
            id="unquoted, swapped, no spaces",
        ),
        pytest.param(
            "application/x-protobuf;message-type=a.B",
            payload(b"1", encoding=b"binary/protobuf", messageType=b"a.B"),
            id="unquoted message type",
        ),
    ],
)
def test_spelling_of_a_content_type_does_not_matter(content_type: str, expected: Payload) -> None:
    """Case, order, quotes and blanks are the sender's choice."""
    assert decode_payload({CONTENT_TYPE: content_type}, b"1") == expected


@pytest.mark.parametrize(
    "content_type",
    [
        pytest.param("application/json; charset=utf-8", id="charset"),
        pytest.param("application/json; format=protobuf", id="format without message type"),
        pytest.param('application/json; format=protobuf; message-type=""', id="empty message type"),
        pytest.param("application/json; format=avro; message-type=a.B", id="another format"),
        pytest.param("application/json; message-type=a.B", id="message type without format"),
        pytest.param("application/json; format=protobuf; message-type=a.B; charset=utf-8", id="one parameter too many"),
        pytest.param("application/json; format=protobuf; format=protobuf; message-type=a.B", id="repeated parameter"),
        pytest.param("application/x-protobuf", id="protobuf without message type"),
        pytest.param("application/x-protobuf; format=protobuf; message-type=a.B", id="protobuf with a format"),
        pytest.param("application/octet-stream; charset=utf-8", id="bytes with a charset"),
        pytest.param("application/json; =", id="unreadable parameter"),
        pytest.param("application/problem+json", id="other json"),
        pytest.param("text/plain", id="text"),
        pytest.param("gibberish", id="no media type"),
    ],
)
def test_an_unlisted_content_type_is_kept_as_unknown_content(content_type: str) -> None:
    """What is not exactly a row is passed on with its type, not guessed at."""
    assert decode_payload({CONTENT_TYPE: content_type}, b"x") == unknown(b"x", type=content_type.encode())


def test_a_further_content_header_makes_the_content_unknown() -> None:
    """A proxy's `Content-Security-Policy` describes the payload as much as its type does."""
    headers = multi({CONTENT_TYPE: "application/json", "Content-Security-Policy": "none"})
    expected = Payload(
        metadata={
            "encoding": b"unknown/nexus-content",
            "type": b"application/json",
            "security-policy": b"none",
        },
        data=b"1",
    )
    assert decode_payload(headers, b"1") == expected


def test_length_and_encoding_do_not_describe_the_payload() -> None:
    """Both belong to the transfer and are dropped before the table is looked at."""
    headers = multi({"Content-Length": "1", "Content-Encoding": "gzip", CONTENT_TYPE: "application/json"})
    assert decode_payload(headers, b"1") == payload(b"1", encoding=b"json/plain")


def test_a_body_without_a_type_is_unknown_content() -> None:
    """Only an empty body may lack a type."""
    assert decode_payload({}, b"x") == unknown(b"x")


def test_an_unparsable_message_is_a_protocol_error() -> None:
    """The peer said that it is a payload message; nothing else can be made of it."""
    with pytest.raises(RemoteProtocolError):
        decode_payload({CONTENT_TYPE: "application/x-temporal-payload"}, b"\xff\xff")


ENCODINGS = ["json/plain", "binary/plain", "binary/null", "json/protobuf", "binary/protobuf", "unknown/nexus-content"]
KEYS = st.sampled_from(["encoding", "messageType", "type", "Content-Type", ""]) | st.text()
VALUES = st.sampled_from([each.encode() for each in ENCODINGS]) | st.binary()
METADATA = st.dictionaries(KEYS, VALUES, max_size=3) | st.fixed_dictionaries(
    {"encoding": st.sampled_from([each.encode() for each in ENCODINGS])},
    optional={"messageType": st.from_regex(rb"[A-Za-z0-9_.]+", fullmatch=True) | st.binary()},
)


@given(st.builds(Payload, metadata=METADATA, data=st.binary()))
def test_any_payload_comes_back_as_it_went(one: Payload) -> None:
    """Payloads are opaque: the output of any converter or codec arrives unchanged."""
    headers, body = encode_payload(one)
    assert decode_payload(multi(headers), body) == one


HEADER_TEXT = st.binary(max_size=40).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
TYPES = st.sampled_from(["application/json", "application/x-protobuf", "application/x-temporal-payload"])
CONTENT_TYPES = st.one_of(
    HEADER_TEXT,
    st.builds("{}; {}".format, TYPES, HEADER_TEXT),
    st.builds("{}; format=protobuf; message-type={}".format, TYPES, HEADER_TEXT),
    st.builds('{}; message-type="{}"'.format, TYPES, HEADER_TEXT),
)


@given(st.fixed_dictionaries({}, optional={CONTENT_TYPE: CONTENT_TYPES, "Content-Odd": HEADER_TEXT}), st.binary())
@example({CONTENT_TYPE: "application/x-protobuf; message-type=\udc80"}, b"")
@example({CONTENT_TYPE: "application/x-protobuf; message-type=\u65e5"}, b"")
def test_any_content_is_read_or_refused(headers: dict[str, str], body: bytes) -> None:
    """No header, not even one that is no UTF-8, raises anything but a protocol error."""
    try:
        decoded = decode_payload(headers, body)
    except RemoteProtocolError:
        return
    assert decoded.data == body or headers[CONTENT_TYPE].lower().startswith("application/x-temporal-payload")
