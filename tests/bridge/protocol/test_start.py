"""The start of an operation: request and answers, both ways."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure

from bridge.errors import RemoteProtocolError
from bridge.protocol.link import WorkflowRef
from bridge.protocol.outcome import Outcome
from bridge.protocol.payload import decode_payload
from bridge.protocol.start import (
    Finished,
    Running,
    StartAnswer,
    StartRequest,
    decode_answer,
    decode_start,
    encode_answer,
    encode_start,
)
from tests.support.helpers import multi

JSON = {"Content-Type": "application/json"}
INPUT = Payload(metadata={"encoding": b"json/plain"}, data=b'{"order_id":"7","amount":12.5}')
CALLER = WorkflowRef(namespace="order-prod", workflow_id="order-7", run_id="01a2")
TARGET = WorkflowRef(namespace="payment-prod", workflow_id="payment/7,b", run_id="02b3")
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def request(**changes: Any) -> StartRequest:
    members: dict[str, Any] = {
        "service": "PaymentService",
        "operation": "process",
        "request_id": "59021fa2",
        "callback_url": "http://orders.example:7243/callbacks/1?sig=a.b%2F",
    }
    return StartRequest(**members | changes)


def read_back(path: str, headers: dict[str, str]) -> StartRequest:
    parts = urlsplit(path)
    _, service, operation = parts.path.split("/")
    [callback_url] = parse_qs(parts.query, strict_parsing=True)["callback"] if parts.query else [None]
    lines = [headers["Nexus-Link"]] if "Nexus-Link" in headers else []
    return decode_start(
        unquote(service), unquote(operation), callback_url=callback_url, headers=multi(headers), links=lines
    )


def test_a_start_is_written_as_the_protocol_has_it() -> None:
    """The worked example, with our two headers more."""
    start = request(
        callback_headers={"source": "5b00"},
        headers={"Tenant": "blue"},
        links=[CALLER.to_link()],
        operation_timeout=timedelta(seconds=30),
        scheduled_time=NOON,
        attempt=2,
        operation_token="bmFtZXNwYWNl.Y2FsbA.cGF5bWVudC03",
    )
    path, headers, body = encode_start(start, INPUT, request_timeout=timedelta(seconds=9.999))
    assert path == (
        "/PaymentService/process?callback=http%3A%2F%2Forders.example%3A7243%2Fcallbacks%2F1%3Fsig%3Da.b%252F"
    )
    assert body == INPUT.data
    assert headers == {
        "Nexus-Operation-Token": "bmFtZXNwYWNl.Y2FsbA.cGF5bWVudC03",
        "Content-Type": "application/json",
        "Nexus-Request-Id": "59021fa2",
        "Nexus-Callback-source": "5b00",
        "Nexus-Link": f'<{CALLER.to_link().url}>; type="temporal.api.common.v1.Link.WorkflowEvent"',
        "Operation-Timeout": "30000ms",
        "Request-Timeout": "9999ms",
        "Bridge-Scheduled-Time": "2026-11-23T12:00:00.000Z",
        "Bridge-Attempt": "2",
        "tenant": "blue",
    }


def test_a_start_says_nothing_that_it_does_not_know() -> None:
    """No callback, no link, no deadline: no header, no query."""
    path, headers, body = encode_start(request(callback_url=None), Payload(), request_timeout=timedelta(seconds=1))
    assert path == "/PaymentService/process"
    assert set(headers) == {"Content-Type", "Nexus-Request-Id", "Request-Timeout", "Bridge-Attempt"}
    assert body == b""


VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=30)
NAMES = st.from_regex(r"x-[a-z0-9-]{0,20}", fullmatch=True)
REQUESTS = st.builds(
    StartRequest,
    service=st.text(min_size=1),
    operation=st.text(min_size=1),
    request_id=VISIBLE,
    callback_url=st.none() | VISIBLE.map("https://host/?a=b&c=%2F#".__add__),
    callback_headers=st.dictionaries(NAMES, VISIBLE, max_size=3),
    headers=st.dictionaries(NAMES, VISIBLE, max_size=3),
    links=st.lists(st.builds(WorkflowRef.to_link, st.just(CALLER)), max_size=2),
    operation_timeout=st.none() | st.integers(0, 10**10).map(lambda each: timedelta(milliseconds=each)),
    operation_token=st.none() | st.text("abc.-_", min_size=1),
    scheduled_time=st.none() | st.integers(0, 10**12).map(lambda each: datetime.fromtimestamp(each / 1000, UTC)),
    attempt=st.integers(1, 10**6),
)


@given(REQUESTS, st.binary())
def test_any_start_comes_back_from_the_wire(start: StartRequest, data: bytes) -> None:
    """The callback URL byte for byte, every name, time and header; the payload unread."""
    payload = Payload(metadata={"encoding": b"binary/encrypted"}, data=data)
    path, headers, body = encode_start(start, payload, request_timeout=timedelta(seconds=10))
    back = read_back(path, headers)
    own = {name: value for name, value in back.headers.items() if name.startswith("x-")}
    scheduled = back.scheduled_time
    assert decode_payload(multi(headers), body) == payload
    assert own == start.headers
    assert (scheduled is None) == (start.scheduled_time is None)
    if scheduled is not None and start.scheduled_time is not None:
        assert abs(scheduled - start.scheduled_time) < timedelta(milliseconds=1)
    assert (back.service, back.operation, back.request_id) == (start.service, start.operation, start.request_id)
    assert (back.callback_url, back.callback_headers) == (start.callback_url, start.callback_headers)
    assert back.operation_token == start.operation_token
    assert (list(back.links), back.operation_timeout) == (list(start.links), start.operation_timeout)
    assert back.attempt == start.attempt


def decode(*links: str, **headers: str) -> StartRequest:
    fields = multi({"Nexus-Request-Id": "r"})
    fields.update({name.replace("_", "-"): value for name, value in headers.items()})
    return decode_start("s", "o", callback_url=None, headers=fields, links=links)


def test_headers_are_sorted_as_the_server_sorts_them() -> None:
    """`Content-…` belongs to the input, `Nexus-Callback-…` to the completion, all the rest to the operation."""
    start = decode(Content_Type="a/b", Nexus_Callback_Temporal_Callback_Token="{}", User_Agent="go", Tenant="Blue")
    assert start.callback_headers == {"temporal-callback-token": "{}"}
    assert start.headers == {"nexus-request-id": "r", "user-agent": "go", "tenant": "Blue"}


@pytest.mark.parametrize(
    "request_id",
    [
        pytest.param("", id="empty"),
        pytest.param("r" * 256, id="too long"),
        pytest.param("a\tb", id="control character"),
        pytest.param("a\udcff", id="no UTF-8"),
    ],
)
def test_a_start_without_a_usable_request_id_is_refused(request_id: str) -> None:
    """Everything is deduplicated by it."""
    with pytest.raises(RemoteProtocolError):
        decode(Nexus_Request_Id=request_id)


def test_a_start_without_any_request_id_is_refused() -> None:
    """The header is not optional here."""
    with pytest.raises(RemoteProtocolError):
        decode_start("s", "o", callback_url=None, headers=multi({}), links=[])


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"Request_Timeout": "soon"}, id="request timeout"),
        pytest.param({"Request_Timeout": ""}, id="empty request timeout"),
        pytest.param({"Bridge_Scheduled_Time": "yesterday"}, id="scheduled time"),
        pytest.param({"Bridge_Scheduled_Time": "0001-01-01T00:00:00+23:59"}, id="scheduled before all time"),
    ],
)
def test_an_unreadable_header_of_the_protocol_is_refused(headers: dict[str, str]) -> None:
    """Guessing a time could run a payment twice."""
    with pytest.raises(RemoteProtocolError):
        decode(**headers)


@pytest.mark.parametrize("text", ["29.998187917s", "29998ms"])
def test_the_time_left_is_read_from_every_server(text: str) -> None:
    """1.29 writes Go's text, 1.31 the spec's."""
    timeout = decode(Operation_Timeout=text, Request_Timeout="9999ms").operation_timeout
    assert timeout is not None
    assert round(timeout.total_seconds(), 3) == 29.998


@pytest.mark.parametrize("text", ["", "never", "-1s", "70000000h"])
def test_an_unreadable_operation_timeout_is_ignored(text: str) -> None:
    """It is an upper bound, never exact."""
    assert decode(Operation_Timeout=text).operation_timeout is None


@pytest.mark.parametrize(("text", "attempt"), [("3", 3), ("", 1), ("-3", 1), ("x", 1), ("9" * 5000, 1), ("\u00b2", 1)])
def test_an_unreadable_attempt_is_the_first(text: str, attempt: int) -> None:
    """Information only."""
    assert decode(Bridge_Attempt=text).attempt == attempt


@pytest.mark.parametrize(
    ("request_timeout", "wait"),
    [("15s", 5), ("4s", 3), ("1s", None), ("500ms", None), (None, 5)],
)
def test_a_start_is_held_no_longer_than_its_sender_waits(request_timeout: str | None, wait: int | None) -> None:
    """The request timeout limits the preference, because the sender discards a late answer and repeats the start."""
    headers = {"Nexus-Request-Id": "r", "Prefer": "wait=5"}
    if request_timeout is not None:
        headers["Request-Timeout"] = request_timeout
    start = decode_start("s", "o", callback_url=None, headers=multi(headers), links=[])
    assert start.wait == (None if wait is None else timedelta(seconds=wait))


def test_a_bad_link_costs_nothing_but_itself() -> None:
    """Links are never essential."""
    assert decode("nonsense", f'<{CALLER.to_link().url}>; type="{CALLER.to_link().type}"').links == [CALLER.to_link()]


def failure(message: str, *, canceled: bool = False) -> Failure:
    made = Failure(message=message)
    made.cause.message = "why"
    if canceled:
        made.canceled_failure_info.SetInParent()
    return made


ANSWERS = [
    pytest.param(Running(operation_token="eyJ0IjoxfQ", target=TARGET), 201, None, id="running"),
    pytest.param(Running(operation_token="t", target=None), 201, None, id="running, no link"),
    pytest.param(Finished(outcome=Outcome.succeeded(INPUT), target=TARGET), 200, "succeeded", id="succeeded"),
    pytest.param(Finished(outcome=Outcome.failed(failure("no")), target=TARGET), 424, "failed", id="failed"),
    pytest.param(
        Finished(outcome=Outcome.canceled(failure("stop", canceled=True)), target=None), 424, "canceled", id="canceled"
    ),
]


@pytest.mark.parametrize(("answer", "status", "state"), ANSWERS)
def test_an_answer_comes_back_from_the_wire(answer: StartAnswer, status: int, state: str | None) -> None:
    """201, 200 and 424; server 1.29 wants the state in a header."""
    sent, headers, body = encode_answer(answer)
    links = [headers["Nexus-Link"]] if "Nexus-Link" in headers else []
    assert (sent, headers.get("Nexus-Operation-State")) == (status, state)
    assert headers["Content-Type"] == "application/json"
    assert ("Nexus-Link" in headers) == (answer.target is not None)
    assert decode_answer(sent, multi(headers), links, body) == answer


def test_a_running_operation_is_answered_with_its_token() -> None:
    """The OperationInfo of the spec."""
    _, _, body = encode_answer(Running(operation_token="t", target=None))
    assert json.loads(body) == {"token": "t", "state": "running"}


def test_a_success_needs_no_state_header() -> None:
    """Temporal's own handler side does not send it on 200."""
    answer = decode_answer(200, multi(JSON), [], INPUT.data)
    assert answer == Finished(outcome=Outcome.succeeded(INPUT), target=None)


