"""Mint and verify callback tokens and operation tokens.

A callback token is the caller's signed note to itself: it travels through the handler's namespace and comes back with
the completion. An operation token is the handler's note to itself, and comes back with a cancel. Only this module
knows their layout, and only this module imports itsdangerous. It reads no clock and no settings; both are handed in.
A token's text never reaches an error, a log line or a history. It is signed, not encrypted: the peer can read it.
"""

import hashlib
import re
from datetime import datetime
from typing import Any, Literal, NewType, TypeVar

from itsdangerous import BadData, URLSafeSerializer
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bridge.errors import UntrustedError
from bridge.security.clocks import CLOCK_SKEW
from bridge.security.keys import KeySet

CallbackToken = NewType("CallbackToken", str)
OperationToken = NewType("OperationToken", str)

MAX_TOKEN_CHARACTERS = 1024

# itsdangerous accepts altered spellings of a good token (junk inside the base64); none of them is ours.
_TOKEN_TEXT = re.compile(r"[A-Za-z0-9_.-]+")

_ClaimsT = TypeVar("_ClaimsT", bound=BaseModel)


class CallbackClaims(BaseModel):
    """Which wait a completion may end, and who may end it. Field names are those of the token."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    v: Literal[1] = 1
    id: str = Field(pattern=r"^[A-Za-z0-9_-]{22}$")
    """The callback's id, 128 random bits: the key for logs and limits; also in the callback URL's path."""
    iss: str
    """The caller that minted it."""
    aud: str
    """The receiver it is meant for."""
    peer: str
    """The handler that may answer; selects the keys of the message signature."""
    op: str
    """service/operation, a label."""
    ns: str
    """Namespace of the waiting workflow."""
    wf: str
    run: str
    """Run that waited when the token was made. Only a look into history needs it: the current run is completed."""
    act: str
    """Activity id, which is the request id."""
    att: int
    """Attempt; information only."""
    rid: str
    """Request id: the fence. All attempts of one call share it."""
    iat: int
    exp: int

    def is_over(self, now: datetime) -> bool:
        """Whether the operation's deadline is over: then nothing is completed, and a repeat is still a repeat."""
        return now.timestamp() > self.exp + int(CLOCK_SKEW.total_seconds())


class OperationClaims(BaseModel):
    """Which operation a token names. No run id: the operation may continue as new or be reset under the same token."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    v: Literal[1] = 1
    caller: str
    wid: str
    """Workflow id of the target."""
    rid: str
    """Request id of the call."""


class CallbackTokens:
    """Mints and verifies the callback tokens of one caller deployment."""

    def __init__(self, key_set: KeySet, *, issuer: str, audience: str, namespace: str) -> None:
        self._serializer = _serializer(key_set, "bridge/callback/v1")
        self._issuer = issuer
        self._audience = audience
        self._namespace = namespace

    def mint(
        self,
        *,
        callback_id: str,
        peer: str,
        operation: str,
        workflow_id: str,
        run_id: str,
        request_id: str,
        attempt: int,
        now: datetime,
        deadline: datetime,
    ) -> CallbackToken:
        """Sign the claims of one attempt; *deadline* is the operation's, not the attempt's."""
        claims = CallbackClaims(
            id=callback_id,
            iss=self._issuer,
            aud=self._audience,
            peer=peer,
            op=operation,
            ns=self._namespace,
            wf=workflow_id,
            run=run_id,
            act=request_id,
            att=attempt,
            rid=request_id,
            iat=int(now.timestamp()),
            exp=int(deadline.timestamp()) + 1,
        )
        return CallbackToken(_dump(self._serializer, claims))

    def verify(self, text: str, *, callback_id: str, now: datetime) -> CallbackClaims:
        """Check *text* and every claim in it; *callback_id* is the one in the URL's path.

        A token whose deadline is over is not refused: `is_over` of the claims says so.

        Raises:
            UntrustedError: Whatever is wrong with it.
        """
        claims = _load(self._serializer, text, CallbackClaims)
        if (claims.iss, claims.aud, claims.ns) != (self._issuer, self._audience, self._namespace):
            reason = "callback token of another receiver"
            raise UntrustedError(reason)
        if claims.id != callback_id or claims.act != claims.rid:
            reason = "callback token of another callback"
            raise UntrustedError(reason)
        # Whole seconds: a signed but absurd time would overflow a float.
        leeway, instant = int(CLOCK_SKEW.total_seconds()), now.timestamp()
        if instant < claims.iat - leeway:
            reason = "callback token of the future: compare the clocks"
            raise UntrustedError(reason)
        return claims


class OperationTokens:
    """Mints and verifies the operation tokens of one handler deployment."""

    def __init__(self, key_set: KeySet) -> None:
        self._serializer = _serializer(key_set, "bridge/operation/v1")

    def mint(self, *, caller: str, workflow_id: str, request_id: str) -> OperationToken:
        """The same call always gets the same token."""
        return OperationToken(_dump(self._serializer, OperationClaims(caller=caller, wid=workflow_id, rid=request_id)))

    def verify(self, text: str) -> OperationClaims:
        """Check *text*.

        Raises:
            UntrustedError: Not a token of ours.
        """
        return _load(self._serializer, text, OperationClaims)


def _serializer(key_set: KeySet, salt: str) -> URLSafeSerializer:
    # One salt per purpose and version: a token of one purpose is a bad signature for every other. The times are
    # claims of our own, because itsdangerous' timed signer knows no leeway.
    return URLSafeSerializer(
        key_set.signing_last(),
        salt=salt,
        signer_kwargs={"key_derivation": "hmac", "digest_method": hashlib.sha256},
    )


def _dump(serializer: URLSafeSerializer, claims: BaseModel) -> str:
    text = serializer.dumps(claims.model_dump(exclude_none=True))
    return text if isinstance(text, str) else text.decode("ascii")


def _load(serializer: URLSafeSerializer, text: str, model: type[_ClaimsT]) -> _ClaimsT:
    if len(text) > 4 * MAX_TOKEN_CHARACTERS or not _TOKEN_TEXT.fullmatch(text):
        reason = "token malformed"
        raise UntrustedError(reason)
    try:
        loaded: Any = serializer.loads(text)
        return model.model_validate(loaded)
    except (BadData, ValidationError, ValueError, OverflowError):
        # Their texts hold the signature or the claims.
        reason = "token not ours"
        raise UntrustedError(reason) from None
