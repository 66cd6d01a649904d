"""Failures on the wire: one form written, every form read, and nothing but a protocol error raised."""

import json
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import example, given
from hypothesis import strategies as st
from temporalio.api.enums.v1 import NexusHandlerErrorRetryBehavior
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.failure import FAILURE_TYPE, WireFailure, decode_failure, encode_failure, parse_failure

HANDLER_ERROR = {"type": "nexus.HandlerError"}
OPERATION_ERROR = {"type": "nexus.OperationError"}
TEMPORAL = {"type": FAILURE_TYPE}


def failure(**members: Any) -> Failure:
    return ParseDict(members, Failure())


def read(body: Any, *, canceled: bool = False) -> Failure:
    return decode_failure(parse_failure(json.dumps(body).encode()), canceled=canceled)


def written(one: Failure) -> dict[str, Any]:
    members: dict[str, Any] = json.loads(encode_failure(one).to_json())
    return members


def chain(length: int) -> dict[str, Any]:
    link: dict[str, Any] = {"message": "root"}
    for number in range(length):
        link = {"message": str(number), "cause": link}
    return link


INFOS: list[dict[str, Any]] = [
    {},
    {
        "applicationFailureInfo": {
            "type": "Declined",
            "nonRetryable": True,
            "details": {"payloads": [{"metadata": {"encoding": "anNvbi9wbGFpbg=="}, "data": "eyJkIjoxfQ=="}]},
            "nextRetryDelay": "3s",
            "category": "APPLICATION_ERROR_CATEGORY_BENIGN",
        }
    },
    {"timeoutFailureInfo": {"timeoutType": "TIMEOUT_TYPE_HEARTBEAT", "lastHeartbeatDetails": {"payloads": [{}]}}},
    {"canceledFailureInfo": {"details": {"payloads": [{"data": "eA=="}]}}},
    {"terminatedFailureInfo": {}},
    {"serverFailureInfo": {"nonRetryable": True}},
    {"resetWorkflowFailureInfo": {}},
    {
        "activityFailureInfo": {
            "scheduledEventId": "9007199254740993",
            "startedEventId": "6",
            "identity": "worker-1",
            "activityType": {"name": "charge"},
            "activityId": "1",
            "retryState": "RETRY_STATE_TIMEOUT",
        }
    },
    {
        "childWorkflowExecutionFailureInfo": {
            "namespace": "n",
            "workflowExecution": {"workflowId": "w"},
            "initiatedEventId": "5",
        }
    },
    {"nexusOperationExecutionFailureInfo": {"endpoint": "e", "service": "s", "operation": "o", "operationToken": "t"}},
    {
        "nexusHandlerFailureInfo": {
            "type": "NOT_FOUND",
            "retryBehavior": "NEXUS_HANDLER_ERROR_RETRY_BEHAVIOR_RETRYABLE",
        }
    },
]


