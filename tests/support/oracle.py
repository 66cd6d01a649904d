"""An RFC 9421 library as the judge of our own signatures: many spoilt messages, and who accepts which.

`python -m tests.support.oracle COUNT [SEED]` prints the verdicts over COUNT requests and answers.
"""

import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from http_message_signatures import (
    ContentDigest,
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    MappingKeyResolver,
    algorithms,
)
from http_sf.compat import Dictionary
from multidict import CIMultiDict

from bridge.errors import UntrustedError
from bridge.security.keys import KeySet, new_key
from bridge.security.signatures import MessageKind, MessageSigner, MessageVerifier, RequestProof

BASE = "https://payments.example/bridge"
KEY_SET = KeySet.model_validate({"signing": "k1", "keys": {"k1": new_key(), "k2": new_key()}})
SIGNER, VERIFIER = MessageSigner(KEY_SET), MessageVerifier(KEY_SET, public_base=BASE)
ACTED_UPON = {"operation-timeout", "request-timeout", "prefer"}
PATH = "/c/order-prod/PaymentService/process?callback=https%3A%2F%2Forders.example%2Fcallbacks%2Fid%3Fsig%3Dx.y"


@dataclass(frozen=True)
class Sample:
    """A signed message: a request, or an answer to the request whose proof it holds."""

    method: str
    raw_path: str
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    proof: RequestProof | None = None
    request: Any = field(default=None, repr=False)
    """The request in the form that the library requires."""

    @property
    def read(self) -> CIMultiDict[str]:
        return CIMultiDict(self.headers)


class _Verifier(HTTPMessageVerifier):
    max_clock_skew = timedelta(minutes=5)


class _AgelessVerifier(HTTPMessageVerifier):
    def validate_created_and_expires(self, sig_input: Any, max_age: Any = None) -> None:
        pass


def request() -> Sample:
    headers = CIMultiDict(
        {
            "Nexus-Request-Id": "request-7",
            "Nexus-Link": '<temporal:///namespaces/orders>; type="temporal.api.common.v1.Link.WorkflowEvent"',
            "Content-Type": "application/json",
            "Operation-Timeout": "3600s",
            "Prefer": "wait=5",
            "User-Agent": "bridge",
        }
    )
    SIGNER.sign(MessageKind.START, BASE + PATH, headers, b'{"amount":12}')
    return Sample("POST", PATH, 0, tuple(headers.items()), b'{"amount":12}')


def answer() -> Sample:
    asked = CIMultiDict({"Nexus-Request-Id": "request-7", "Content-Type": "application/json"})
    proof = SIGNER.sign(MessageKind.START, BASE + PATH, asked, b"{}")
    body = b'{"token":"t","state":"running"}'
    headers = CIMultiDict({"Content-Type": "application/json", "Nexus-Link": "<https://x.example>; type=T"})
    proof.sign_answer(201, headers, body)
    headers["Server"] = "bridge"
    message = SimpleNamespace(method="POST", url=BASE + PATH, headers=asked)
    return Sample("", "", 201, tuple(headers.items()), body, proof, message)


def ours(sample: Sample) -> dict[str, str] | None:
    """The values that our code verified, None if it refuses."""
    try:
        if sample.proof is not None:
            return dict(sample.proof.verify_answer(sample.status, sample.read, sample.body))
        verified = VERIFIER.verify(
            MessageKind.START, method=sample.method, raw_path=sample.raw_path, headers=sample.read
        )
        verified.check_body(sample.body)
        return dict(verified.headers)
    except UntrustedError:
        return None


