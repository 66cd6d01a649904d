"""Callback URLs: where a handler is to send the outcome of one attempt's call. Minted here, opened by the receiver."""

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from bridge.protocol.headers import CALLBACK_TOKEN
from bridge.security.callback_tokens import MAX_TOKEN_CHARACTERS, CallbackTokens
from bridge.security.egress import MAX_CALLBACK_URL

_CALLBACK_ID_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class WaitingAttempt:
    """One attempt of a waiting activity, as its callback URL has to name it."""

    handler: str
    operation: str
    """service/operation."""
    workflow_id: str
    run_id: str
    request_id: str
    attempt: int
    task_token: bytes
    deadline: datetime
    completions: Literal["signature", "server"] = "signature"
    """How the handler's completions prove themselves."""


@dataclass(frozen=True, kw_only=True)
class Callback:
    """Where to send an outcome, and what to send with it."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class CallbackUrls:
    """Mints callback URLs below the receiver's public URL."""

    def __init__(self, *, receiver_url: str, tokens: CallbackTokens) -> None:
        self._base = receiver_url.rstrip("/")
        self._tokens = tokens

    def mint(self, attempt: WaitingAttempt, *, now: datetime) -> Callback:
        """A signed callback for *attempt*. The task token is left out where it would be too long with it.

        A token that lets a completion in by itself travels in a header: URLs are logged.

        Raises:
            ValueError: Even then it is longer than Temporal allows.
        """
        by_server = attempt.completions == "server"
        for task_token in (encode_task_token(attempt.task_token), None):
            callback_id = secrets.token_urlsafe(_CALLBACK_ID_BYTES)
            token = self._tokens.mint(
                callback_id=callback_id,
                peer=attempt.handler,
                operation=attempt.operation,
                workflow_id=attempt.workflow_id,
                run_id=attempt.run_id,
                request_id=attempt.request_id,
                attempt=attempt.attempt,
                task_token=task_token,
                now=now,
                deadline=attempt.deadline,
                auth="server" if by_server else "sig",
            )
            url = f"{self._base}/callbacks/{callback_id}"
            callback = (
                Callback(url=url, headers={CALLBACK_TOKEN: token}) if by_server else Callback(url=f"{url}?sig={token}")
            )
            if len(callback.url) <= MAX_CALLBACK_URL and len(token) <= MAX_TOKEN_CHARACTERS:
                return callback
        message = (
            f"the callback URL would be over {MAX_CALLBACK_URL} characters: "
            "shorten the workflow id, the service or operation name, or the receiver's URL"
        )
        raise ValueError(message)


def encode_task_token(task_token: bytes) -> str:
    return base64.urlsafe_b64encode(task_token).decode().rstrip("=")


def decode_task_token(text: str | None) -> bytes | None:
    """The task token in a verified claim; None if there is none that can be read."""
    if text is None:
        return None
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return None
