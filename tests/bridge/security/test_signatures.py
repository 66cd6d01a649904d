"""Message signatures: the message that was signed verifies, every other one is refused in one way only."""

import base64
import dataclasses
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from http_message_signatures import ContentDigest, HTTPMessageSigner, MappingKeyResolver, algorithms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict, CIMultiDictProxy

from bridge.errors import UntrustedError
from bridge.protocol.headers import decode_wait
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner, MessageVerifier, Verified
from tests.support.helpers import key_set

BASE = "https://payments.example/bridge"
PATH = "/c/order-prod/PaymentService/process?callback=https%3A%2F%2Forders.example%2Fcallbacks%2Fid%3Fsig%3Dx.y"
BODY = b'{"amount":12}'
KEY_SET = key_set()
SIGNER = MessageSigner(KEY_SET)
VERIFIER = MessageVerifier(KEY_SET, public_base=BASE)
ANY_TEXT = st.text(st.characters())
SAMPLE = {
    "Nexus-Request-Id": "request-7",
    "Nexus-Callback-Bridge-Token": "token-7",
    "Nexus-Link": '<temporal:///namespaces/orders>; type="temporal.api.common.v1.Link.WorkflowEvent"',
    "Content-Type": "application/json",
    "Bridge-Token": "token-7",
    "Operation-Timeout": "3600s",
    "Request-Timeout": "10s",
    "Prefer": "wait=5",
    "User-Agent": "bridge",
}


@dataclasses.dataclass
class Message:
    """A message as it arrives."""

    headers: CIMultiDict[str] = dataclasses.field(default_factory=lambda: CIMultiDict(SAMPLE))
    kind: MessageKind = MessageKind.START
    method: str = "POST"
    raw_path: str = PATH
    body: bytes = BODY

    def signed(self, *, signer: MessageSigner = SIGNER, more: Sequence[str] = ()) -> "Message":
        signer.sign(self.kind, BASE + self.raw_path, self.headers, self.body, more=more)
        return self

    def verify(self, verifier: MessageVerifier = VERIFIER) -> Verified:
        verified = verifier.verify(
            self.kind, method=self.method, raw_path=self.raw_path, headers=CIMultiDictProxy(self.headers)
        )
        verified.check_body(self.body)
        return verified

    def refuse(self, verifier: MessageVerifier = VERIFIER) -> None:
        with pytest.raises(UntrustedError) as caught:
            self.verify(verifier)
        error = caught.value
        assert str(error) == "not authenticated"
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__


def signed_by_hand(
    message: Message,
    covered: Sequence[str] | None = None,
    *,
    created: datetime | None = None,
    keys: KeySet = KEY_SET,
    key_id: str = "k1",
    tag: str | None = "bridge-start",
    digest: str | None = None,
    algorithm: Any = algorithms.HMAC_SHA256,
    **options: Any,
) -> Message:
    """What our own signer would never make: any coverage, age, algorithm, tag."""
    message.headers["Repr-Digest"] = ContentDigest.create(message.body) if digest is None else digest
    if covered is None:
        covered = full_list(message)
    signer = HTTPMessageSigner(
        signature_algorithm=algorithm,
        key_resolver=MappingKeyResolver(private_keys={key_id: keys.raw()["k1"]}, public_keys={}),
    )
    signer.sign(
        SimpleNamespace(method=message.method, url=BASE + message.raw_path, headers=message.headers),
        key_id=key_id,
        created=created,
        label="bridge",
        tag=tag,
        covered_component_ids=covered,
        **({"include_alg": False} | options),
    )
    return message


def full_list(message: Message) -> list[str]:
    names = [name.lower() for name in message.headers if name.lower() not in {"user-agent", "repr-digest"}]
    return ["@method", "@path", "@query", "repr-digest", *sorted(names)]


def covered_by(message: Message) -> list[str]:
    return re.findall(r'"([^"]+)"[ )]', message.headers["Signature-Input"])


