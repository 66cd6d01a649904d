"""docs/protocol.md and the OpenAPI documents agree with the messages that are sent."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from typing import Any

import jsonschema
import pytest_asyncio
from http_message_signatures import HTTPMessageVerifier, MappingKeyResolver, algorithms
from multidict import CIMultiDict

from bridge.security.keys import KeySet
from bridge.security.signatures import MessageKind, MessageVerifier
from examples.plain.signatures import decode_key, is_signed
from scripts.environment.server import Server
from tests.support.exchanges import KEYS, OPENAPI, SIGNED_AT, Exchange, LibraryAnswer, Message, Page, key_of
from tests.support.record_protocol import DOCUMENT, record

Recorded = tuple[dict[str, Exchange], dict[str, Exchange]]

PROOFS = {"repr-digest", "signature-input", "signature"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def recorded(server: Server) -> AsyncIterator[Recorded]:
    yield await record(server)


async def test_the_document_shows_the_messages_that_are_sent(recorded: Recorded) -> None:
    """The document has every exchange, and no other.

    After an intended change run `python -m tests.support.record_protocol`.
    """
    shown = {name: each.text() for name, each in recorded[1].items()}
    for name, text in Page(DOCUMENT.read_text()).exchanges():
        sent = shown.pop(name)
        assert sent == text, f"{name} differs; python -m tests.support.record_protocol writes it again"
    assert not shown, "recorded, but not in the document"


async def test_the_document_prints_the_keys_that_its_examples_are_signed_with(recorded: Recorded) -> None:
    """The examples are test vectors: recording replaced ids and times, and kept the covered components."""
    text = DOCUMENT.read_text()
    assert all(key in text for key in KEYS.values())
    signed = 0
    for real, shown in zip(recorded[0].values(), recorded[1].values(), strict=True):
        for part in ("request", "answer"):
            before, after = (getattr(each, part).header("Signature-Input") for each in (real, shown))
            assert re.sub(r"created=\d+", "", before) == re.sub(r"created=\d+", "", after)
            signed += bool(after)
            assert not after or f"created={int(SIGNED_AT.timestamp())};" in after
    assert signed > 30


async def test_the_examples_of_the_document_verify_with_our_code() -> None:
    """Every request and its answer verify with the document's keys at the document's time."""
    answers = 0
    for name, text in Page(DOCUMENT.read_text()).exchanges():
        asked, answered = messages(text)
        if not asked.header("Signature-Input"):
            continue
        [tag] = re.findall(r'tag="([a-z-]+)"', asked.header("Signature-Input"))
        key_set = KeySet.model_validate({"signing": "k1", "keys": {"k1": KEYS[tag]}})
        verifier = MessageVerifier(key_set, public_base=f"https://{asked.header('Host')}", clock=SIGNED_AT.timestamp)
        method, path, _ = asked.first_line.split(" ")
        verified = verifier.verify(MessageKind(tag), method=method, raw_path=path, headers=CIMultiDict(asked.headers))
        verified.check_body(asked.body)
        if answered.header("Signature-Input"):
            answers += 1
            status = int(answered.first_line.split(" ")[1])
            verified.proof.verify_answer(status, CIMultiDict(answered.headers), answered.body)
        else:
            assert "not authenticated" in name
    assert answers > 15


def messages(text: str) -> tuple[Message, Message]:
    """Request and answer of *text*, an exchange in the document's form."""
    request, _, answer = text.partition("\n\nHTTP/1.1 ")
    parts = []
    for each in (request, f"HTTP/1.1 {answer}".removesuffix("\n")):
        head, _, body = each.partition("\n\n")
        first_line, *lines = head.split("\n")
        headers = tuple((name, value) for name, _, value in (line.partition(": ") for line in lines))
        parts.append(Message(first_line=first_line, headers=headers, body=body.encode()))
    return parts[0], parts[1]