def links(cause: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    common = {"message": st.text(max_size=20), "source": st.text(max_size=5), "stackTrace": st.text(max_size=20)}
    optional = {"cause": cause, "encodedAttributes": st.just({"metadata": {"k": "eA=="}, "data": "eA=="})}
    return st.builds(
        lambda link, info: {**link, **info}, st.fixed_dictionaries(common, optional=optional), st.sampled_from(INFOS)
    )


NOTHING: dict[str, Any] = {}
FAILURES = st.recursive(st.just(NOTHING), links, max_leaves=12).map(lambda members: failure(**members))


@given(FAILURES)
@example(failure(**chain(56)))
def test_a_failure_comes_back_with_its_whole_chain(one: Failure) -> None:
    """Type, details, retryability, stack and every cause cross unchanged."""
    assert decode_failure(parse_failure(encode_failure(one).to_json()), canceled=False) == one


@pytest.mark.parametrize("length", [57, 80, 82, 95])
def test_a_chain_too_long_to_be_read_is_cut_with_a_note(length: int) -> None:
    """Everything but its innermost causes arrives, because an outcome has to arrive."""
    found = decode_failure(parse_failure(encode_failure(failure(**chain(length))).to_json()), canceled=False)
    messages = []
    while found.HasField("cause"):
        messages.append(found.message)
        found = found.cause
    assert len(messages) == 56
    assert found.message == "further causes were left out"


@given(FAILURES)
def test_every_failure_has_the_form_that_suits_every_server(one: Failure) -> None:
    """Message on top, stack in both places, causes only inside `details`, which is never absent."""
    members = written(one)
    details = members["details"]
    assert members["message"] == one.message
    assert members["metadata"] == TEMPORAL
    assert "cause" not in members
    assert "message" not in details
    assert members.get("stackTrace", "") == details.get("stackTrace", "") == one.stack_trace
    assert details.get("cause", {}).get("message", "") == one.cause.message


def test_an_empty_failure_still_has_message_and_details() -> None:
    """A server of 1.29 starts the operation again and again if `details` is absent."""
    assert written(Failure()) == {"message": "", "metadata": TEMPORAL, "details": {}}


def test_numbers_and_bytes_are_spelled_as_proto_json() -> None:
    """int64 and bytes are strings, durations end in s, enums are names."""
    one = failure(message="m", cause={"message": "c", **INFOS[7]}, **INFOS[1])
    assert written(one)["details"] == {"cause": {"message": "c", **INFOS[7]}, **INFOS[1]}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        pytest.param(
            {"canceledFailureInfo": {"identity": "me"}},
            {"canceledFailureInfo": {}},
            id="identity of a cancellation",
        ),
        pytest.param(
            {"terminatedFailureInfo": {"identity": "me"}},
            {"terminatedFailureInfo": {}},
            id="identity of a termination",
        ),
        pytest.param(
            {"cause": {"cause": {"canceledFailureInfo": {"identity": "me"}}}},
            {"cause": {"cause": {"canceledFailureInfo": {}}}},
            id="identity deep in the chain",
        ),
        pytest.param(
            {"applicationFailureInfo": {"details": {"payloads": [{"data": "eA==", "externalPayloads": [{}]}]}}},
            {"applicationFailureInfo": {"details": {"payloads": [{"data": "eA=="}]}}},
            id="note of an offloaded payload",
        ),
        pytest.param(
            {"encodedAttributes": {"data": "eA==", "externalPayloads": [{}]}},
            {"encodedAttributes": {"data": "eA=="}},
            id="note on encoded attributes",
        ),
        pytest.param(
            {"activityFailureInfo": {"identity": "me"}},
            {"activityFailureInfo": {"identity": "me"}},
            id="identity of an activity stays",
        ),
    ],
)
def test_what_old_servers_do_not_know_is_left_out(members: dict[str, Any], expected: dict[str, Any]) -> None:
    """One field that the server's proto lacks makes it refuse the message, or repeat the start without end."""
    one = failure(**members)
    assert written(one)["details"] == expected
    assert one == failure(**members)


