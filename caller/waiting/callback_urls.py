"""Mints callback URLs, to which handlers POST the outcomes of our calls. The receiver verifies them."""

import secrets
from datetime import datetime

from bridge.errors import bad_request
from bridge.security.callback_tokens import MAX_TOKEN_CHARACTERS, CallbackTokens
from bridge.security.egress import MAX_CALLBACK_URL
from caller.waiting.attempt import Attempt

_CALLBACK_ID_BYTES = 16


class CallbackUrls:
    """Mints callback URLs below the receiver's public URL."""

    def __init__(self, *, receiver_url: str, tokens: CallbackTokens) -> None:
        self._base = receiver_url.rstrip("/")
        self._tokens = tokens

    def mint(self, attempt: Attempt, *, handler: str, now: datetime) -> str:
        """Return a new callback URL for the call of *attempt*. Only the peer *handler* can complete the call by it.

        Raises:
            nexusrpc.HandlerError: BAD_REQUEST, the URL would be longer than Temporal's server allows.
        """
        callback_id = secrets.token_urlsafe(_CALLBACK_ID_BYTES)
        token = self._tokens.mint(
            callback_id=callback_id,
            peer=handler,
            workflow_id=attempt.caller.workflow_id,
            run_id=attempt.caller.run_id,
            request_id=attempt.info.activity_id,
            now=now,
            deadline=attempt.deadline,
        )
        url = f"{self._base}/callbacks/{callback_id}?sig={token}"
        if len(url) > MAX_CALLBACK_URL or len(token) > MAX_TOKEN_CHARACTERS:
            message = (
                f"the callback URL would be over {MAX_CALLBACK_URL} characters: "
                "shorten the workflow id or the receiver's URL"
            )
            raise bad_request(message)
        return url