def test_a_signed_message_verifies_and_hands_out_what_was_covered() -> None:
    """Who acts upon a message sees the headers that its sender vouches for, and no others."""
    message = Message().signed()
    message.headers["X-Forwarded-For"] = "10.0.0.1"
    message.headers["traceparent"] = "00-1-2-00"
    verified = message.verify()
    acted_upon = {name.lower(): value for name, value in SAMPLE.items() if name != "User-Agent"}
    assert dict(verified.headers) == acted_upon | {"repr-digest": message.headers["Repr-Digest"]}
    assert verified.headers["NEXUS-REQUEST-ID"] == "request-7"


def test_what_is_sent_is_what_the_rfc_and_nexus_allow() -> None:
    """No Content-Digest, because Nexus would take it for the payload's; no algorithm, which the receiver configures."""
    headers = Message().signed().headers
    assert set(headers) == set(SAMPLE) | {"Repr-Digest", "Signature", "Signature-Input"}
    assert re.fullmatch(r"sha-256=:[A-Za-z0-9+/]{43}=:", headers["Repr-Digest"])
    assert len(headers["Signature"]) < 100
    assert len(headers["Signature-Input"]) < 400
    given = headers["Signature-Input"]
    assert given.startswith("bridge=(")
    assert 'tag="bridge-start"' in given
    assert 'keyid="k1"' in given
    assert "created=" in given
    assert not [name for name in ("alg=", "expires=", "nonce=") if name in given]


def test_everything_that_is_acted_upon_is_covered() -> None:
    """Always method, path, query and digest; of the headers those of Nexus, the content, ours and the timeouts."""
    message = Message()
    message.headers["Content-Length"] = "13"
    assert covered_by(message.signed()) == [
        *("@method", "@path", "@query", "repr-digest", "bridge-token", "content-type", "nexus-callback-bridge-token"),
        *("nexus-link", "nexus-request-id", "operation-timeout", "prefer", "request-timeout"),
    ]


def test_a_header_of_the_callers_own_is_covered_when_named() -> None:
    """A header that only this call knows is signed, and so handed out; unnamed it is not."""
    message = Message()
    message.headers["X-Tenant"] = "acme"
    assert message.signed(more=["X-TENANT", "X-Absent"]).verify().headers["X-Tenant"] == "acme"
    assert "X-Tenant" not in message.signed().verify().headers


def test_a_message_without_headers_or_body_is_signed_too() -> None:
    """An empty body has a digest like every other."""
    message = Message(headers=CIMultiDict(), raw_path="/", body=b"").signed()
    assert set(message.verify().headers) == {"repr-digest"}
    message.body = b" "
    message.refuse()


def spoil_header(name: str, value: str) -> Callable[[Message], None]:
    return lambda message: message.headers.__setitem__(name, value)


def add_line(name: str, value: str) -> Callable[[Message], None]:
    return lambda message: message.headers.add(name, value)


def drop(name: str) -> Callable[[Message], None]:
    return lambda message: message.headers.__delitem__(name)


def replace(name: str, old: str, new: str) -> Callable[[Message], None]:
    def spoil(message: Message) -> None:
        assert old in message.headers[name]
        message.headers[name] = message.headers[name].replace(old, new)

    return spoil


def change(**fields: Any) -> Callable[[Message], None]:
    def spoil(message: Message) -> None:
        for name, value in fields.items():
            setattr(message, name, value)

    return spoil