def theirs(sample: Sample) -> bool:
    """The library's verdict under the rules of the protocol."""
    fields = [name.lower() for name, _ in sample.headers]
    required = ["@status", "repr-digest", '"signature";req;key="bridge"', *(["content-type"] if sample.body else [])]
    if sample.proof is None:
        names = [n for n in fields if n.startswith(("nexus-", "content-", "bridge-")) or n in ACTED_UPON]
        if any(names.count(name) > 1 for name in names if name != "nexus-link"):
            return False
        required = ["@method", "@path", "@query", "repr-digest", *sorted(set(names) - {"content-length"})]
    if any(fields.count(name) != 1 for name in ("signature", "signature-input", "repr-digest")):
        return False
    if sample.proof is None and (not sample.raw_path.startswith("/") or "#" in sample.raw_path):
        return False
    keys = MappingKeyResolver(private_keys={}, public_keys=KEY_SET.raw())
    message: Any = SimpleNamespace(method=sample.method, url=BASE + sample.raw_path, headers=sample.read)
    kind: str = "bridge-start"
    verifier: type[HTTPMessageVerifier] = _Verifier
    if sample.proof is not None:
        message = SimpleNamespace(status_code=sample.status, headers=sample.read, request=sample.request)
        kind, verifier = "bridge-answer", _AgelessVerifier
    try:
        results = verifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=keys).verify(
            message,
            max_age=timedelta(0) if sample.proof is None else None,
            expect_tag=kind,
            require_components=required,
        )
        ContentDigest.verify(sample.read["repr-digest"], sample.body)
    except (HTTPMessageSignaturesException, ValueError, TypeError, KeyError):
        return False
    return len(results) == 1


def signed_by_library(headers: CIMultiDict[str], body: bytes, covered: Sequence[str], answered: Any = None) -> None:
    """Sign a start to `BASE` + `PATH`, or a 200 to the request *answered*."""
    headers["Repr-Digest"] = ContentDigest.create(body)
    message = SimpleNamespace(method="POST", url=BASE + PATH, headers=headers)
    if answered is not None:
        message = SimpleNamespace(status_code=200, headers=headers, request=answered)
    HTTPMessageSigner(
        signature_algorithm=algorithms.HMAC_SHA256,
        key_resolver=MappingKeyResolver(private_keys=KEY_SET.raw(), public_keys={}),
    ).sign(
        message,
        key_id="k1",
        label="bridge",
        tag="bridge-start" if answered is None else "bridge-answer",
        include_alg=False,
        covered_component_ids=covered,
    )


def spelling(sample: Sample) -> str | None:
    """The reason for a difference: a form that the library reads but never writes, or a label in one header only."""
    labels = [{part.strip().partition("=")[0] for part in sample.read[n].split(",")} for n in _BOTH]
    if labels[0] != labels[1]:
        return "a label stands in one of the two headers only"
    for name in ("Signature-Input", "Signature", "Repr-Digest"):
        value = sample.read[name].strip(" \t")
        parsed = Dictionary()
        parsed.parse(value.encode())
        if str(parsed) != value:
            return f"{name} not in canonical form"
        if name == "Signature" and any(member.params for member in parsed.values()):
            return "parameters behind a signature"
    return None


_BOTH = ("Signature-Input", "Signature")


# The changes that spoil a message.
_CHARACTERS = [*map(chr, range(32, 127)), "\t", "\n", "\x00", "\x7f", "é", "\udcff"]
_FRAGMENTS = [
    *(", ", ",", ";", " ", '"', "=", ":", "()", ";req", ";sf", ";bs", ';key="bridge"', ";alg=1", ';alg="hmac-sha256"'),
    *(';alg="ed25519"', ";expires=1", ";expires=9999999999", ";nonce=1", ';nonce="n"', ';keyid="k2"', ';tag="other"'),
    *(';tag="bridge-start"', ';tag="bridge-answer"', ";created=1", "sig1=", "bridge=", 'g=("@method");created=1'),
    *(', g=("@method");created=1;keyid="g";tag="g"', ", g=:AAAA:", ", g", '"@status"', '"@path" ', ' "date"', "\\"),
    *("; charset=utf-8", "=?1", "A", "==", "%", "%2F", "/", "?", "&", "#", "..", ".0", "*", "k2", "k1"),
]


