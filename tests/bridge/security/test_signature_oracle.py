"""Our signatures compared with an RFC 9421 library: both accept the same messages, and each accepts the other's."""

import base64
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from http_message_signatures import HTTPMessageSigner, MappingKeyResolver, algorithms
from multidict import CIMultiDict

from bridge.security import signatures
from bridge.security.signatures import MessageKind
from tests.support.oracle import BASE, KEY_SET, PATH, answer, ours, request, signed_by_library, theirs, verdicts
from tests.support.oracle import spelling as spelling_of


@pytest.mark.parametrize("seed", range(4))
def test_the_library_and_our_code_accept_the_same_messages(seed: int) -> None:
    """Of many spoilt requests and answers. Where the two differ, the form is one that the library would not write.

    `python -m tests.support.oracle 200000` does the same at length.
    """
    counts, differing = verdicts(600, seed)
    assert sum(counts.values()) == 600
    for who, sample in differing:
        assert spelling_of(sample) is not None, (who, sample)


def test_each_accepts_what_the_other_has_signed() -> None:
    """Requests and answers; in the order of parameters that Go's libraries write, too."""
    for sample in (request(), answer()):
        assert ours(sample) is not None
        assert theirs(sample)
    headers = CIMultiDict({"Nexus-Request-Id": "7", "Content-Type": "application/json"})
    signed_by_library(headers, b"{}", ["@method", "@path", "@query", "repr-digest", "content-type", "nexus-request-id"])
    verified = signatures.MessageVerifier(KEY_SET, public_base=BASE).verify(
        MessageKind.START, method="POST", raw_path=PATH, headers=headers
    )
    answered = SimpleNamespace(method="POST", url=BASE + PATH, headers=headers)
    for component in ('"signature";req;key="bridge"', '"signature";key="bridge";req'):
        answer_headers = CIMultiDict({"Content-Type": "application/json", "Nexus-Operation-State": "succeeded"})
        covered = ["@status", "repr-digest", component, "content-type", "nexus-operation-state"]
        signed_by_library(answer_headers, b"{}", covered, answered)
        assert verified.proof.verify_answer(200, answer_headers, b"{}")["Nexus-Operation-State"] == "succeeded"


def test_our_signature_base_is_the_one_that_the_rfc_prints() -> None:
    """RFC 9421, B.2.5."""
    key = base64.b64decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
    values = signatures._derived("POST", "https://example.com/foo?param=Value&Pet=dog") | {
        "date": "Tue, 20 Apr 2021 02:07:55 GMT",
        "content-type": "application/json",
    }
    components = {name: f'"{name}"' for name in ("date", "@authority", "content-type")}
    parameters = '("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"'
    made = signatures._mac(key, components, values, parameters)
    assert made == ":pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:"


def test_the_library_makes_the_signature_that_the_rfc_prints() -> None:
    """RFC 9421, B.2.5: what others sign by the same standard, we verify, and the other way round."""
    key = base64.b64decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
    headers = CIMultiDict({"Date": "Tue, 20 Apr 2021 02:07:55 GMT", "Content-Type": "application/json"})
    HTTPMessageSigner(
        signature_algorithm=algorithms.HMAC_SHA256,
        key_resolver=MappingKeyResolver(private_keys={"test-shared-secret": key}, public_keys={}),
    ).sign(
        SimpleNamespace(method="POST", url="https://example.com/foo?param=Value&Pet=dog", headers=headers),
        key_id="test-shared-secret",
        created=datetime.fromtimestamp(1618884473, UTC),
        label="sig-b25",
        include_alg=False,
        covered_component_ids=["date", "@authority", "content-type"],
    )
    assert headers["Signature"] == "sig-b25=:pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=:"