ACTED_UPON = [name for name in SAMPLE if name != "User-Agent"]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(change(method="GET"), id="method"),
        pytest.param(change(method="post"), id="method's case"),
        pytest.param(change(method=""), id="no method"),
        pytest.param(change(method="PÖST"), id="method not ASCII"),
        pytest.param(change(raw_path=PATH.replace("process", "refund")), id="operation in the path"),
        pytest.param(change(raw_path=PATH.replace("order-prod", "other-prod")), id="caller in the path"),
        pytest.param(change(raw_path=PATH.replace("order", "%6Frder")), id="path spelled otherwise"),
        pytest.param(change(raw_path="/" + PATH), id="slash before the path"),
        pytest.param(change(raw_path="/x/.." + PATH), id="dot segments"),
        pytest.param(change(raw_path=PATH.replace("orders", "evil")), id="callback in the query"),
        pytest.param(change(raw_path=PATH.replace("%3A", "%3a")), id="query spelled otherwise"),
        pytest.param(change(raw_path=PATH + "&callback=https%3A%2F%2Fevil.example"), id="query longer"),
        pytest.param(change(raw_path=PATH.partition("?")[0]), id="query dropped"),
        pytest.param(change(body=BODY + b" "), id="body"),
        pytest.param(change(body=b""), id="body dropped"),
        pytest.param(change(kind=MessageKind.CANCEL), id="taken for a cancel"),
        pytest.param(change(kind=MessageKind.COMPLETION), id="taken for a completion"),
        *(pytest.param(spoil_header(name, "other"), id=f"{name} altered") for name in ACTED_UPON),
        *(pytest.param(drop(name), id=f"{name} dropped") for name in ACTED_UPON),
        *(pytest.param(add_line(name, "more"), id=f"{name} repeated") for name in ACTED_UPON),
        *(pytest.param(add_line(name, SAMPLE[name]), id=f"{name} doubled") for name in ACTED_UPON),
        pytest.param(add_line("Nexus-Operation-Token", "other"), id="nexus header added"),
        pytest.param(add_line("nexus-", ""), id="nexus header without a name added"),
        pytest.param(add_line("Content-Encoding", "gzip"), id="content header added"),
        pytest.param(add_line("Content-Digest", ContentDigest.create(BODY)), id="content digest added"),
        pytest.param(add_line("BRIDGE-ATTEMPT", "9"), id="bridge header added"),
        pytest.param(spoil_header("Repr-Digest", ContentDigest.create(b"other")), id="digest altered"),
        pytest.param(drop("Repr-Digest"), id="digest dropped"),
        pytest.param(add_line("Repr-Digest", ContentDigest.create(BODY)), id="digest repeated"),
        pytest.param(spoil_header("Repr-Digest", "ä"), id="digest not ASCII"),
        pytest.param(spoil_header("Repr-Digest", "x" * 513), id="digest oversize"),
        pytest.param(drop("Signature"), id="signature dropped"),
        pytest.param(drop("Signature-Input"), id="signature input dropped"),
        pytest.param(add_line("Signature", "bridge=:AAAA:"), id="signature repeated"),
        pytest.param(add_line("signature-input", 'other=();tag="other"'), id="signature input repeated"),
        pytest.param(spoil_header("Signature", ""), id="signature empty"),
        pytest.param(spoil_header("Signature-Input", ""), id="signature input empty"),
        pytest.param(spoil_header("Signature", "bridge=::"), id="signature of no bytes"),
        pytest.param(spoil_header("Signature", f"bridge=:{'A' * 43}=:"), id="signature guessed"),
        pytest.param(spoil_header("Signature", "keyId=x,signature=y"), id="signature in the old style"),
        pytest.param(spoil_header("Signature", "bridge=:" + "A" * 600 + ":"), id="signature oversize"),
        pytest.param(spoil_header("Signature-Input", "bridge=()" + ";a" * 2100), id="signature input oversize"),
        pytest.param(spoil_header("Signature", "bridge=:Ä:"), id="signature not ASCII"),
        pytest.param(spoil_header("Signature-Input", "\udcff"), id="signature input a lone surrogate"),
        pytest.param(spoil_header("Nexus-Request-Id", "request-\udcff"), id="header a lone surrogate"),
        pytest.param(spoil_header("Nexus-Request-Id", "request-\n7"), id="header with a newline"),
        pytest.param(replace("Signature-Input", '"k1"', '"k2"'), id="unknown key id"),
        pytest.param(replace("Signature-Input", 'keyid="k1"', "keyid=1"), id="key id a number"),
        pytest.param(replace("Signature-Input", ';keyid="k1"', ""), id="no key id"),
        pytest.param(replace("Signature-Input", ' "nexus-request-id"', ""), id="coverage thinned"),
        pytest.param(replace("Signature-Input", "bridge=", "other="), id="labels differ"),
        pytest.param(replace("Signature-Input", "created=", "created=9"), id="created altered"),
        pytest.param(replace("Signature-Input", ";created=", ";created=99999999999999"), id="created absurd"),
        pytest.param(replace("Signature-Input", "bridge-start", "bridge-cancel"), id="tag altered"),
        pytest.param(change(raw_path=PATH.replace("?", "#?")), id="fragment before the query"),
        pytest.param(change(raw_path=PATH + "#"), id="empty fragment"),
        pytest.param(change(raw_path=BASE + PATH), id="absolute form with the prefix that a proxy should strip"),
        pytest.param(change(raw_path="payments.example:443"), id="authority form"),
        pytest.param(change(raw_path="*"), id="asterisk form"),
        pytest.param(change(raw_path=""), id="no target"),
        pytest.param(change(raw_path=PATH + "%"), id="stray percent"),
        pytest.param(change(raw_path=PATH + "\udcff"), id="target a lone surrogate"),
    ],
)
def test_an_altered_message_is_refused(spoil: Callable[[Message], None]) -> None:
    """If any part of a signed message is altered, added, dropped or repeated, the message is refused."""
    message = Message().signed()
    message.verify()
    spoil(message)
    message.refuse()


