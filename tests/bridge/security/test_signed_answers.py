"""Signed answers: one that is changed, moved or played back is no answer; what is not covered is not read."""

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from multidict import CIMultiDict

from bridge.errors import UntrustedError
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner, MessageVerifier, RequestProof
from tests.support import oracle
from tests.support.helpers import key_set

BASE = "https://payments.example"
URL = f"{BASE}/c/order-prod/PaymentService/process?callback=https%3A%2F%2Forders.example%2F7"
BODY = b'{"token":"t","state":"running"}'
KEY_SET = key_set()


class Exchange:
    """One request that both sides know, and its answer on the way."""

    def __init__(self, keys: KeySet = KEY_SET, number: str = "7", kind: MessageKind = MessageKind.START) -> None:
        self.asked = CIMultiDict({"Nexus-Request-Id": number, "Content-Type": "application/json"})
        self.proof = MessageSigner(keys).sign(kind, URL, self.asked, b"{}")
        self.status, self.body = 201, BODY
        self.headers = CIMultiDict(
            {"Content-Type": "application/json", "Nexus-Link": "<https://x.example>; type=T", "Retry-After": "7"}
        )
        verifier = MessageVerifier(keys, public_base=BASE)
        path = URL.removeprefix(BASE)
        verified = verifier.verify(kind, method="POST", raw_path=path, headers=self.asked)
        verified.proof.sign_answer(self.status, self.headers, self.body)

    def read(self, proof: RequestProof | None = None) -> CIMultiDict[str]:
        return (proof or self.proof).verify_answer(self.status, self.headers, self.body)

    def refuse(self, proof: RequestProof | None = None) -> str:
        with pytest.raises(UntrustedError) as caught:
            self.read(proof)
        assert str(caught.value) == "not authenticated"
        return caught.value.reason


def test_an_answer_is_read_by_the_side_that_asked() -> None:
    """Covered headers, one line each; nothing that was added on the way."""
    exchange = Exchange()
    exchange.headers["Server"] = "nginx"
    exchange.headers["Content-Security-Policy"] = "default-src 'self'"
    exchange.headers["Nexus-Operation-State"] = "failed"
    read = exchange.read()
    assert set(read) == {"content-type", "nexus-link", "retry-after", "repr-digest"}
    assert read["Retry-After"] == "7"
    assert len(exchange.headers["Signature-Input"]) < 300


def test_no_byte_of_an_answer_can_be_changed() -> None:
    """Every byte of every covered value, of the signature's own headers and of the body."""
    good = Exchange()
    expected = dict(good.read())
    for name in ("Content-Type", "Nexus-Link", "Retry-After", "Repr-Digest", "Signature", "Signature-Input"):
        for at, bit in itertools.product(range(len(good.headers[name])), range(7)):
            spoilt = Exchange()
            spoilt.proof, spoilt.headers = good.proof, good.headers.copy()
            value = good.headers[name]
            spoilt.headers[name] = value[:at] + chr(ord(value[at]) ^ 1 << bit) + value[at + 1 :]
            try:
                assert dict(spoilt.read()) == expected, (name, at, bit)
                # A blank at the end of a line belongs to no value.
                assert spoilt.headers[name].strip(" \t") == value.strip(" \t")
            except UntrustedError:
                continue
    for at, bit in itertools.product(range(len(BODY)), range(8)):
        good.body = BODY[:at] + bytes([BODY[at] ^ 1 << bit]) + BODY[at + 1 :]
        good.refuse()


def test_no_byte_of_a_request_can_be_changed() -> None:
    """Path, query, every header that is acted upon, the signature's own, the body."""
    headers = CIMultiDict({"Nexus-Request-Id": "7", "Content-Type": "application/json", "Operation-Timeout": "60s"})
    MessageSigner(KEY_SET).sign(MessageKind.START, URL, headers, b"{}")
    verifier, path = MessageVerifier(KEY_SET, public_base=BASE), URL.removeprefix(BASE)

    def flips(text: str) -> Iterator[str]:
        for at, bit in itertools.product(range(len(text)), range(7)):
            yield text[:at] + chr(ord(text[at]) ^ 1 << bit) + text[at + 1 :]

    for name, value in headers.items():
        for changed in flips(value):
            spoilt = headers.copy()
            spoilt[name] = changed
            if changed.strip(" \t") != value:
                with pytest.raises(UntrustedError):
                    verifier.verify(MessageKind.START, method="POST", raw_path=path, headers=spoilt)
    for changed in flips(path):
        with pytest.raises(UntrustedError):
            verifier.verify(MessageKind.START, method="POST", raw_path=changed, headers=headers)


def test_no_field_can_be_moved_between_two_exchanges() -> None:
    """Of two tenants, of two requests of one tenant, of a start and a cancel: any set of headers, or the body."""
    others = [Exchange(key_set()), Exchange(number="8"), Exchange(kind=MessageKind.CANCEL)]
    for other in others:
        other.refuse(Exchange(number="9").proof)
        names = ["Signature", "Signature-Input", "Repr-Digest"]
        for moved in itertools.chain.from_iterable(itertools.combinations(names, size) for size in (1, 2, 3)):
            exchange = Exchange()
            before = exchange.headers.copy()
            exchange.headers.update({name: other.headers[name] for name in moved})
            # The digests are equal, and so may be what the signature covers by name.
            if exchange.headers != before:
                exchange.refuse()


