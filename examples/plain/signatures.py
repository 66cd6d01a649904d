"""The protocol's signatures by the library alone: nothing of the bridge, nothing of Temporal.

For curl, `python -m examples.plain.signatures KIND URL BODY [HEADER …]` prints the headers with the proof added; the
key comes from the variable START_KEY, base64url, and is known to the other side as `k1`.
"""

import base64
import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple

from http_message_signatures import (
    ContentDigest,
    HTTPMessageSignaturesException,
    HTTPMessageSigner,
    HTTPMessageVerifier,
    MappingKeyResolver,
    algorithms,
)
from multidict import CIMultiDict, CIMultiDictProxy

KEY_ID = "k1"

Headers = CIMultiDict[str] | CIMultiDictProxy[str]


class _Message(NamedTuple):
    method: str
    url: str
    headers: Headers


class _Answer(NamedTuple):
    status_code: int
    headers: Headers
    request: _Message


class _Verifier(HTTPMessageVerifier):
    max_clock_skew = timedelta(minutes=5)


def covered(headers: Headers) -> tuple[str, ...]:
    """The components that a signature over *headers* must cover, independent of what it claims to cover."""
    names = [name.lower() for name, _ in headers.items()]
    if len(names) != len(set(names)):
        message = "repeated header"
        raise ValueError(message)
    return ("@method", "@path", "@query", "repr-digest", *sorted(name for name in names if _is_acted_upon(name)))


def sign(kind: str, url: str, headers: CIMultiDict[str], body: bytes, *, key: bytes) -> None:
    """Add digest and signature to *headers*, last before sending."""
    headers["Repr-Digest"] = ContentDigest.create(body)
    signer = HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=_keys(key))
    signer.sign(
        _Message("POST", url, headers),
        key_id=KEY_ID,
        label="bridge",
        tag=kind,
        include_alg=False,
        covered_component_ids=covered(headers),
    )


def is_signed(kind: str, raw_path: str, headers: Headers, body: bytes, *, key: bytes) -> bool:
    """Whether the holder of *key* wrote this POST, within five minutes. *raw_path* is path and query as they came."""
    verifier = _Verifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=_keys(key))
    message = _Message("POST", f"https://any{raw_path}", headers)
    try:
        ContentDigest.verify(headers["Repr-Digest"], body)
        verifier.verify(message, max_age=timedelta(0), expect_tag=kind, require_components=covered(headers))
    except (HTTPMessageSignaturesException, ValueError, KeyError, TypeError):
        return False
    return True


def sign_answer(
    raw_path: str, asked: Headers, status: int, headers: CIMultiDict[str], body: bytes, *, key: bytes
) -> None:
    """Add digest and signature to the *headers* of the answer to a POST whose signature, made with *key*, has held.

    An answer without them counts as one of a proxy. *asked* are the headers of the request.
    """
    headers["Repr-Digest"] = ContentDigest.create(body)
    read = sorted(name.lower() for name in headers if _is_acted_upon(name.lower()) or name.lower() == "retry-after")
    HTTPMessageSigner(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=_keys(key)).sign(
        _Answer(status, headers, _Message("POST", f"https://any{raw_path}", asked)),
        key_id=KEY_ID,
        label="bridge",
        tag="bridge-answer",
        include_alg=False,
        covered_component_ids=("@status", "repr-digest", '"signature";req;key="bridge"', *read),
    )


def decode_key(text: str) -> bytes:
    """The key that `callback-bridge keys new` prints."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _keys(key: bytes) -> MappingKeyResolver:
    return MappingKeyResolver(private_keys={KEY_ID: key}, public_keys={KEY_ID: key})


def _is_acted_upon(name: str) -> bool:
    if name.startswith(("nexus-", "content-", "bridge-")):
        return name != "content-length"
    return name in {"operation-timeout", "request-timeout", "prefer"}


def _print_signed(kind: str, url: str, body: str, lines: Iterable[str]) -> None:
    headers = CIMultiDict((name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    sign(kind, url, headers, body.encode(), key=decode_key(os.environ["START_KEY"]))
    for name, value in headers.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    _print_signed(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