@pytest.mark.parametrize("header", ["Nexus-Operation-Close-Time", "Content-Type", "Bridge-Token", "Operation-Timeout"])
def test_a_header_cut_in_two_lines_at_its_comma_is_refused(header: str) -> None:
    """The signature covers both lines joined, but a reader of the header would read the first line only."""
    message = Message()
    message.headers[header] = "Mon, 23 Nov 2026 12:00:00 GMT"
    message.signed().verify()
    del message.headers[header]
    message.headers.add(header, "Mon")
    message.headers.add(header, "23 Nov 2026 12:00:00 GMT")
    message.refuse()


def test_a_header_of_the_callers_own_is_read_as_it_was_signed() -> None:
    """The verifier cannot know that such a header is acted upon; it hands out the signed text, not a first line."""
    message = Message()
    message.headers["X-Date"] = "Mon, 23 Nov"
    message.signed(more=["x-date"])
    del message.headers["X-Date"]
    message.headers.add("X-Date", "Mon")
    message.headers.add("X-Date", "23 Nov")
    assert message.verify().headers["X-Date"] == "Mon, 23 Nov"
    message.headers.add("X-Date", "more")
    message.refuse()


@pytest.mark.parametrize("verified_as", MessageKind)
@pytest.mark.parametrize("signed_as", MessageKind)
def test_no_kind_of_message_passes_as_another(signed_as: MessageKind, verified_as: MessageKind) -> None:
    """A start reflected as a completion is no completion, even if the key sets were the same."""
    message = Message(kind=signed_as).signed()
    message.kind = verified_as
    if signed_as is verified_as:
        message.verify()
    else:
        message.refuse()


def test_the_key_of_another_peer_does_not_verify() -> None:
    """A key id is public and never selects the peer: the same id in another key set is another key."""
    message = Message().signed(signer=MessageSigner(key_set()))
    message.refuse()


