"""Message signatures (RFC 9421): a peer's proof that it wrote a start, a cancel or a completion.

The signature covers method, path, query, the body's digest and every header that is acted upon; the verifier computes
that list itself, from the message, and afterwards hands out covered values only. The digest travels as `Repr-Digest`,
because to Nexus every `Content-…` header would describe the payload. Sans-I/O: sign last, verify first.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import NamedTuple, Protocol

from http_message_signatures import (
    ContentDigest,
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    MappingKeyResolver,
    VerifyResult,
    algorithms,
)
from multidict import CIMultiDict

from bridge.errors import UntrustedError
from bridge.security.clocks import CLOCK_SKEW
from bridge.security.keys import KeyRing

REPR_DIGEST = "Repr-Digest"
SIGNATURE = "Signature"
SIGNATURE_INPUT = "Signature-Input"

_ALWAYS = ("@method", "@path", "@query", "repr-digest")
_PREFIXES = ("nexus-", "content-", "bridge-")
_ACTED_UPON = frozenset({"operation-timeout", "request-timeout", "prefer"})
_AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
"""What a request target in absolute form has before its path (RFC 9112 section 3.2.2)."""
_LIMITS = {SIGNATURE_INPUT: 4096, SIGNATURE: 512, REPR_DIGEST: 512}


class MessageKind(Enum):
    """What a message is for; no kind's signature passes as another's."""

    START = "bridge-start"
    CANCEL = "bridge-cancel"
    COMPLETION = "bridge-completion"


class Headers(Protocol):
    """What is needed of aiohttp's multidicts."""

    def getall(self, key: str, default: list[str]) -> list[str]: ...
    def keys(self) -> Iterable[str]: ...
    def items(self) -> Iterable[tuple[str, str]]: ...


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The part of a message that its sender vouches for."""

    headers: Mapping[str, str]
    """Covered headers only, one line each, case-insensitive."""
    digest: str

    def check_body(self, body: bytes) -> None:
        """Compare *body*, as it came, with the signed digest.

        Raises:
            UntrustedError: It is another body.
        """
        try:
            ContentDigest.verify(self.digest, body)
        except (HTTPMessageSignaturesException, ValueError):
            reason = "body digest differs"
            raise UntrustedError(reason) from None


class _Message(NamedTuple):
    method: str
    url: str
    headers: Headers | CIMultiDict[str]


class _Verifier(HTTPMessageVerifier):
    # Five minutes to both sides: with max_age 0 the library allows exactly the skew.
    max_clock_skew: timedelta = CLOCK_SKEW


class MessageSigner:
    """Signs as one side of one pair of peers."""

    def __init__(self, ring: KeyRing) -> None:
        self._key_id = ring.signing
        keys = ring.raw()
        self._signer = HTTPMessageSigner(
            signature_algorithm=algorithms.HMAC_SHA256,
            key_resolver=MappingKeyResolver(private_keys=keys, public_keys={}),
        )

    def sign(
        self, kind: MessageKind, url: str, headers: CIMultiDict[str], body: bytes, *, more: Iterable[str] = ()
    ) -> None:
        """Add digest and signature to *headers*, last before sending.

        *more* names further headers that the other side acts upon: the caller's own, those a callback asked for.

        Raises:
            ValueError: The message cannot be signed: a repeated header, a value or a URL outside RFC 9421's grammar.
        """
        headers[REPR_DIGEST] = ContentDigest.create(body)
        try:
            self._signer.sign(
                _Message("POST", url, headers),
                key_id=self._key_id,
                label="bridge",
                tag=kind.value,
                include_alg=False,
                covered_component_ids=_covered(headers, more),
            )
        except HTTPMessageSignaturesException:
            # Its text quotes the URL or the header.
            message = "message cannot be signed"
            raise ValueError(message) from None


class MessageVerifier:
    """Verifies what one peer signed."""

    def __init__(self, ring: KeyRing, *, public_base: str) -> None:
        """*public_base* is scheme, authority and stripped prefix as the peer sees them: from settings, never Host."""
        self._base = public_base.rstrip("/")
        self._verifier = _Verifier(
            signature_algorithm=algorithms.HMAC_SHA256,
            key_resolver=MappingKeyResolver(private_keys={}, public_keys=ring.raw()),
        )

    def verify(self, kind: MessageKind, *, method: str, raw_path: str, headers: Headers) -> Verified:
        """Check the signature over the headers; the body is checked by the result.

        *raw_path* is the request target, in origin or in absolute form. The authority of an absolute one is ignored:
        like `Host` it is not part of the signature.

        Raises:
            UntrustedError: Whatever is wrong with it.
        """
        for name, limit in _LIMITS.items():
            lines = headers.getall(name, [])
            if len(lines) != 1 or len(lines[0]) > limit or not lines[0].isascii():
                reason = f"{name} missing, repeated or malformed"
                raise UntrustedError(reason)
        if absolute := _AUTHORITY.match(raw_path):
            raw_path = raw_path[absolute.end() :]
        # Of `/op#?callback=x` the library would take `/op`, the router `/op#`.
        if not raw_path.startswith("/") or "#" in raw_path:
            reason = "request target malformed"
            raise UntrustedError(reason)
        try:
            required = _covered(headers, ())
            [result] = self._verifier.verify(
                _Message(method, self._base + raw_path, headers),
                max_age=timedelta(0),
                expect_tag=kind.value,
                require_components=required,
            )
        except (HTTPMessageSignaturesException, ValueError, TypeError, KeyError):
            reason = "signature does not hold"
            raise UntrustedError(reason) from None
        return _verified(result)


def _verified(result: VerifyResult) -> Verified:
    covered = {name.strip('"'): value for name, value in result.covered_components.items()}
    headers = {name: value for name, value in covered.items() if not name.startswith("@") and ";" not in name}
    return Verified(headers=CIMultiDict(headers), digest=headers["repr-digest"])


def _covered(headers: Headers | CIMultiDict[str], more: Iterable[str]) -> tuple[str, ...]:
    """The components to sign, or the least to require. `Content-Length` belongs to the connection, not the message."""
    lines = [name.lower() for name, _ in headers.items()]
    further = {name.lower() for name in more}
    names = [name for name in lines if name.startswith(_PREFIXES) or name in _ACTED_UPON or name in further]
    if len(names) != len(set(names)):
        # Repeated lines are signed as one joined value, but read as the first: one line per name.
        message = "repeated header"
        raise ValueError(message)
    return (*_ALWAYS, *sorted(set(names) - {"content-length"}))