def test_further_members_of_a_running_operation_are_ignored() -> None:
    """Server 1.29 adds the legacy `id`."""
    answer = decode_answer(201, multi(JSON), ["nonsense"], b'{"id":"t","token":"t","state":"running"}')
    assert answer == Running(operation_token="t", target=None)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b'{"state":"running"}', id="no token"),
        pytest.param(b'{"id":"t","state":"running"}', id="legacy id only"),
        pytest.param(b'{"token":"","state":"running"}', id="empty token"),
        pytest.param(b'{"token":7,"state":"running"}', id="token is a number"),
        pytest.param(b'{"token":"t"}', id="no state"),
        pytest.param(b'{"token":"t","state":"succeeded"}', id="other state"),
        pytest.param(b'{"token":"t\\nt","state":"running"}', id="token that no header can carry"),
        pytest.param(b'{"token":"\\u00fc","state":"running"}', id="token that is not ASCII"),
        pytest.param(b'{"token":"' + b"t" * 4097 + b'","state":"running"}', id="token too long"),
    ],
)
def test_a_201_without_a_usable_token_is_no_answer(body: bytes) -> None:
    """Without it the operation could not be named."""
    with pytest.raises(RemoteProtocolError):
        decode_answer(201, multi(JSON), [], body)


OPERATION_ERROR = {"message": "m", "metadata": {"type": "nexus.OperationError"}}


