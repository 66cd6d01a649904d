"""Real exchanges of messages, as they were on the wire, and the form in which docs/protocol.md shows them.

Values that differ from run to run (ids, times, tokens, addresses) are replaced by stable values of the same form. Then
digests and signatures are made again with the keys that the document prints, over the components that were really
signed. Therefore the examples are test vectors for authors of a peer.
"""

import base64
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import quote

from aiohttp import web
from aiohttp.typedefs import Handler
from http_message_signatures import ContentDigest, HTTPMessageSigner, MappingKeyResolver, algorithms
from multidict import CIMultiDict

from examples.plain.signatures import decode_key
from scripts.environment.stack import ROOT
from tests.support.world import Listener, World

SIGNED_AT = datetime(2026, 11, 23, 14, 39, 21, tzinfo=UTC)
OPENAPI = {
    name: ROOT / "docs" / "openapi" / f"{file}.json" for name, file in (("service", "handler"), ("receiver",) * 2)
}
"""The documents that describe the services, by the name of the service's listener."""

KEYS = {
    "bridge-start": "ZXhhbXBsZS1vZi1hLWtleS10aGF0LXNpZ25zLXN0YXJ0cyE",
    "bridge-cancel": "ZXhhbXBsZS1vZi1hLWtleS10aGF0LXNpZ25zLXN0YXJ0cyE",
    "bridge-completion": "ZXhhbXBsZS1rZXktdGhhdC1zaWducy1jb21wbGV0aW9ucyE",
}
"""The keys in the document, by the signature's tag."""

_HIDDEN = {
    *("accept", "accept-encoding", "connection", "content-length", "date", "server"),
    *("transfer-encoding", "user-agent"),
}
"""Headers without a meaning in this protocol."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One request, or one answer."""

    first_line: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for each, value in self.headers if each.lower() == name.lower()), "")

    def text(self) -> str:
        lines = [self.first_line, *(f"{name}: {value}" for name, value in self.headers if name.lower() not in _HIDDEN)]
        return "\n".join([*lines, *(["", self.body.decode()] if self.body else [])])


@dataclass(frozen=True, kw_only=True)
class Exchange:
    route: str
    request: Message
    answer: Message

    @property
    def status(self) -> int:
        return int(self.answer.first_line.split()[1])

    def text(self) -> str:
        return f"{self.request.text()}\n\n{self.answer.text()}\n"


@web.middleware
async def _keep_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    # The service reads a clone of the request. The request keeps its body only if it is read first.
    await request.read()
    return await handler(request)


