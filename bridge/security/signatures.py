"""Message signatures (RFC 9421, hmac-sha256): the proof that a peer wrote a request, or the answer to one of ours.

The signature of a request covers method, path, query, the body's digest and every header that the receiving side uses.
The signature of an answer covers the status, the digest, the headers that the reader uses, and the signature of the
request. The verifier derives from the message itself what must be covered, and returns covered values only. The digest
is in `Repr-Digest`, because in Nexus every `Content-…` header describes the payload.

No I/O. A verifier accepts one spelling only. It refuses what other libraries accept: padding inside a list, escapes in
a string, base64 with spare bits. The tests compare every verdict with the verdict of an RFC 9421 library.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import NamedTuple
from urllib.parse import urlsplit

from multidict import CIMultiDict

from bridge.errors import UntrustedError
from bridge.security.keys import KeySource

CLOCK_SKEW = timedelta(minutes=5)
"""How far the clocks of a signer and a verifier may differ, in both directions. The same holds for callback tokens."""

REPR_DIGEST = "Repr-Digest"
SIGNATURE = "Signature"
SIGNATURE_INPUT = "Signature-Input"

_ANSWER = "bridge-answer"
_LABEL = "bridge"
_NO_KEY = secrets.token_bytes(32)
_ALWAYS = ("@method", "@path", "@query", "repr-digest")
_PREFIXES = ("nexus-", "content-", "bridge-")
_ACTED_UPON = frozenset({"operation-timeout", "request-timeout", "prefer"})
_LISTS = frozenset({"nexus-link", "prefer"})
_LIMITS = {SIGNATURE_INPUT: 4096, SIGNATURE: 512}

_CHARACTERS = r"A-Za-z0-9\-._~!$&'()*+,;=:@/"
_ESCAPE = "%[0-9A-Fa-f]{2}"
_AUTHORITY = r"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9\-._~]+)(?::[0-9]+)?"
_PATH = rf"(?:/(?:[{_CHARACTERS}]++|{_ESCAPE})*+)?"
_URL = re.compile(rf"(https?)://({_AUTHORITY})({_PATH})(?:\?((?:[{_CHARACTERS}?]++|{_ESCAPE})*+))?")
ABSOLUTE_FORM = re.compile(r"^https?://[^/?#]*", re.IGNORECASE)
"""Scheme and authority of a request target in absolute form (RFC 9112 section 3.2.2)."""

# One member of `Signature-Input` in canonical form (RFC 8941). No string may hold a semicolon, because the parameters
# are split there.
_NAME = r"[a-z*][a-z0-9_.*-]*+"
_COMPONENT = rf"\"@?[a-z0-9!#$%&'*+.^_`|~-]++\"(?:;{_NAME}(?:=\"{_NAME}\")?+)*+"
_INTEGER, _STRING = r"(?:0|-?[1-9][0-9]{0,14})", r'"[ !#-:<-\[\]-~]*+"'
_PARAMETER = rf';(?:(?:created|expires)={_INTEGER}|(?:keyid|tag|nonce)={_STRING}|alg="hmac-sha256")'
_MEMBER = re.compile(rf"({_NAME})=(\(({_COMPONENT}(?: {_COMPONENT})*+)\)((?:{_PARAMETER})++))")
_PART = r'(?:[^",]|"(?:[^"\\]|\\.)*+")++'
_PARTS = re.compile(rf"{_PART}(?:,{_PART})*+")
_FIELD_VALUE = re.compile(r"[\t -~]*+")
_CHARSET = re.compile(r";\s*charset=[^;]*$", re.IGNORECASE)


class MessageKind(Enum):
    """Purpose of a request. A signature for one kind is invalid for every other."""

    START = "bridge-start"
    CANCEL = "bridge-cancel"
    COMPLETION = "bridge-completion"
    ECHO = "bridge-echo"


@dataclass(frozen=True, kw_only=True)
class RequestProof:
    """The signature of one request. Both sides hold it, because the signature of the answer covers it."""

    key_id: str
    """Id of `key`."""
    key: bytes = field(repr=False)
    """The key that made the request's signature. The answer is signed and verified with the same key."""
    label: str
    """Label of the signature in the request."""
    signature: str = field(repr=False)
    """The signature as spelled in the request: a byte sequence with its colons."""

    def sign_answer(
        self, status: int, headers: CIMultiDict[str], body: bytes, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Add digest and signature to the *headers* of an answer. Change nothing in it afterwards.

        Raises:
            ValueError: A header cannot be signed, because its value is outside RFC 9421's grammar.
        """
        headers[REPR_DIGEST] = _digest(body)
        fields = _fields(headers)
        # A proxy that compresses the answer sets `Content-Encoding`. The signed body is the uncompressed one.
        read = sorted(
            each for each in fields if (_is_covered(each) and each != "content-encoding") or each == "retry-after"
        )
        components = ['"@status"', '"repr-digest"', self._component, *(f'"{name}"' for name in read)]
        _sign(headers, components, self._values(status, fields), self.key_id, self.key, tag=_ANSWER, now=clock())

    def verify_answer(self, status: int, headers: Mapping[str, str], body: bytes) -> CIMultiDict[str]:
        """Verify an answer to this request and return its covered headers, one line each.

        The time in the signature is not checked. The answer cannot be an old one, because its signature covers the
        signature of the request.

        Raises:
            UntrustedError: The answer is unsigned, signed for another request, or was changed on the way.
        """
        fields = _fields(headers)
        found = _find(fields, _ANSWER)
        if found.parameters["keyid"] != f'"{self.key_id}"':
            reason = f"answer signed with another key than {self.key_id!r}, which signed the request"
            raise UntrustedError(reason)
        required = {"@status", "repr-digest", _identity(self._component)}
        found.require(required | {"content-type"} if body else required)
        values = self._values(status, fields)
        if not found.holds(self.key, values):
            # Some proxies add a charset to an answer, for example nginx with `charset_types application/json`.
            values["content-type"] = _CHARSET.sub("", values.get("content-type", ""))
            if not found.holds(self.key, values):
                reason = "answer's signature does not hold: a covered value was changed, or it is for another request"
                raise UntrustedError(reason)
        _check_digest(values["repr-digest"], body)
        return found.covered(values)

    @property
    def _component(self) -> str:
        return f'"signature";req;key="{self.label}"'

    def _values(self, status: int, fields: Mapping[str, list[str]]) -> dict[str, str]:
        return _joined(fields) | {"@status": str(status), _identity(self._component): self.signature}


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The part of a request that its sender has signed."""

    headers: Mapping[str, str]
    """Covered headers only, one line each, case-insensitive."""
    proof: RequestProof
    """Signs the answer to the request."""
    skew_s: int
    """Seconds from the time in the signature to our time. A sender whose clock is ahead makes it negative."""

    def check_body(self, body: bytes) -> None:
        """Compare *body*, as received, with the signed digest.

        Raises:
            UntrustedError: *body* is not the signed one.
        """
        _check_digest(self.headers[REPR_DIGEST], body)


class MessageSigner:
    """Signs the requests of one side to one peer."""

    def __init__(self, keys: KeySource, *, clock: Callable[[], float] = time.time) -> None:
        self._keys = keys
        self._clock = clock

    def sign(
        self, kind: MessageKind, url: str, headers: CIMultiDict[str], body: bytes, *, more: Iterable[str] = ()
    ) -> RequestProof:
        """Add digest and signature to the *headers* of a POST. Change nothing in it afterwards.

        *more* names further headers that the other side uses: the headers of the caller's workflow, and the callback
        headers. The result verifies the answer.

        Raises:
            ValueError: The message cannot be signed, because a header is repeated, or because a value or the URL is
                outside RFC 9421's grammar.
        """
        headers[REPR_DIGEST] = _digest(body)
        fields = _fields(headers)
        components = [f'"{name}"' for name in _required(fields, more)]
        values = _joined(fields) | _derived("POST", url)
        keys = self._keys()
        key_id, key = keys.signing, keys.raw()[keys.signing]
        signature = _sign(headers, components, values, key_id, key, tag=kind.value, now=self._clock())
        return RequestProof(key_id=key_id, key=key, label=_LABEL, signature=signature)


class MessageVerifier:
    """Verifies the requests of one peer."""

    def __init__(self, keys: KeySource, *, public_base: str, clock: Callable[[], float] = time.time) -> None:
        """*public_base* has scheme, authority and the prefix that a proxy strips. It comes from settings, not Host."""
        self._base = public_base.rstrip("/")
        self._prefix = urlsplit(self._base).path
        self._keys = keys
        self._clock = clock

    def verify(self, kind: MessageKind, *, method: str, raw_path: str, headers: Mapping[str, str]) -> Verified:
        """Check the signature over the headers. Afterwards check the body with `check_body` of the result.

        *raw_path* is the request target, in origin or in absolute form. The authority of an absolute one is ignored,
        because the signature does not cover it; the same holds for `Host`.

        Raises:
            UntrustedError: The signature is missing or invalid. `reason` names the check that failed.
        """
        # nginx decodes brackets when it strips a prefix, and does not encode them again. A sender always encodes them.
        raw_path = ABSOLUTE_FORM.sub("", raw_path).replace("[", "%5B").replace("]", "%5D")
        if not raw_path.startswith("/"):
            reason = "request target is not a path"
            raise UntrustedError(reason)
        fields = _fields(headers)
        found = _find(fields, kind.value)
        key_id = found.parameters["keyid"].strip('"')
        # With an unknown key id do the same work, so that timing does not reveal the key ids of a peer.
        keys = self._keys().raw()
        key = keys.get(key_id, _NO_KEY)
        skew_s = self._check_time(found)
        try:
            required = _required(fields, ())
            values = _joined(fields) | _derived(method, self._base + raw_path)
        except ValueError as error:
            raise UntrustedError(str(error)) from None
        found.require(required)
        if not found.holds(key, values):
            reason = f"signature does not hold: another key {key_id!r}, or method, path, query or a header was changed"
            if key is _NO_KEY:
                reason = f"no key of the request's key id (known here: {', '.join(keys)})"
            if found.holds(key, values | {"@path": values["@path"].removeprefix(self._prefix)}):
                reason = f"the sender signed the path without the prefix {self._prefix} of our public URL"
            raise UntrustedError(reason)
        proof = RequestProof(key_id=key_id, key=key, label=found.label, signature=found.signature)
        return Verified(headers=found.covered(values), proof=proof, skew_s=skew_s)

    def _check_time(self, found: "_Found") -> int:
        allowed, now = CLOCK_SKEW.total_seconds(), self._clock()
        created = int(found.parameters.get("created", "0"))
        if abs(now - created) > allowed:
            reason = f"signed {now - created:+.0f} s before our time; {allowed:.0f} s are allowed: compare the clocks"
            raise UntrustedError(reason)
        if int(found.parameters.get("expires", now)) < now - allowed:
            reason = "signature expired"
            raise UntrustedError(reason)
        return int(now - created)


class _Found(NamedTuple):
    """The only signature of a message with the tag that was looked for."""

    label: str
    components: Mapping[str, str]
    """Components as spelled in the message, by name with sorted parameters."""
    parameters: Mapping[str, str]
    text: str
    """Components and parameters as spelled in the message: the value of `@signature-params`."""
    signature: str

    def require(self, names: Iterable[str]) -> None:
        missing = sorted(set(names) - self.components.keys())
        if missing:
            reason = f"not covered by the signature: {', '.join(missing)}"[:200]
            raise UntrustedError(reason)

    def holds(self, key: bytes, values: Mapping[str, str]) -> bool:
        """Whether the signature is valid for *values*.

        Raises:
            UntrustedError: A covered value is missing or cannot be signed.
        """
        try:
            expected = _mac(key, self.components, values, self.text)
        except ValueError as error:
            raise UntrustedError(str(error)) from None
        # Compare texts, because a byte sequence has one accepted spelling.
        return hmac.compare_digest(expected, self.signature)

    def covered(self, values: Mapping[str, str]) -> CIMultiDict[str]:
        return CIMultiDict({name: values[name] for name in self.components if not set(name) & set("@;")})


def _fields(headers: Mapping[str, str]) -> dict[str, list[str]]:
    # The multidicts of aiohttp have one item for each header line.
    fields: dict[str, list[str]] = {}
    for name, value in headers.items():
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    return fields


def _joined(fields: Mapping[str, list[str]]) -> dict[str, str]:
    # RFC 9421 section 2.1.
    return {name: ", ".join(lines) for name, lines in fields.items()}


def _derived(method: str, url: str) -> dict[str, str]:
    """The components that are not headers (RFC 9421 section 2.2).

    Raises:
        ValueError: *url* is not an absolute URL, or it has a fragment. Libraries and routers differ on fragments.
    """
    found = _URL.fullmatch(url)
    if found is None:
        message = "message cannot be signed: its URL is malformed"
        raise ValueError(message)
    default = {"http": ":80", "https": ":443"}[found[1]]
    authority = found[2].lower().removesuffix(default)
    return {"@method": method, "@authority": authority, "@path": found[3] or "/", "@query": f"?{found[4] or ''}"}


def _is_covered(name: str) -> bool:
    # `Content-Length` is not covered, because it belongs to the connection and not to the message.
    return name.startswith(_PREFIXES) and name != "content-length"


def _required(fields: Mapping[str, list[str]], more: Iterable[str]) -> tuple[str, ...]:
    """The components that the signature of a request must cover.

    Raises:
        ValueError: A covered header is repeated. Only a list may have several lines.
    """
    named = {name.lower() for name in more}
    names = sorted(name for name in fields if _is_covered(name) or name in _ACTED_UPON | named)
    for name in names:
        if len(fields[name]) > 1 and name not in _LISTS:
            message = "message cannot be signed: repeated header"
            raise ValueError(message)
    return (*_ALWAYS, *names)


def _find(fields: Mapping[str, list[str]], tag: str) -> _Found:
    """The signature tagged *tag*. Signatures with other tags, for example of gateways, are ignored.

    Raises:
        UntrustedError: There is no such signature, more than one, or a malformed one.
    """
    inputs, signatures = (_parts(fields, name) for name in (SIGNATURE_INPUT, SIGNATURE))
    ours = [part for part in inputs if f';tag="{tag}"' in part]
    if len(ours) != 1:
        reason = f"{len(ours) or 'no'} signatures tagged {tag}"
        raise UntrustedError(reason)
    found = _MEMBER.fullmatch(ours[0])
    reason = f"signature tagged {tag} is malformed"
    if found is None:
        raise UntrustedError(reason)
    label, text, components, parameters = found[1], found[2], found[3].split(" "), found[4][1:].split(";")
    spelled = {_identity(each): each for each in components}
    named = dict(each.split("=", 1) for each in parameters)
    labelled = [[part for part in parts if part.startswith(f"{label}=")] for parts in (inputs, signatures)]
    counts = [*map(len, (*labelled, spelled, named))]
    if counts != [1, 1, len(components), len(parameters)] or "keyid" not in named:
        raise UntrustedError(reason)
    return _Found(label, spelled, named, text, labelled[1][0].removeprefix(f"{label}="))


def _parts(fields: Mapping[str, list[str]], name: str) -> list[str]:
    lines = fields.get(name.lower(), [])
    if len(lines) != 1 or len(lines[0]) > _LIMITS[name] or not lines[0].isascii() or not _PARTS.fullmatch(lines[0]):
        reason = f"{name} missing, repeated or malformed"
        raise UntrustedError(reason)
    return [part.strip(" \t") for part in re.findall(_PART, lines[0])]


def _identity(component: str) -> str:
    """Name and sorted parameters. The order of parameters has no meaning (RFC 9421 section 2)."""
    name, *parameters = component.split(";")
    return ";".join([name.strip('"'), *sorted(parameters)])


def _digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def _check_digest(digest: str, body: bytes) -> None:
    if not hmac.compare_digest(digest.encode(errors="replace"), _digest(body).encode()):
        reason = "the body's digest differs: the body was changed on the way"
        raise UntrustedError(reason)


def _sign(
    headers: CIMultiDict[str],
    components: Iterable[str],
    values: Mapping[str, str],
    key_id: str,
    key: bytes,
    *,
    tag: str,
    now: float,
) -> str:
    spelled = {_identity(each): each for each in components}
    text = f'({" ".join(spelled.values())});created={int(now)};keyid="{key_id}";tag="{tag}"'
    signature = _mac(key, spelled, values, text)
    headers[SIGNATURE_INPUT] = f"{_LABEL}={text}"
    headers[SIGNATURE] = f"{_LABEL}={signature}"
    return signature


def _mac(key: bytes, components: Mapping[str, str], values: Mapping[str, str], parameters: str) -> str:
    """The signature over RFC 9421's signature base, as a byte sequence.

    Raises:
        ValueError: A component is missing, or its value cannot be signed. The text names the component only.
    """
    lines = []
    for name, spelled in components.items():
        value = values.get(name)
        if value is None or not _FIELD_VALUE.fullmatch(value):
            message = f"{name} is covered, but missing"
            if value is not None:
                message = f"message cannot be signed: {name} is not printable ASCII"
            raise ValueError(message)
        lines.append(f"{spelled}: {value}")
    lines.append(f'"@signature-params": {parameters}')
    mac = hmac.digest(key, "\n".join(lines).encode(), "sha256")
    return f":{base64.b64encode(mac).decode()}:"
