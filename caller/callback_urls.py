"""Callback URLs: where a handler is to send the outcome of one attempt's call. Minted here, opened by the receiver."""

import secrets
from dataclasses import dataclass
from datetime import datetime

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
    deadline: datetime


class CallbackUrls:
    """Mints callback URLs below the receiver's public URL."""

    def __init__(self, *, receiver_url: str, tokens: CallbackTokens) -> None:
        self._base = receiver_url.rstrip("/")
        self._tokens = tokens

    def mint(self, attempt: WaitingAttempt, *, now: datetime) -> str:
        """A signed callback URL for *attempt*.

        Raises:
            ValueError: It is longer than Temporal allows.
        """
        callback_id = secrets.token_urlsafe(_CALLBACK_ID_BYTES)
        token = self._tokens.mint(
            callback_id=callback_id,
            peer=attempt.handler,
            operation=attempt.operation,
            workflow_id=attempt.workflow_id,
            run_id=attempt.run_id,
            request_id=attempt.request_id,
            attempt=attempt.attempt,
            now=now,
            deadline=attempt.deadline,
        )
        url = f"{self._base}/callbacks/{callback_id}?sig={token}"
        if len(url) > MAX_CALLBACK_URL or len(token) > MAX_TOKEN_CHARACTERS:
            message = (
                f"the callback URL would be over {MAX_CALLBACK_URL} characters: "
                "shorten the workflow id, the service or operation name, or the receiver's URL"
            )
            raise ValueError(message)
        return url