@pytest.mark.parametrize(
    ("headers", "body", "state"),
    [
        pytest.param({}, {"message": "m"}, "failed", id="no header, a cause"),
        pytest.param({}, OPERATION_ERROR | {"details": {"state": "canceled"}}, "canceled", id="no header, canceled"),
        pytest.param({}, OPERATION_ERROR | {"details": {"state": "failed"}}, "failed", id="no header, failed"),
        pytest.param({}, OPERATION_ERROR, "failed", id="no header, no details"),
        pytest.param({}, {"message": "m", "details": {"state": "canceled"}}, "failed", id="details of something else"),
        pytest.param({"Nexus-Operation-State": "canceled"}, {"message": "m"}, "canceled", id="header, a cause"),
    ],
)
def test_the_state_of_a_bad_ending_is_read_from_header_or_body(
    headers: dict[str, str], body: dict[str, Any], state: str
) -> None:
    """Old peers use the header, the spec the body."""
    answer = decode_answer(424, multi(JSON | headers), [], json.dumps(body).encode())
    assert isinstance(answer, Finished)
    assert answer.outcome.state.value == state
    assert answer.outcome.failure is not None
    assert answer.outcome.failure.HasField("canceled_failure_info") == (state == "canceled")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param(JSON | {"Nexus-Operation-State": "succeeded"}, b'{"message":"m"}', id="state succeeded"),
        pytest.param(JSON | {"Nexus-Operation-State": "running"}, b'{"message":"m"}', id="state running"),
        pytest.param(JSON, json.dumps(OPERATION_ERROR | {"details": {"state": 7}}).encode(), id="state is a number"),
        pytest.param(JSON | {"Nexus-Operation-State": "failed"}, b"", id="no failure"),
        pytest.param(JSON, b"", id="neither state nor failure"),
        pytest.param({}, b'{"message":"m"}', id="no content type"),
    ],
)
def test_a_424_that_contradicts_itself_is_no_answer(headers: dict[str, str], body: bytes) -> None:
    """An outcome is never guessed."""
    with pytest.raises(RemoteProtocolError):
        decode_answer(424, multi(headers), [], body)


@given(
    st.sampled_from([200, 201, 424]),
    st.sampled_from([{}, JSON, JSON | {"Nexus-Operation-State": "failed"}, {"Content-Type": "text/html"}]),
    st.binary() | st.sampled_from([b"{}", b'{"token":"t","state":"running"}', b'{"message":"m"}']),
)
def test_any_answer_is_read_or_raises_a_documented_error(status: int, headers: dict[str, str], body: bytes) -> None:
    """Any answer of a peer, a proxy or a stranger is read or refused."""
    try:
        assert isinstance(decode_answer(status, multi(headers), [], body), Running | Finished)
    except RemoteProtocolError:
        return