async def test_the_signature_bases_of_the_document_make_its_signatures() -> None:
    """With openssl only, the two scripts print the signatures of their exchange."""
    page = DOCUMENT.read_text()
    shown = next(text for name, text in Page(page).exchanges() if name == "start polled")
    asked, answered = messages(shown)
    for name, message in (("request", asked), ("answer", answered)):
        [script] = re.findall(rf"<!-- base: {name} -->\n```sh\n(.*?)```\n", page, re.DOTALL)
        process = await asyncio.create_subprocess_exec("bash", "-euc", script, stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        assert out.decode().split() == [message.header("Repr-Digest"), message.header("Signature")]


async def test_what_we_sign_verifies_without_our_code(recorded: Recorded, monkeypatch: Any) -> None:
    """Requests verify by the documented example, answers by the library, with the document's keys and time."""
    monkeypatch.setattr("examples.plain.signatures._Verifier.max_clock_skew", timedelta(days=36500))
    for exchange in recorded[1].values():
        request = exchange.request
        if tag := re.search(r'tag="([a-z-]+)"', request.header("Signature-Input")):
            path, headers = request.first_line.split(" ")[1], CIMultiDict(request.headers)
            assert is_signed(tag[1], path, headers, request.body, key=decode_key(KEYS[tag[1]]))
            assert not is_signed(tag[1], path, headers, request.body + b" ", key=decode_key(KEYS[tag[1]]))
        if exchange.answer.header("Signature-Input"):
            keys = MappingKeyResolver(private_keys={}, public_keys={"k1": key_of(request)})
            HTTPMessageVerifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=keys).verify(
                LibraryAnswer.of(exchange.answer, request), max_age=timedelta(days=36500), expect_tag="bridge-answer"
            )


async def test_every_exchange_is_as_the_openapi_documents_describe_it(recorded: Recorded) -> None:
    """Path, parameters, required headers, body, status, and the answer's headers and body match."""
    documents = {name: json.loads(path.read_text()) for name, path in OPENAPI.items()}
    for name, exchange in recorded[0].items():
        check(documents["receiver" if exchange.route.startswith("/callbacks") else "service"], exchange, name)


def check(document: Mapping[str, Any], exchange: Exchange, name: str) -> None:
    path = document["paths"][exchange.route]
    operation = path["post"]
    parameters = {each["name"].lower(): each for each in path["parameters"] + operation["parameters"]}
    sent = {header.lower(): value for header, value in exchange.request.headers}
    for parameter in parameters.values():
        value = sent.get(parameter["name"].lower()) if parameter["in"] == "header" else None
        if value is not None:
            is_valid(value, parameter["schema"], document, name)
        elif parameter["in"] == "header":
            assert not parameter["required"], f"{name}: {parameter['name']}"
    proofs = {
        scheme["name"].lower() for scheme in document["components"]["securitySchemes"].values() if "name" in scheme
    }
    for header in sent:
        assert header in parameters.keys() | proofs or not is_ours(header), f"{name}: {header} is not described"
    answers = operation["responses"]
    answer = answers.get(str(exchange.status)) or answers[f"{exchange.status // 100}XX"]
    assert exchange.answer.body == b"" or answer["content"], name
    described = {header.lower(): each["schema"] for header, each in answer["headers"].items()}
    for header, value in exchange.answer.headers:
        if is_ours(header.lower()):
            is_valid(value, described[header.lower()], document, name)
    if schema := answer["content"].get(media_type(exchange.answer), {}).get("schema"):
        is_valid(json.loads(exchange.answer.body), schema, document, name)


def is_ours(header: str) -> bool:
    names = {"operation-timeout", "request-timeout", "prefer", "retry-after"}
    return header.startswith(("nexus-", "bridge-")) or header in names | PROOFS


def media_type(message: Message) -> str:
    return message.header("Content-Type").partition(";")[0]


def is_valid(value: Any, schema: Mapping[str, Any], document: Mapping[str, Any], name: str) -> None:
    if schema.get("type") == "integer":
        value = int(value)
    # The references of the schema need the components in the same document.
    whole = {**schema, "components": document["components"]}
    errors = list(jsonschema.Draft202012Validator(whole).iter_errors(value))
    assert not errors, f"{name}: {errors[0].message}"