APPLICATION = {"applicationFailureInfo": {"type": "Declined"}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            {"message": "m", "metadata": TEMPORAL, "details": {**APPLICATION, "stackTrace": "s", "cause": chain(1)}},
            {"message": "m", **APPLICATION, "stackTrace": "s", "cause": chain(1)},
            id="as 1.29 writes it",
        ),
        pytest.param(
            {
                "message": "m",
                "stackTrace": "s",
                "metadata": TEMPORAL,
                "details": {**APPLICATION, "cause": chain(0)},
                "cause": {"message": "root", "metadata": TEMPORAL, "details": {}},
            },
            {"message": "m", **APPLICATION, "stackTrace": "s", "cause": chain(0)},
            id="as 1.31 writes it",
        ),
        pytest.param(
            {
                "message": "m",
                "metadata": TEMPORAL,
                "details": {},
                "cause": {"message": "c", "metadata": TEMPORAL, "details": APPLICATION, "cause": {"message": "d"}},
            },
            {
                "message": "m",
                "cause": {
                    "message": "c",
                    **APPLICATION,
                    "cause": {"message": "d", "applicationFailureInfo": {"type": "NexusFailure", "nonRetryable": True}},
                },
            },
            id="cause on top only",
        ),
        pytest.param(
            {"metadata": TEMPORAL, "details": {"cause": {"message": "whole"}}, "cause": {"message": "abridged"}},
            {"cause": {"message": "whole"}},
            id="cause in both places",
        ),
        pytest.param(
            {"message": "m", "stackTrace": "top", "metadata": TEMPORAL, "details": {"stackTrace": "inside"}},
            {"message": "m", "stackTrace": "top"},
            id="stack in both places",
        ),
        pytest.param({"message": "m", "metadata": TEMPORAL}, {"message": "m"}, id="details absent"),
        pytest.param(
            {"message": "m", "metadata": TEMPORAL, "details": {"fromTheFuture": {"x": 1}, **APPLICATION}},
            {"message": "m", **APPLICATION},
            id="unknown field",
        ),
        pytest.param(
            {
                "message": "outer",
                "metadata": OPERATION_ERROR,
                "details": {"state": "failed"},
                "cause": {"message": "m", "metadata": TEMPORAL, "details": APPLICATION},
            },
            {"message": "m", **APPLICATION},
            id="operation error around its cause",
        ),
        pytest.param(
            {"message": "m", "metadata": OPERATION_ERROR, "details": {"state": "failed"}},
            {"message": "m", "applicationFailureInfo": {"type": "OperationError", "nonRetryable": True}},
            id="operation error without cause",
        ),
        pytest.param(
            {"message": "m", "metadata": HANDLER_ERROR, "details": {"type": "NOT_FOUND"}, "cause": {"message": "c"}},
            {
                "message": "m",
                "nexusHandlerFailureInfo": {"type": "NOT_FOUND"},
                "cause": {"message": "c", "applicationFailureInfo": {"type": "NexusFailure", "nonRetryable": True}},
            },
            id="handler error with cause",
        ),
        pytest.param(
            {"message": "m", "metadata": HANDLER_ERROR, "details": {"type": "INTERNAL", "retryableOverride": False}},
            {
                "message": "m",
                "nexusHandlerFailureInfo": {
                    "type": "INTERNAL",
                    "retryBehavior": "NEXUS_HANDLER_ERROR_RETRY_BEHAVIOR_NON_RETRYABLE",
                },
            },
            id="handler error that must not be retried",
        ),
        pytest.param(
            {"message": "m", "metadata": HANDLER_ERROR},
            {"message": "m", "nexusHandlerFailureInfo": {"type": "INTERNAL"}},
            id="handler error without details",
        ),
        pytest.param(
            {"message": "m"},
            {"message": "m", "applicationFailureInfo": {"type": "NexusFailure", "nonRetryable": True}},
            id="only a message",
        ),
        pytest.param(
            {"message": "m", "stackTrace": None, "metadata": None, "details": None, "cause": None},
            {"message": "m", "applicationFailureInfo": {"type": "NexusFailure", "nonRetryable": True}},
            id="null is nothing",
        ),
        pytest.param(
            {},
            {"applicationFailureInfo": {"type": "NexusFailure", "nonRetryable": True}},
            id="nothing at all",
        ),
    ],
)
def test_every_form_of_a_failure_is_read(body: dict[str, Any], expected: dict[str, Any]) -> None:
    """Old servers, new servers, the spec's own form, and peers without Temporal."""
    assert read(body) == failure(**expected)


def test_a_foreign_failure_keeps_what_has_no_place_of_its_own() -> None:
    """As on the server: one JSON payload of the Failure without its message."""
    body = {"message": "m", "stackTrace": "s", "metadata": {"code": "7"}, "details": {"a": [1, None, 1.5]}}
    decoded = read(body)
    [payload] = decoded.application_failure_info.details.payloads
    assert (decoded.message, decoded.stack_trace) == ("m", "s")
    assert payload.metadata["encoding"] == b"json/plain"
    assert json.loads(payload.data) == {"metadata": {"code": "7"}, "details": {"a": [1, None, 1.5]}}