@pytest.mark.parametrize("shown", [MessageKind.START, MessageKind.CANCEL, MessageKind.COMPLETION])
def test_a_request_is_no_answer(shown: MessageKind) -> None:
    """A request reflected as the answer to itself, or to another one: a request cannot cover a status."""
    exchange, other = Exchange(), Exchange(kind=shown)
    exchange.headers = other.asked.copy()
    exchange.body = b"{}"
    assert "tagged bridge-answer" in exchange.refuse()


def test_an_answer_is_no_request() -> None:
    """Its tag is its own."""
    exchange = Exchange()
    with pytest.raises(UntrustedError):
        MessageVerifier(KEY_SET, public_base=BASE).verify(
            MessageKind.START, method="POST", raw_path=URL.removeprefix(BASE), headers=exchange.headers
        )


def test_the_key_of_the_request_signs_its_answer() -> None:
    """During a rotation too: the handler that already signs with the new key answers an old caller with the old key."""
    old, new = new_key(), new_key()
    before = KeySet.model_validate({"signing": "old", "keys": {"old": old, "new": new}})
    after = KeySet.model_validate({"signing": "new", "keys": {"old": old, "new": new}})
    headers = CIMultiDict({"Nexus-Request-Id": "7"})
    proof = MessageSigner(before).sign(MessageKind.START, URL, headers, b"")
    path = URL.removeprefix(BASE)
    verified = MessageVerifier(after, public_base=BASE).verify(
        MessageKind.START, method="POST", raw_path=path, headers=headers
    )
    answer_headers = CIMultiDict[str]()
    verified.proof.sign_answer(202, answer_headers, b"")
    assert 'keyid="old"' in answer_headers["Signature-Input"]
    proof.verify_answer(202, answer_headers, b"")
    other = MessageSigner(after).sign(MessageKind.START, URL, CIMultiDict({"Nexus-Request-Id": "7"}), b"")
    with pytest.raises(UntrustedError):
        other.verify_answer(202, answer_headers, b"")


@pytest.mark.parametrize("seconds", [-(10**8), 0, 10**8])
def test_the_time_of_an_answer_is_not_judged(seconds: int) -> None:
    """Its binding makes it fresh; a handler whose clock is wrong is understood."""
    exchange = Exchange()
    exchange.proof.sign_answer(201, exchange.headers, BODY, clock=lambda: 1_800_000_000 + seconds)
    exchange.read()


@pytest.mark.parametrize("charset", ["; charset=utf-8", ";charset=UTF-8", '; charset="utf-8"'])
def test_a_charset_that_a_proxy_added_does_no_harm(charset: str) -> None:
    """What is read is the type that was signed."""
    exchange = Exchange()
    exchange.headers["Content-Type"] += charset
    assert exchange.read()["Content-Type"] == "application/json"


def spoil(name: str, change: Callable[[str], str]) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.headers.__setitem__(name, change(exchange.headers[name]))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda e: setattr(e, "status", 200), id="status"),
        pytest.param(lambda e: setattr(e, "body", b""), id="no body"),
        pytest.param(lambda e: setattr(e, "body", BODY[:-1]), id="a cut body"),
        pytest.param(spoil("Content-Type", lambda _: "text/html"), id="content type"),
        pytest.param(spoil("Content-Type", lambda _: "text/html; charset=utf-8"), id="content type with a charset"),
        pytest.param(lambda e: e.headers.__delitem__("Nexus-Link"), id="a covered header dropped"),
        pytest.param(
            lambda e: e.headers.add("Nexus-Link", "<https://y.example>; type=T"), id="a covered header doubled"
        ),
        pytest.param(lambda e: e.headers.add("Retry-After", "7"), id="a covered header repeated"),
        pytest.param(lambda e: e.headers.add("Signature", e.headers["Signature"]), id="two Signature lines"),
        pytest.param(lambda e: e.headers.add("Signature-Input", 'g=();tag="g"'), id="two Signature-Input lines"),
        pytest.param(
            spoil("Signature-Input", lambda t: f"{t}, {t.replace('bridge', 'again', 1)}"), id="two of our tag"
        ),
        pytest.param(spoil("Signature-Input", lambda t: t.replace('"@status" ', "")), id="status not covered"),
        pytest.param(spoil("Signature-Input", lambda t: t.replace(";req", "")), id="not the request's signature"),
        pytest.param(spoil("Signature-Input", lambda t: t.replace("bridge-answer", "bridge-start")), id="another tag"),
        pytest.param(spoil("Signature-Input", lambda t: t.replace('"k1"', '"k2"')), id="another key id"),
        pytest.param(spoil("Signature-Input", str.upper), id="in upper case"),
        pytest.param(spoil("Signature", lambda t: t.replace("=:", ":")), id="base64 without padding"),
        pytest.param(spoil("Signature", lambda t: t[:50]), id="a cut signature"),
        pytest.param(lambda e: e.headers.__delitem__("Signature"), id="no signature"),
        pytest.param(lambda e: e.headers.clear(), id="no headers"),
    ],
)
def test_a_changed_answer_is_refused(change: Callable[[Exchange], None]) -> None:
    """An answer with any change is refused. The log of the side that sent the request names the reason."""
    exchange = Exchange()
    exchange.read()
    change(exchange)
    reason = exchange.refuse()
    assert reason
    assert BODY.decode() not in reason


