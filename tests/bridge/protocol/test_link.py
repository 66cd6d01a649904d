"""Links: comma-proof when written, forgiving when read."""

import nexusrpc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.protocol.link import WorkflowRef, decode_links, encode_links, to_temporal_link

EVENT_TYPE = "temporal.api.common.v1.Link.WorkflowEvent"
URL = (
    "temporal:///namespaces/order-prod/workflows/order-7/01a2/history"
    "?eventID=1&eventType=WorkflowExecutionStarted&referenceType=EventReference"
)
ORDER = WorkflowRef(namespace="order-prod", workflow_id="order-7", run_id="01a2")


def link(url: str = "https://a/b", kind: str = "x.y") -> nexusrpc.Link:
    return nexusrpc.Link(url=url, type=kind)


def test_a_run_links_to_its_first_event() -> None:
    """The form that Temporal's server writes itself."""
    assert encode_links([ORDER.to_link()]) == f'<{URL}>; type="{EVENT_TYPE}"'


IDS = st.text(min_size=1)


@given(IDS, IDS, IDS)
@example("a/b", "..", "a,b")
@example("a>b<", '"; type="x"', "%2F")
@example("#?&=", "\r\n\t\x00", "\u65e5 +;")
def test_any_run_comes_back_from_its_link(namespace: str, workflow_id: str, run_id: str) -> None:
    """Workflow ids are the users' own: any character may stand in one."""
    run = WorkflowRef(namespace=namespace, workflow_id=workflow_id, run_id=run_id)
    line = encode_links([run.to_link()])
    assert "," not in line
    assert line.isascii()
    assert line.isprintable()
    assert WorkflowRef.from_links(decode_links([line])) == run


def test_a_comma_in_a_url_is_percent_encoded() -> None:
    """Readers split at every comma, also inside the brackets."""
    line = encode_links([link("https://a/b,c"), link("https://d")])
    assert line == '<https://a/b%2Cc>; type="x.y", <https://d>; type="x.y"'
    assert decode_links([line]) == [link("https://a/b%2Cc"), link("https://d")]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('<https://a/b>; type="x.y"', id="quoted"),
        pytest.param("<https://a/b>;type=x.y", id="bare"),
        pytest.param(' <https://a/b> ;  type="x.y" ', id="blanks"),
        pytest.param('<https://a/b>; type="x.y"; rel=next', id="further parameter"),
        pytest.param('<https://a/b>; rel=next; type="x.y"', id="type last"),
    ],
)
def test_a_link_is_read_however_it_is_spelled(line: str) -> None:
    """Quotes are optional, other parameters ignored."""
    assert decode_links([line]) == [link()]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("", id="empty"),
        pytest.param("nonsense", id="nonsense"),
        pytest.param('https://a/b; type="x.y"', id="no brackets"),
        pytest.param("<https://a/b>", id="no type"),
        pytest.param('<https://a/b>; type=""', id="empty type"),
        pytest.param('<https://a/b>; type="x.y', id="quote not closed"),
        pytest.param('<https://a/b>; type=x.y"', id="quote not opened"),
        pytest.param('<https://a/b>; type="x y"', id="blank in the type"),
        pytest.param('<https://a/b>; type="x-y"', id="dash in the type"),
        pytest.param('<https://a/b>; type="x.y" junk', id="junk behind"),
        pytest.param('<https://a b>; type="x.y"', id="blank in the URL"),
        pytest.param('<>; type="x.y"', id="empty URL"),
        pytest.param('<https://a/b> type="x.y"', id="no semicolon"),
    ],
)
def test_a_malformed_link_is_dropped_and_the_others_kept(line: str) -> None:
    """Links are never essential: one bad link costs neither the message nor its neighbours."""
    good = encode_links([link()])
    assert decode_links([good, line, good]) == [link(), link()]


def test_lines_and_commas_separate_alike() -> None:
    """A header may be repeated or joined."""
    one, other = encode_links([link("https://a")]), encode_links([link("https://b")])
    assert decode_links([one, other]) == decode_links([f"{one},{other}"]) == [link("https://a"), link("https://b")]


def test_more_than_ten_links_are_cut() -> None:
    """The server's own limit per request."""
    assert len(decode_links([encode_links([link()] * 50)])) == 10


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        pytest.param("https://a/b", EVENT_TYPE, id="other scheme"),
        pytest.param(URL, "x.y", id="other type"),
        pytest.param(URL.replace("eventID=1", "eventID=one"), EVENT_TYPE, id="event id no number"),
        pytest.param(URL.replace("eventID=1", f"eventID={10**30}"), EVENT_TYPE, id="event id too large"),
        pytest.param(URL.replace("Started", "Imagined"), EVENT_TYPE, id="unknown event"),
        pytest.param(URL.replace("EventReference", "Guess"), EVENT_TYPE, id="unknown reference"),
        pytest.param("temporal:///namespaces/order-prod", EVENT_TYPE, id="path too short"),
        pytest.param("temporal://[", EVENT_TYPE, id="bad host"),
    ],
)
def test_a_link_that_names_no_run_is_passed_over(url: str, kind: str) -> None:
    """The first readable link counts. A message without a readable link names no run."""
    assert WorkflowRef.from_links([link(url, kind)]) is None
    assert WorkflowRef.from_links([link(url, kind), ORDER.to_link()]) == ORDER


@pytest.mark.parametrize("kind", ["x.y", "temporal.api.common.v1.Link.Workflow"])
def test_a_link_of_another_type_is_passed_over_in_silence(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Peers may have links of their own types. The SDK would quote each of them in our log."""
    assert to_temporal_link(link("temporal:///namespaces/n/workflows/w/r", kind)) is None
    assert not caplog.records


def test_a_link_by_request_id_names_its_run_too() -> None:
    """The form of a callback that was attached to a running workflow."""
    url = URL.replace("eventID=1&", "").replace("EventReference", "RequestIdReference&requestID=r")
    assert WorkflowRef.from_links([link(url, EVENT_TYPE)]) == ORDER


@given(st.lists(st.text(st.characters()) | st.text('<>;="%?&/:, tyetmporalnsk', max_size=80)))
def test_any_header_gives_links_or_none(lines: list[str]) -> None:
    """No text makes the reader fail."""
    for each in decode_links(lines):
        to_temporal_link(each)
    WorkflowRef.from_links(decode_links(lines))


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        pytest.param("https://rates.example/7?b=1;c=2", "rates.Rate", id="semicolon in the query"),
        pytest.param("https://rates.example/%zz", "rates.Rate", id="no escape"),
        pytest.param("https://rates.example/a b", "rates.Rate", id="blank"),
        pytest.param("https://rates.example/\u00e9", "rates.Rate", id="not ASCII"),
        pytest.param("https://rates.example:port/7", "rates.Rate", id="port no number"),
        pytest.param("https://rates.example/7>", "rates.Rate", id="bracket"),
        pytest.param("https://rates.example/\x1b[31m", "rates.Rate", id="escape sequence"),
        pytest.param("rates", "rates.Rate", id="no URL"),
        pytest.param("https://rates.example/7", "", id="no type"),
        pytest.param("https://rates.example/7", 'rates"Rate', id="quote in the type"),
    ],
)
def test_a_link_that_some_reader_refuses_is_left_out(url: str, kind: str) -> None:
    """Go's parser fails the whole message for it, again and again."""
    good = nexusrpc.Link(url="https://rates.example/8?a=1&b=%3B#x", type="rates.Rate")
    assert encode_links([nexusrpc.Link(url=url, type=kind), good]) == encode_links([good])
    assert encode_links([nexusrpc.Link(url=url, type=kind)]) == ""