def test_a_foreign_cancellation_keeps_its_details() -> None:
    """A cancellation to its caller, with what the peer said of it inside."""
    decoded = read({"message": "m", "details": "because"}, canceled=True)
    [payload] = decoded.canceled_failure_info.details.payloads
    assert decoded.message == "m"
    assert json.loads(payload.data) == {"details": "because"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param(
            {"message": "m", "metadata": TEMPORAL, "details": {"canceledFailureInfo": {}}},
            {"message": "m", "canceledFailureInfo": {}},
            id="temporal cancellation",
        ),
        pytest.param(
            {"message": "m", "metadata": TEMPORAL, "details": APPLICATION},
            {"message": "m", "canceledFailureInfo": {}, "cause": {"message": "m", **APPLICATION}},
            id="another temporal failure",
        ),
        pytest.param({"message": "m"}, {"message": "m", "canceledFailureInfo": {}}, id="only a message"),
        pytest.param(
            {"metadata": TEMPORAL},
            {"message": "operation canceled", "canceledFailureInfo": {}, "cause": {}},
            id="no message",
        ),
        pytest.param(
            {"message": "m", "metadata": OPERATION_ERROR, "details": {"state": "canceled"}},
            {"message": "m", "canceledFailureInfo": {}},
            id="operation error without cause",
        ),
        pytest.param(
            {"message": "outer", "metadata": OPERATION_ERROR, "cause": {"message": "m"}},
            {"message": "m", "canceledFailureInfo": {}},
            id="operation error around its cause",
        ),
    ],
)
def test_a_canceled_operation_is_a_cancellation(body: dict[str, Any], expected: dict[str, Any]) -> None:
    """A failure of another kind becomes the cause of a cancellation, and no part of it is lost."""
    assert read(body, canceled=True) == failure(**expected)


def test_the_retry_behavior_of_a_handler_error_is_kept_in_both_directions() -> None:
    """True and false are two answers; absent is a third."""
    body = {"metadata": HANDLER_ERROR, "details": {"type": "NOT_FOUND", "retryableOverride": True}}
    info = read(body).nexus_handler_failure_info
    assert info.retry_behavior == NexusHandlerErrorRetryBehavior.NEXUS_HANDLER_ERROR_RETRY_BEHAVIOR_RETRYABLE


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"nonsense", id="no JSON"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'"text"', id="a text"),
        pytest.param(b"\xff", id="no UTF-8"),
        pytest.param(b'{"message":1}', id="message is a number"),
        pytest.param(b'{"metadata":{"code":7}}', id="metadata is a number"),
        pytest.param(b'{"cause":"c"}', id="cause is a text"),
        pytest.param(b'{"details":' + b"[" * 5000 + b"]" * 5000 + b"}", id="very deep"),
        pytest.param(b'{"details":' + b"[" * 64 + b"]" * 64 + b"}", id="too deep by one"),
        pytest.param(b'{"cause":' * 5000 + b"{}" + b"}" * 5000, id="very many causes"),
    ],
)
def test_what_is_no_failure_is_refused(body: bytes) -> None:
    """A body that is not a Failure's JSON is the peer's fault."""
    with pytest.raises(RemoteProtocolError):
        parse_failure(body)


