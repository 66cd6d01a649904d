"""A peer that signs and sends the message of a test, correct or spoilt."""

import io
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from multidict import CIMultiDict
from temporalio.service import RPCError, RPCStatusCode
from yarl import URL

from bridge.errors import UntrustedError
from bridge.security.callback_tokens import CallbackTokens
from bridge.security.signatures import MessageKind, MessageSigner, RequestProof
from tests.support.helpers import CALLER, HANDLER
from tests.support.targets import Ask
from tests.support.world import World

Spoil = Callable[["Message"], None]

UNAUTHENTICATED = (
    b'{"message":"not authenticated","metadata":{"type":"nexus.HandlerError"},'
    b'"details":{"type":"UNAUTHENTICATED","retryableOverride":false}}'
)
"""The body of every 401."""


@dataclass
class Message:
    """One POST before and after it is signed."""

    url: str
    headers: CIMultiDict[str]
    body: bytes
    method: str = "POST"
    kind: MessageKind = MessageKind.START
    before_signing: list[Spoil] = field(default_factory=list)
    after_signing: list[Spoil] = field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    status: int
    headers: Any
    body: bytes
    proof: RequestProof | None = None

    @property
    def is_signed(self) -> bool:
        """Whether the service has signed the answer for this request."""
        if self.proof is None or "Signature" not in self.headers:
            return False
        try:
            self.proof.verify_answer(self.status, self.headers, self.body)
        except UntrustedError:
            return False
        return True

    @property
    def failure(self) -> dict[str, Any]:
        """The body of an error answer: a Failure, checked for its form."""
        assert self.headers["Content-Type"] == "application/json"
        failure: dict[str, Any] = json.loads(self.body)
        assert failure["metadata"]["type"] == "nexus.HandlerError"
        assert set(failure["details"]) == {"type", "retryableOverride"}
        return failure

    @property
    def type(self) -> str:
        return str(self.failure["details"]["type"])

    @property
    def message(self) -> str:
        return str(self.failure["message"])


async def send(message: Message, signer: MessageSigner | None) -> Answered:
    """Spoil, sign, spoil again, and send to exactly the URL of the message."""
    for spoil in message.before_signing:
        spoil(message)
    proof = None
    if signer is not None:
        proof = signer.sign(message.kind, message.url, message.headers, message.body)
    for spoil in message.after_signing:
        spoil(message)
    async with (
        aiohttp.ClientSession() as session,
        session.request(
            message.method,
            URL(message.url, encoded=True),
            headers=message.headers,
            data=io.BytesIO(message.body),
            skip_auto_headers=("Content-Type", "User-Agent"),
            allow_redirects=False,
        ) as response,
    ):
        return Answered(response.status, response.headers, await response.read(), proof)


def start(world: World, ask: dict[str, Any], *, request_id: str | None = None, operation: str = "probe") -> Message:
    """A correct start of the probe."""
    callback = f"{world.receiver.url}/callbacks/{'c' * 22}?sig=token"
    return Message(
        url=f"{world.service.url}/c/{CALLER}/ProbeService/{operation}?callback={quote(callback, safe='')}",
        headers=CIMultiDict(
            {
                "Content-Type": "application/json",
                "Nexus-Request-Id": request_id or secrets.token_hex(8),
                "Operation-Timeout": "60s",
                "Bridge-Scheduled-Time": datetime.now(UTC).isoformat(),
            }
        ),
        body=json.dumps(ask).encode(),
    )


def completion(
    world: World,
    *,
    workflow_id: str,
    run_id: str,
    request_id: str,
    state: str = "succeeded",
    body: bytes = b'{"text": "posted", "blob": ""}',
    target_run_id: str = "target-run",
    now: datetime | None = None,
    tokens: CallbackTokens | None = None,
) -> Message:
    """A correct completion of one waiting activity."""
    now = now or datetime.now(UTC)
    tokens = tokens or CallbackTokens(world.keys.callback, namespace=CALLER)
    callback_id = secrets.token_urlsafe(16)
    token = tokens.mint(
        callback_id=callback_id,
        peer=HANDLER,
        workflow_id=workflow_id,
        run_id=run_id,
        request_id=request_id,
        now=now,
        deadline=now + timedelta(hours=1),
    )
    url = f"{world.receiver.url}/callbacks/{callback_id}?sig={token}"
    link = f"temporal:///namespaces/{HANDLER}/workflows/target/{target_run_id}/history"
    query = "eventID=1&eventType=WorkflowExecutionStarted&referenceType=EventReference"
    return Message(
        url=url,
        headers=CIMultiDict(
            {
                "Content-Type": "application/json",
                "Nexus-Operation-State": state,
                "Nexus-Link": f'<{link}?{query}>; type="temporal.api.common.v1.Link.WorkflowEvent"',
            }
        ),
        body=body,
        kind=MessageKind.COMPLETION,
    )


def failure_body(message: str = "no", kind: str = "Declined") -> bytes:
    """A failure in the form of a target's worker."""
    return json.dumps(
        {
            "message": message,
            "metadata": {"type": "temporal.api.failure.v1.Failure"},
            "details": {"applicationFailureInfo": {"type": kind}},
        }
    ).encode()


def signer(world: World) -> MessageSigner:
    return MessageSigner(world.keys.start)


async def assert_nothing_started(world: World, key: str) -> None:
    with pytest.raises(RPCError) as raised:
        await world.target(Ask(key=key)).describe()
    assert raised.value.status is RPCStatusCode.NOT_FOUND


def header(name: str, value: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.headers[name] = value

    return spoil


def without(name: str) -> Spoil:
    def spoil(message: Message) -> None:
        del message.headers[name]

    return spoil


def twice(name: str, value: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.headers.add(name, value)

    return spoil


def body(text: bytes) -> Spoil:
    def spoil(message: Message) -> None:
        message.body = text

    return spoil


def url(old: str, new: str) -> Spoil:
    def spoil(message: Message) -> None:
        assert old in message.url
        message.url = message.url.replace(old, new)

    return spoil


def method(name: str) -> Spoil:
    def spoil(message: Message) -> None:
        message.method = name

    return spoil