def test_keys_roll_over_without_losing_a_message() -> None:
    """The verifier learns the new key, then the signer uses it, then the verifier forgets the old one."""
    keys = {"old": new_key(), "new": new_key()}
    key_sets = [
        KeySet.model_validate({"signing": signing, "keys": {key_id: keys[key_id] for key_id in known}})
        for signing, known in [("old", ["old"]), ("old", ["old", "new"]), ("new", ["new", "old"]), ("new", ["new"])]
    ]
    for before, after in pairwise(key_sets):
        for signing, verifying in ((before, after), (after, before)):
            Message().signed(signer=MessageSigner(signing)).verify(MessageVerifier(verifying, public_base=BASE))
    Message().signed(signer=MessageSigner(key_sets[0])).refuse(MessageVerifier(key_sets[-1], public_base=BASE))


def shifted(**delta: int) -> datetime:
    return datetime.now(UTC) + timedelta(**delta)


@pytest.mark.parametrize("seconds", [-290, -10, 0, 10, 290])
def test_a_clock_may_differ_by_five_minutes(seconds: int) -> None:
    """Within five minutes to both sides a signature is fresh."""
    signed_by_hand(Message(), created=shifted(seconds=seconds)).verify()


@pytest.mark.parametrize("seconds", [-100_000_000, -86_000, -301, 302, 86_000])
def test_an_old_or_future_signature_is_refused(seconds: int) -> None:
    """Beyond five minutes it is not, to either side."""
    signed_by_hand(Message(), created=shifted(seconds=seconds)).refuse()


EVERY_PART = full_list(Message())


@pytest.mark.parametrize(
    "covered",
    [
        pytest.param([], id="nothing"),
        pytest.param(["repr-digest"], id="the digest alone"),
        pytest.param(["@method", "@authority", "@target-uri"], id="the library's default"),
        pytest.param(EVERY_PART[:4], id="no header"),
        *(pytest.param([each for each in EVERY_PART if each != part], id=f"without {part}") for part in EVERY_PART),
        pytest.param(['"content-type";sf' if p == "content-type" else p for p in EVERY_PART], id="sf variant"),
        pytest.param(['"nexus-request-id";bs' if p == "nexus-request-id" else p for p in EVERY_PART], id="bs variant"),
        pytest.param(
            ['"repr-digest";key="sha-256"' if p == "repr-digest" else p for p in EVERY_PART], id="key of the digest"
        ),
    ],
)
def test_a_good_signature_over_too_little_is_refused(covered: list[str]) -> None:
    """The least that must be signed follows from the message, not from what its sender chose to sign."""
    signed_by_hand(Message()).verify()
    signed_by_hand(Message(), covered).refuse()


def test_a_good_signature_over_more_is_accepted() -> None:
    """The list is a minimum: a peer may also cover the authority and any other component."""
    verified = signed_by_hand(Message(), [*EVERY_PART, "@authority", "user-agent"]).verify()
    assert verified.headers["User-Agent"] == "bridge"
    assert set(verified.headers) == {name.lower() for name in SAMPLE} | {"repr-digest"}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tag": None}, id="no tag"),
        pytest.param({"tag": "bridge"}, id="unknown tag"),
        pytest.param({"tag": "Bridge-Start"}, id="tag in another case"),
        pytest.param({"key_id": "k2"}, id="key under another id"),
        pytest.param({"key_id": ""}, id="key under no id"),
        pytest.param({"keys": key_set()}, id="other key under our id"),
        pytest.param({"expires": shifted(hours=-1)}, id="expired"),
    ],
)
def test_a_signature_of_other_parameters_is_refused(options: dict[str, Any]) -> None:
    """Tag, key and time must be those that this receiver is configured for."""
    signed_by_hand(Message(), **options).refuse()


def test_an_algorithm_is_never_chosen_by_the_message() -> None:
    """An equal one is harmless, another is refused, though the signature itself is good."""
    signed_by_hand(Message(), include_alg=True).verify()

    class Renamed(algorithms.HMAC_SHA256):
        algorithm_id = "hmac-sha1"

    signed_by_hand(Message(), algorithm=Renamed, include_alg=True).refuse()