@pytest.mark.parametrize("spelled", [rb"\ud83d", rb"\uDE00\uD83D", b"\xf0\x9f"])
def test_half_a_character_costs_no_failure(spelled: bytes) -> None:
    """JavaScript cuts a text inside an emoji, and writes the rest as JSON. The failure arrives without that half."""
    whole = rb'{"message":"cut ' + spelled + rb'","details":{"\ud83d\ude00":"\\ud83d"}}'
    found = parse_failure(whole)
    assert found.message.startswith("cut ")
    assert set(found.message.removeprefix("cut ")) <= {"?", "\ufffd"}
    assert found.details == {"\U0001f600": r"\ud83d"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            b'{"details":{"applicationFailureInfo":{"details":{"payloads":[' + b"{}," * 1_380_000 + b"{}]}}}}",
            id="empty payloads",
        ),
        pytest.param(b'{"details":[' + b"0," * 2_000_000 + b"0]}", id="numbers"),
        pytest.param(b'{"details":[' + b'"",' * 1_380_000 + b'""]}', id="empty texts"),
        pytest.param(b'{"details":{' + b'"a":1,' * 600_000 + b'"a":1}}', id="members"),
    ],
)
def test_a_body_that_would_become_a_large_object_is_refused_before_it_is_parsed(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes per value cost much time and memory, and meanwhile the service answers no one else."""
    monkeypatch.setattr(WireFailure, "model_validate_json", None)
    with pytest.raises(RemoteProtocolError, match="over 32000 values"):
        parse_failure(body)


@pytest.mark.parametrize("text", ["{" * 100_000, "[" * 100_000, '"{' * 100_000, "\\" * 99_999 + '"', '\\"[' * 20_000])
def test_characters_inside_a_text_are_not_counted(text: str) -> None:
    """A stack trace or a message may hold any number of brackets, quotes and backslashes."""
    assert parse_failure(json.dumps({"message": text}).encode()).message == text


def test_the_refusal_names_the_field_and_quotes_nothing() -> None:
    """A peer's keys and values reach neither answers nor logs."""
    with pytest.raises(RemoteProtocolError) as refused:
        parse_failure(b'{"metadata":{"secret-key":7},"message":["secret-value"]}')
    assert str(refused.value) == "not a Nexus Failure: message, metadata"


@pytest.mark.parametrize(
    "details",
    [
        pytest.param({"applicationFailureInfo": 7}, id="number for a message"),
        pytest.param({"encodedAttributes": {"data": "x"}}, id="bad base64"),
        pytest.param({"applicationFailureInfo": {"nextRetryDelay": "soon"}}, id="bad duration"),
        pytest.param({"activityFailureInfo": {"scheduledEventId": "x"}}, id="bad number"),
        pytest.param({"activityFailureInfo": {"retryState": float("inf")}}, id="infinite enum"),
        pytest.param({"canceledFailureInfo": {}, "terminatedFailureInfo": {}}, id="two infos"),
        pytest.param({"cause": {"source": 1}}, id="wrong inside a cause"),
        pytest.param(7, id="a number"),
        pytest.param(chain(99), id="too deep for the protobuf readers behind us"),
    ],
)
def test_details_that_are_no_temporal_failure_are_refused(details: Any) -> None:
    """The peer said that they are one."""
    with pytest.raises(RemoteProtocolError):
        read({"metadata": TEMPORAL, "details": details})


KINDS = st.sampled_from([FAILURE_TYPE, "nexus.OperationError", "nexus.HandlerError", "x"])
MEMBERS = ["message", "source", "stackTrace", "encodedAttributes", "cause", "data", "metadata", "details", "payloads"]
INFO_MEMBERS = ["type", "nonRetryable", "nextRetryDelay", "category", "scheduledEventId", "retryState", "state"]
INFO_NAMES = [name for info in INFOS for name in info]
NAMES = st.sampled_from([*MEMBERS, *INFO_MEMBERS, *INFO_NAMES, "retryableOverride"])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["3s", "-1s", "99999999999999999999s", "YQ==", "NaN", "5", 10**30])
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(), inner, max_size=4)
)
BODIES = st.recursive(
    st.fixed_dictionaries({}, optional={"message": st.text(), "metadata": st.just({}), "details": JSON}),
    lambda cause: st.fixed_dictionaries(
        {"metadata": st.fixed_dictionaries({"type": KINDS}), "details": JSON},
        optional={"message": st.text(), "stackTrace": st.text(), "cause": cause},
    ),
    max_leaves=6,
)


@given(JSON | BODIES, st.booleans())
def test_any_json_is_read_or_refused(body: Any, canceled: bool) -> None:
    """Any text of a peer raises a protocol error, or gives a failure that can be forwarded."""
    try:
        decoded = read(body, canceled=canceled)
    except RemoteProtocolError:
        return
    assert decoded.HasField("canceled_failure_info") or not canceled
    assert Failure.FromString(decoded.SerializeToString()) == decoded
    assert written(decoded)["message"] == decoded.message


@pytest.mark.parametrize("length", [30, 56, 62, 63, 90, 99, 100, 120, 150])
@pytest.mark.parametrize("place", ["details", "top", "both"])
def test_a_long_chain_is_readable_or_refused(place: str, length: int) -> None:
    """What is handed on, every reader behind us can parse: protobuf stops at a hundred nested messages."""
    body: dict[str, Any] = {"message": "x", "metadata": TEMPORAL, "details": chain(0 if place == "top" else length)}
    for _ in range(0 if place == "details" else length):
        body = {"message": "x", "cause": body}
    try:
        decoded = read(body)
    except RemoteProtocolError:
        assert length > 56 or place == "both"
        return
    assert Failure.FromString(decoded.SerializeToString()) == decoded


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """What is not JSON raises nothing but a protocol error."""
    try:
        parse_failure(body)
    except RemoteProtocolError:
        return
