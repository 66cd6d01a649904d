"""Mint and verify callback tokens.

A callback token is the caller's signed note to itself: the handler stores it and returns it with the completion. Only
this module reads and writes its layout, and only this module imports itsdangerous. It reads no clock and no settings;
both are arguments. A token's text must not reach an error, a log line or a history. A token is signed, not encrypted:
the peer can read it.
"""

import hashlib
import re
from datetime import datetime
from typing import NewType

from itsdangerous import BadData, URLSafeSerializer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bridge.errors import UntrustedError
from bridge.security.keys import KeySource
from bridge.security.signatures import CLOCK_SKEW

CallbackToken = NewType("CallbackToken", str)

MAX_TOKEN_CHARACTERS = 1024

# itsdangerous also accepts altered spellings of a valid token (other characters inside the base64). Refuse them.
_TOKEN_TEXT = re.compile(r"[A-Za-z0-9_.-]+")


class CallbackClaims(BaseModel):
    """Which waiting activity a completion may end, and which handler may send it. The token has the same names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(pattern=r"^[A-Za-z0-9_-]{22}$")
    """The callback's id, 128 random bits. Logs and limits use it. It is also in the callback URL's path."""
    peer: str
    """Name of the handler that may answer. It selects the keys of the message signature."""
    ns: str
    """Namespace of the waiting workflow."""
    wf: str
    """Id of the waiting workflow."""
    run: str
    """Run that waited when the token was minted. Only a look-up in history reads it; a completion uses the current
    run."""
    rid: str
    """Request id, the same in all attempts of one call, and the id of the only activity that a completion may end."""
    iat: int
    """When the token was minted, Unix time in seconds."""
    exp: int
    """Deadline of the operation, Unix time in seconds, rounded up."""

    def is_over(self, now: datetime) -> bool:
        """Whether the operation's deadline is over.

        If so, the receiver completes nothing, but still recognizes a repeated completion.
        """
        return now.timestamp() > self.exp + int(CLOCK_SKEW.total_seconds())


class CallbackTokens:
    """Mints and verifies the callback tokens of one caller deployment."""

    def __init__(self, keys: KeySource, *, namespace: str) -> None:
        self._keys = keys
        self._namespace = namespace

    @property
    def _serializer(self) -> URLSafeSerializer:
        # One salt per purpose and version, so that a token for one purpose is invalid for every other. The times are
        # claims, because the timed signer of itsdangerous has no leeway for clock skew.
        return URLSafeSerializer(
            self._keys().signing_last(),
            salt="bridge/callback/v1",
            signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
        )

    def mint(
        self,
        *,
        callback_id: str,
        peer: str,
        workflow_id: str,
        run_id: str,
        request_id: str,
        now: datetime,
        deadline: datetime,
    ) -> CallbackToken:
        """Sign the claims of one attempt. *deadline* is the deadline of the operation, not of the attempt."""
        claims = CallbackClaims(
            id=callback_id,
            peer=peer,
            ns=self._namespace,
            wf=workflow_id,
            run=run_id,
            rid=request_id,
            iat=int(now.timestamp()),
            exp=int(deadline.timestamp()) + 1,
        )
        text = self._serializer.dumps(claims.model_dump(exclude_none=True))
        return CallbackToken(text if isinstance(text, str) else text.decode("ascii"))

    def verify(self, text: str, *, callback_id: str, now: datetime) -> CallbackClaims:
        """Check *text* and every claim in it. *callback_id* is the id in the URL's path.

        A token with a past deadline is accepted: read `is_over` of the claims.

        Raises:
            UntrustedError: The token is malformed, badly signed, or minted for another namespace or callback.
        """
        claims = self._load(text)
        if claims.ns != self._namespace:
            reason = "callback token of another namespace"
            raise UntrustedError(reason)
        if claims.id != callback_id:
            reason = "callback token of another callback"
            raise UntrustedError(reason)
        # Compare whole seconds, because an extreme but signed time would overflow a float.
        leeway, instant = int(CLOCK_SKEW.total_seconds()), now.timestamp()
        if instant < claims.iat - leeway:
            reason = "callback token of the future: compare the clocks"
            raise UntrustedError(reason)
        return claims

    def _load(self, text: str) -> CallbackClaims:
        if len(text) > MAX_TOKEN_CHARACTERS or not _TOKEN_TEXT.fullmatch(text):
            reason = "token malformed"
            raise UntrustedError(reason)
        try:
            return CallbackClaims.model_validate(self._serializer.loads(text))
        except (BadData, ValidationError, ValueError, OverflowError):
            # `from None`: the texts of these errors hold the signature or the claims.
            reason = "token not ours"
            raise UntrustedError(reason) from None