def test_the_signature_of_a_gateway_is_ignored() -> None:
    """Exactly one signature has our tag. A signature with another tag has no effect."""
    message = Message().signed()
    before = dict(message.headers)
    message.headers["Signature-Input"] += ', gateway=("@method");created=1;keyid="g";tag="gateway"'
    message.headers["Signature"] += ", gateway=:AAAA:"
    message.verify()
    message.headers["Signature-Input"] = before["Signature-Input"].replace("bridge-start", "gateway")
    message.headers["Signature"] = before["Signature"]
    message.refuse()


@pytest.mark.parametrize("name", ["Signature", "Signature-Input"])
def test_a_signature_header_of_two_lines_is_refused(name: str) -> None:
    """Joined they would hold; who reads one line only sees another message."""
    message = Message().signed()
    message.headers["Signature-Input"] += ', gateway=("@method");created=1;keyid="g";tag="gateway"'
    message.headers["Signature"] += ", gateway=:AAAA:"
    ours, _, theirs = message.headers[name].partition(", ")
    del message.headers[name]
    message.headers.add(name, ours)
    message.headers.add(name, theirs)
    message.refuse()


@pytest.mark.parametrize(("name", "limit"), [("Signature", 512), ("Signature-Input", 4096)])
def test_a_good_signature_in_an_oversize_header_is_refused(name: str, limit: int) -> None:
    """Before a signature holds, only so much is parsed."""
    message = Message().signed()
    good = f"{message.headers[name]}, gateway="
    message.headers[name] = good.ljust(limit, "g")
    message.verify()
    message.headers[name] = good.ljust(limit + 1, "g")
    message.refuse()


def test_two_signatures_with_our_tag_are_refused() -> None:
    """Both hold, but which of them would be believed?"""
    message = Message().signed()
    value, signature = message.headers["Signature-Input"], message.headers["Signature"]
    message.headers["Signature-Input"] = f"{value}, {value.replace('bridge=', 'again=', 1)}"
    message.headers["Signature"] = f"{signature}, {signature.replace('bridge=', 'again=', 1)}"
    message.refuse()


def test_a_signature_verifies_under_any_label() -> None:
    """The label is unsigned. Therefore no decision may depend on it."""
    message = Message().signed()
    for name in ("Signature", "Signature-Input"):
        message.headers[name] = message.headers[name].replace("bridge=", "sig1=", 1)
    message.verify()


@pytest.mark.parametrize(
    "digest",
    [
        pytest.param("sha-256=:AAAA:", id="too short"),
        pytest.param("sha-256=1", id="no bytes"),
        pytest.param("md5=:AAAA:", id="unknown algorithm"),
        pytest.param("((", id="malformed"),
        pytest.param(ContentDigest.create(BODY) + ", md5=:AAAA:", id="unknown next to a good one"),
    ],
)
def test_a_signed_digest_of_another_form_is_refused(digest: str) -> None:
    """The digest is checked by value: a signature over nonsense proves no body."""
    signed_by_hand(Message(), digest=digest).refuse()


SEGMENT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).map(lambda text: quote(text, safe=""))


@given(
    segments=st.lists(SEGMENT | st.sampled_from(["%2b", "%2B", "%2e%2e", "..", ".", "%61", "a%2Fb", ""]), max_size=5),
    query=st.none() | SEGMENT.map(lambda text: f"callback={text}"),
    body=st.binary(max_size=50),
)
def test_path_and_query_count_as_they_are_spelled(segments: list[str], query: str | None, body: bytes) -> None:
    """A signature over any escaped name or callback URL is valid, if no proxy changes the spelling."""
    path = "/" + "/".join(segments) + ("" if query is None else f"?{query}")
    Message(raw_path=path, body=body).signed().verify()


def test_an_absent_and_an_empty_query_are_equal() -> None:
    """RFC 9421 knows no difference, and proxies drop a bare question mark."""
    message = Message(raw_path="/op?").signed()
    message.raw_path = "/op"
    message.verify()