class Recorder:
    """Records the exchanges of one or more services."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def attach(self, listener: Listener) -> None:
        """Record the exchanges of *listener*; call it before the listener is started."""
        make = listener._make

        def make_and_record() -> web.Application:
            app = make()
            app.middlewares.insert(0, _keep_body)
            app.on_response_prepare.append(self._record)
            return app

        listener._make = make_and_record

    async def _record(self, request: web.Request, response: web.StreamResponse) -> None:
        assert isinstance(response, web.Response)
        resource = request.match_info.route.resource
        body = response.body
        assert body is None or isinstance(body, bytes)
        phrase = response.reason or HTTPStatus(response.status).phrase
        self.exchanges.append(
            Exchange(
                route="" if resource is None else resource.canonical,
                request=Message(
                    first_line=f"{request.method} {request.raw_path} HTTP/1.1",
                    headers=tuple(request.headers.items()),
                    body=await request.read(),
                ),
                answer=Message(
                    first_line=f"HTTP/1.1 {response.status} {phrase}",
                    headers=tuple(response.headers.items()),
                    body=body or b"",
                ),
            )
        )


class Stable:
    """Replaces the values that differ from run to run; equal values get equal replacements."""

    def __init__(self, worlds: Iterable[World]) -> None:
        self._known: dict[str, str] = {}
        for world in worlds:
            for url, name in ((world.service.url, "payments"), (world.receiver.url, "orders")):
                host, shown = url.removeprefix("http://"), f"https://{name}.example"
                self._known |= {url: shown, quote(url, safe=""): quote(shown, safe=""), host: f"{name}.example"}
            self._known |= {f"{world.id}-": "", world.id: ""}
        self._counts: dict[str, int] = {}

    def exchange(self, exchange: Exchange) -> Exchange:
        request = _signed_again(self._message(exchange.request))
        return replace(
            exchange, request=request, answer=_signed_again(self._message(exchange.answer), answered=request)
        )

    def _message(self, message: Message) -> Message:
        return replace(
            message,
            first_line=self._text(message.first_line),
            headers=tuple((name, self._header(name, value)) for name, value in message.headers),
            body=self._text(_without_stacks(message.body).decode()).encode(),
        )

    def _header(self, name: str, value: str) -> str:
        match name.lower():
            case "operation-timeout":
                # The remaining time is hours. The milliseconds that the message took are rounded off.
                hours = round(int(value.removesuffix("ms")) / 3_600_000)
                return f"{hours * 3_600_000}ms"
            case "signature" | "signature-input" | "repr-digest":
                return value
            case "authorization":
                return value.partition(" ")[0] + " SECRET"
            case "nexus-operation-token":
                self._learn(value, "operation token")
                return self._text(value)
            case "bridge-token" | "nexus-callback-bridge-token":
                self._learn(value, "callback token")
                return self._text(value)
            case _:
                return self._text(value)

    def _text(self, text: str) -> str:
        for pattern, kind in _PATTERNS:
            for found in re.findall(pattern, text):
                self._learn(found, kind)
        for real, shown in sorted(self._known.items(), key=lambda pair: -len(pair[0])):
            text = text.replace(real, shown)
        return re.sub(r'"data":"([A-Za-z0-9+/]+=*)"', self._payload, text)

    def _payload(self, found: re.Match[str]) -> str:
        data = self._text(base64.b64decode(found[1]).decode()).encode()
        return f'"data":"{base64.b64encode(data).decode()}"'

    def _learn(self, found: str, kind: str) -> None:
        if found not in self._known and found not in self._known.values():
            number = self._counts[kind] = self._counts.get(kind, 0) + 1
            self._known[found] = _SHOWN[kind].format(n=number)


_PATTERNS = (
    (r"sig(?:=|%3D)([A-Za-z0-9._-]{60,})", "callback token"),
    (r'"token":"([^"]+)"', "operation token"),
    (r"callbacks(?:/|%2F)([A-Za-z0-9_-]{22})\b", "callback id"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "uuid"),
    (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", "instant"),
    (r"\b\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", "date"),
)
_SHOWN = {
    "callback token": "eyJ2IjoxLCJpZCI6IkFBQUFB.callback-token-{n}",
    "operation token": "MDE5YWM3ZTUt.operation-token-{n}",
    "callback id": "callback-id-00000000{n:02d}",
    "uuid": "019ac7e5-0000-7000-8000-0000000000{n:02d}",
    "instant": "2026-11-23T14:39:20.104Z",
    "date": "Mon, 23 Nov 2026 14:39:20 GMT",
}


def _without_stacks(body: bytes) -> bytes:
    """*body* without its stack traces, which name files and lines; otherwise byte for byte."""
    if b"tackTrace" not in body:
        return body
    return json.dumps(_cut(json.loads(body)), separators=(",", ":"), ensure_ascii=False).encode()


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "…" if key == "stackTrace" else _cut(each) for key, each in value.items()}
    return [_cut(each) for each in value] if isinstance(value, list) else value


class LibraryRequest(NamedTuple):
    """A request in the form that the RFC 9421 library reads."""

    method: str
    url: str
    headers: CIMultiDict[str]

    @classmethod
    def of(cls, message: Message) -> "LibraryRequest":
        method, target, _ = message.first_line.split(" ")
        return cls(method, f"https://{message.header('Host')}{target}", CIMultiDict(message.headers))


class LibraryAnswer(NamedTuple):
    """An answer in the form that the RFC 9421 library reads."""

    status_code: int
    headers: CIMultiDict[str]
    request: LibraryRequest

    @classmethod
    def of(cls, message: Message, request: Message) -> "LibraryAnswer":
        status = int(message.first_line.split(" ")[1])
        return cls(status, CIMultiDict(message.headers), LibraryRequest.of(request))


def key_of(request: Message) -> bytes:
    """The document's key for *request*, and for the answer to it."""
    [tag] = re.findall(r'tag="([a-z-]+)"', request.header("Signature-Input"))
    return decode_key(KEYS[tag])


def _signed_again(message: Message, answered: Message | None = None) -> Message:
    signature_input = message.header("Signature-Input")
    if not signature_input:
        return message
    [components, tag] = re.findall(r'^bridge=\(([^)]*)\).*tag="([a-z-]+)"', signature_input)[0]
    own = {"signature", "signature-input"}
    bare = replace(message, headers=tuple((name, value) for name, value in message.headers if name.lower() not in own))
    signed: LibraryRequest | LibraryAnswer
    signed = LibraryRequest.of(bare) if answered is None else LibraryAnswer.of(bare, answered)
    signed.headers["Repr-Digest"] = ContentDigest.create(message.body)
    HTTPMessageSigner(
        signature_algorithm=algorithms.HMAC_SHA256,
        key_resolver=MappingKeyResolver(private_keys={"k1": key_of(answered or message)}, public_keys={}),
    ).sign(
        signed,
        key_id="k1",
        created=SIGNED_AT,
        label="bridge",
        tag=tag,
        include_alg=False,
        covered_component_ids=components.split(" "),
    )
    return replace(message, headers=tuple(signed.headers.items()))


@dataclass
class Page:
    """A document with exchanges, each in a fenced block below a comment that names it."""

    text: str
    _block: re.Pattern[str] = field(
        default=re.compile(r"(<!-- exchange: ([a-z0-9 -]+) -->\n```http\n)(.*?)(```\n)", re.DOTALL), init=False
    )

    def exchanges(self) -> Iterator[tuple[str, str]]:
        """Name and text of each exchange, in order."""
        for found in self._block.finditer(self.text):
            yield found[2], found[3]

    def with_exchanges(self, texts: dict[str, str]) -> str:
        return self._block.sub(lambda found: found[1] + texts[found[2]] + found[4], self.text)