@pytest.mark.parametrize(
    "components",
    [
        pytest.param(["@status", "repr-digest", '"signature";req;key="bridge"'], id="no content type"),
        pytest.param(["@status", '"signature";req;key="bridge"', "content-type"], id="no digest"),
        pytest.param(["repr-digest", '"signature";req;key="bridge"', "content-type"], id="no status"),
        pytest.param(["@status", "repr-digest", "content-type"], id="no request"),
        pytest.param(["@status", "repr-digest", '"signature";req', "content-type"], id="the whole header"),
        pytest.param(["@status", "repr-digest", '"@method";req', "content-type"], id="a part of the request"),
    ],
)
def test_a_good_signature_over_too_little_is_refused(components: list[str]) -> None:
    """The key holder's own, by a library: what must be covered is decided by the reader."""
    asked = CIMultiDict({"Nexus-Request-Id": "7"})
    proof = oracle.SIGNER.sign(MessageKind.START, oracle.BASE + oracle.PATH, asked, b"")
    request = SimpleNamespace(method="POST", url=oracle.BASE + oracle.PATH, headers=asked)
    answer_headers = CIMultiDict({"Content-Type": "application/json"})
    oracle.signed_by_library(answer_headers, b"{}", components, request)
    with pytest.raises(UntrustedError):
        proof.verify_answer(200, answer_headers, b"{}")
    oracle.signed_by_library(
        answer_headers, b"{}", ["@status", "repr-digest", '"signature";req;key="bridge"', "content-type"], request
    )
    proof.verify_answer(200, answer_headers, b"{}")


def test_a_request_under_another_label_is_answered_under_its_own() -> None:
    """The label of a peer's choice is the one that its answer names."""
    headers = CIMultiDict({"Nexus-Request-Id": "7"})
    MessageSigner(KEY_SET).sign(MessageKind.START, URL, headers, b"")
    for name in ("Signature", "Signature-Input"):
        headers[name] = headers[name].replace("bridge=", "sig1=", 1)
    verified = MessageVerifier(KEY_SET, public_base=BASE).verify(
        MessageKind.START, method="POST", raw_path=URL.removeprefix(BASE), headers=headers
    )
    answer_headers = CIMultiDict[str]()
    verified.proof.sign_answer(202, answer_headers, b"")
    assert '"signature";req;key="sig1"' in answer_headers["Signature-Input"]
    verified.proof.verify_answer(202, answer_headers, b"")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(
            lambda h: h.__setitem__("Signature-Input", h["Signature-Input"].replace("k1", "k7")), "k1", id="key id"
        ),
        pytest.param(lambda h: h.__setitem__("Nexus-Extra", "x"), "nexus-extra", id="added header"),
        pytest.param(lambda h: h.__delitem__("Nexus-Request-Id"), "nexus-request-id", id="dropped header"),
        pytest.param(lambda h: h.__setitem__("Nexus-Request-Id", "8"), "a header was changed", id="changed header"),
    ],
)
def test_the_reason_for_the_operator_names_what_is_known(
    change: Callable[[CIMultiDict[str]], None], reason: str
) -> None:
    """Key ids, the component that is missing: never to the peer, always to the log."""
    headers = CIMultiDict({"Nexus-Request-Id": "7"})
    MessageSigner(KEY_SET).sign(MessageKind.START, URL, headers, b"")
    change(headers)
    with pytest.raises(UntrustedError) as caught:
        MessageVerifier(KEY_SET, public_base=BASE).verify(
            MessageKind.START, method="POST", raw_path=URL.removeprefix(BASE), headers=headers
        )
    assert reason in caught.value.reason


def test_the_reason_names_the_skew_in_seconds_and_a_prefix() -> None:
    """A clock, and a public URL with a prefix that the sender does not know."""
    headers = CIMultiDict({"Nexus-Request-Id": "7"})
    MessageSigner(KEY_SET, clock=lambda: 1_800_000_000).sign(MessageKind.START, URL, headers, b"")
    path = URL.removeprefix(BASE)
    for public_base, now, reason in (
        (BASE, 1_800_000_412, "+412 s"),
        (f"{BASE}/bridge", 1_800_000_000, "without the prefix /bridge"),
    ):
        verifier = MessageVerifier(KEY_SET, public_base=public_base, clock=float(now).__float__)
        with pytest.raises(UntrustedError) as caught:
            verifier.verify(MessageKind.START, method="POST", raw_path=path, headers=headers)
        assert reason in caught.value.reason