def spoilt(sample: Sample, other: Sample, chance: random.Random) -> Sample:
    """*sample*, changed once or a few times; *other* is a good message of its kind."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        sample = chance.choice(_WAYS)(sample, other, chance)
    return sample


def _text(text: str, chance: random.Random) -> str:
    at = chance.randrange(len(text) + 1)
    to = min(len(text), at + chance.choice((0, 1, 1, 2, 5)))
    match chance.randrange(5):
        case 0:
            return text[:at] + text[to:]
        case 1:
            return text[:at] + chance.choice(_CHARACTERS) + text[at + 1 :]
        case 2:
            return text[:at] + chance.choice(_FRAGMENTS) + text[at:]
        case 3:
            return text[:at] + text[at:to].swapcase() + text[to:]
        case _:
            return text[:at] + text[at:to] + text[at:]


def _value(sample: Sample, _: Sample, chance: random.Random) -> Sample:
    headers = [*sample.headers]
    # The signature's own headers can mislead a reader.
    own = [n for n, (name, _) in enumerate(headers) if name.lower().startswith("signature") or name == "Repr-Digest"]
    at = chance.choice(own) if own and chance.random() < 0.7 else chance.randrange(len(headers))
    name, value = headers[at]
    headers[at] = (name, _text(value, chance))
    return replace(sample, headers=tuple(headers))


def _lines(sample: Sample, other: Sample, chance: random.Random) -> Sample:
    headers = [*sample.headers]
    at = chance.randrange(len(headers))
    name, value = headers[at]
    match chance.randrange(6):
        case 0:
            del headers[at]
        case 1:
            headers.insert(chance.randrange(len(headers)), (name, value))
        case 2:
            headers[at] = (chance.choice((name.lower(), name.upper(), _text(name, chance) or "x")), value)
        case 3:
            headers.append((chance.choice(("Nexus-Extra", "Content-Encoding", "Bridge-X", "X-Other", name)), "more"))
        case 4:
            first, comma, rest = value.partition(", ")
            headers[at : at + 1] = [(name, first), *([(name, rest)] if comma else [])]
        case _:
            headers[at] = chance.choice(other.headers)
    return replace(sample, headers=tuple(headers)) if headers else sample


def _rest(sample: Sample, other: Sample, chance: random.Random) -> Sample:
    match chance.randrange(4):
        case 0:
            body = bytearray(sample.body or b"x")
            body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)
            return replace(sample, body=chance.choice((bytes(body), b"", other.body, sample.body + b" ")))
        case 1 if sample.proof is None:
            return replace(sample, raw_path=_text(sample.raw_path, chance))
        case 2 if sample.proof is None:
            return replace(sample, method=chance.choice(("GET", "PUT", "post", "", "POST ", "PÖST")))
        case _ if sample.proof is not None:
            return replace(sample, status=chance.choice((200, 202, 204, 400, 404, 503, sample.status)))
        case _:
            return replace(sample, proof=sample.proof, request=sample.request)


_WAYS: list[Callable[[Sample, Sample, random.Random], Sample]] = [_value, _value, _value, _lines, _rest]


def verdicts(count: int, seed: int) -> tuple[Counter[str], list[tuple[str, Sample]]]:
    """Count who accepts *count* spoilt messages; collect the messages on which the two differ.

    Every message that our code accepts must have the content of the good one; otherwise AssertionError.
    """
    chance, counts, differing = random.Random(seed), Counter[str](), []
    for make in (request, answer):
        good, other = make(), make()
        expected = ours(good)
        assert expected is not None
        assert theirs(good)
        for _ in range(count // 2):
            sample = spoilt(good, other, chance)
            read, is_theirs = ours(sample), theirs(sample)
            counts[f"{make.__name__}: ours {read is not None}, library {is_theirs}"] += 1
            if read is not None:
                assert read in (expected, ours(other)), sample
                assert (sample.method, sample.body, sample.status) == (good.method, good.body, good.status)
                assert sample.raw_path.removesuffix("?") == good.raw_path.removesuffix("?")
            if (read is not None) != is_theirs:
                differing.append(("ours" if read is not None else "library", sample))
    return counts, differing


if __name__ == "__main__":
    totals, found = verdicts(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    for name, total in sorted(totals.items()):
        print(total, name)
    for (who, reason), total in sorted(Counter((who, spelling(each) or "?") for who, each in found).items()):
        print(f"{total} accepted by {who} alone: {reason}")