@pytest.mark.parametrize("authority", ["http://payments.example", "HTTPS://10.0.0.7:8443", "https://[::1]"])
def test_a_request_target_in_absolute_form_is_read_as_its_path(authority: str) -> None:
    """RFC 9112 section 3.2.2: a server accepts it, also from a client that is no proxy."""
    message = Message().signed()
    message.raw_path = authority + PATH
    message.verify()


def test_brackets_that_a_proxy_decoded_in_the_path_are_read_as_they_were_signed() -> None:
    """nginx does that when it strips a prefix. No other URL may hold them, and the value has therefore one meaning."""
    message = Message(raw_path="/Service/%5Bb%5D?callback=%5B").signed()
    message.raw_path = "/Service/[b]?callback=%5B"
    message.verify()
    message.raw_path = "/Service/[b]?callback=%5B]"
    message.refuse()


@pytest.mark.parametrize(
    "target",
    [
        *("http://payments.example", "http://payments.example?callback=x", "ftp://h" + PATH, "//h" + PATH),
        *("http:" + PATH, "http://h/other", "http://h" + PATH + "#", "xhttp://h" + PATH, "http://h/http://h" + PATH),
    ],
)
def test_another_request_target_is_refused(target: str) -> None:
    """Without a path, of another scheme, or with another path behind the authority."""
    message = Message().signed()
    message.raw_path = target
    message.refuse()


@pytest.mark.parametrize("base", [BASE, BASE + "/", BASE + "//"])
def test_the_prefix_that_a_proxy_stripped_comes_back_from_the_settings(base: str) -> None:
    """The peer signs the path that it sees; what arrives is shorter."""
    Message().signed().verify(MessageVerifier(KEY_SET, public_base=base))
    Message().signed().refuse(MessageVerifier(KEY_SET, public_base="https://payments.example"))


def test_the_host_is_not_part_of_the_signature() -> None:
    """A proxy that ends TLS changes Host and scheme: key sets, not names, bind a message to its receiver."""
    Message().signed().verify(MessageVerifier(KEY_SET, public_base="http://10.0.0.7:8080/bridge"))


@pytest.mark.parametrize(
    ("url", "headers", "more"),
    [
        pytest.param(BASE + "/[x]", {}, [], id="brackets in the path"),
        pytest.param(BASE + "/ä", {}, [], id="path not ASCII"),
        pytest.param(BASE + "/%", {}, [], id="stray percent"),
        pytest.param("/op", {}, [], id="no absolute URL"),
        pytest.param(BASE, {"Nexus-Summary": "ä"}, [], id="header not ASCII"),
        pytest.param(BASE, {"Nexus-Summary": "a\nb"}, [], id="newline in a header"),
        pytest.param(BASE, {"X-Tenant": "\udcff"}, ["X-Tenant"], id="lone surrogate in a header of the caller's own"),
    ],
)
def test_what_cannot_be_signed_is_a_value_error_that_quotes_nothing(
    url: str, headers: dict[str, str], more: list[str]
) -> None:
    """It is not sent, because a peer could not verify it. The error quotes no value, because a history may hold it."""
    with pytest.raises(ValueError, match="cannot be signed") as caught:
        SIGNER.sign(MessageKind.START, url, CIMultiDict(headers), b"", more=more)
    assert type(caught.value) is ValueError
    assert caught.value.__context__ is None
    assert not [value for value in (url, *headers.values()) if value != BASE and value in str(caught.value)]


@pytest.mark.parametrize("more", [[], ["X-Tenant"]], ids=["known", "named"])
def test_a_repeated_header_is_not_signed(more: list[str]) -> None:
    """One line per name, on both sides, because most readers read the first line only."""
    name = "X-Tenant" if more else "Nexus-Operation-State"
    with pytest.raises(ValueError, match="repeated header"):
        SIGNER.sign(MessageKind.START, BASE, CIMultiDict([(name, "a"), (name, "b")]), b"", more=more)


def test_preferences_in_two_lines_are_one_signed_value() -> None:
    """A peer may write `Prefer` as several lines (RFC 7240 section 2), and they count as one list (RFC 9421)."""
    message = Message()
    del message.headers["Prefer"]
    message.headers.add("Prefer", "respond-async")
    message.headers.add("Prefer", "wait=5")
    assert decode_wait(message.signed().verify().headers["Prefer"]) == timedelta(seconds=5)


def test_links_in_two_lines_are_one_signed_value() -> None:
    """RFC 9421 section 2.1: the lines of a list are joined, by the signer, by a proxy and by the verifier."""
    message = Message()
    message.headers.add("Nexus-Link", "<https://banks.example/7>; type=Bank")
    joined = ", ".join(message.headers.getall("Nexus-Link"))
    assert message.signed().verify().headers["Nexus-Link"] == joined
    message.headers["Nexus-Link"] = joined
    assert message.verify().headers["Nexus-Link"] == joined
    message.headers.add("Nexus-Link", "<https://elsewhere.example>; type=Bank")
    message.refuse()


@given(fields=st.dictionaries(st.sampled_from(["Signature", "Signature-Input", "Repr-Digest"]), ANY_TEXT))
def test_arbitrary_signature_headers_are_refused_in_one_way_only(fields: dict[str, str]) -> None:
    """For any text in the three headers of a signature, the only exception is UntrustedError."""
    message = Message().signed()
    message.headers.update(fields)
    if fields:
        message.refuse()


ITEM = st.sampled_from(
    ['"@method"', '"@path"', '"@query"', '"@status"', '"@query-param";name="a"', '"repr-digest"', '"x";bs', '"x";req']
)
PARAMETER = st.sampled_from(
    ["created=1", "created=-1", "created=1e9", 'created="1"', "created=999999999999999", 'keyid="k1"', "keyid", "alg=1"]
) | st.just('tag="bridge-start"')


@settings(suppress_health_check=[HealthCheck.filter_too_much])
@given(
    items=st.lists(ITEM, max_size=4),
    parameters=st.lists(PARAMETER, max_size=4),
    signature=st.binary(max_size=64),
    label=st.sampled_from(["bridge", "a", "*", "B", ""]),
)
def test_well_formed_nonsense_is_refused_in_one_way_only(
    items: list[str], parameters: list[str], signature: bytes, label: str
) -> None:
    """Deeper in the library too, every failure is the same failure."""
    message = Message().signed()
    message.headers["Signature-Input"] = f"{label}=({' '.join(items)});" + ";".join([*parameters, 'tag="bridge-start"'])
    message.headers["Signature"] = f"{label}=:{base64.b64encode(signature).decode()}:"
    message.refuse()


@given(
    method=ANY_TEXT,
    raw_path=ANY_TEXT | ANY_TEXT.map(lambda text: "/" + text),
    headers=st.lists(st.tuples(st.text() | st.sampled_from(list(SAMPLE)), ANY_TEXT), max_size=4),
)
def test_an_arbitrary_message_is_refused_in_one_way_only(
    method: str, raw_path: str, headers: list[tuple[str, str]]
) -> None:
    """For any message with a copied signature, the only exception is UntrustedError."""
    copied = Message().signed().headers
    message = Message(method=method, raw_path=raw_path, headers=CIMultiDict(headers))
    message.headers.update({name: copied[name] for name in ("Signature", "Signature-Input", "Repr-Digest")})
    message.refuse()


@given(digest=ANY_TEXT, body=st.binary())
def test_an_arbitrary_digest_is_refused_in_one_way_only(digest: str, body: bytes) -> None:
    """The body's check, too, fails as UntrustedError or not at all."""
    verified = Message().signed().verify()
    with pytest.raises(UntrustedError):
        dataclasses.replace(verified, headers={"Repr-Digest": digest}).check_body(body)
