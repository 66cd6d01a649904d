"""Key sets: one key signs, and all keys verify. Load a new key on every verifier before a signer uses it.

Key ids are public, and no `repr` shows a key. An empty key set and a short key are refused when the settings are read,
because HMAC itself would accept both.
"""

import base64
import binascii
import hmac
import secrets
from collections.abc import Callable
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

MIN_KEY_BYTES = 32
MAX_KEYS = 10

KEY_ID = r"^[a-z0-9-]{1,31}$"
"""Logs, metrics and signatures show an id, therefore it is shorter than every key."""
FINGERPRINT = r"^[0-9a-f]{16}$"
KeyId = Annotated[str, Field(pattern=KEY_ID)]


def _stripped(key: SecretStr) -> SecretStr:
    return SecretStr(key.get_secret_value().strip())


Key = Annotated[SecretStr, AfterValidator(_stripped)]
"""A key as text. Whitespace around it is removed, because a file that fills a variable usually ends with a newline."""


def new_key() -> str:
    """A new random key of 32 bytes as base64url text, the form that the settings read."""
    return base64.urlsafe_b64encode(secrets.token_bytes(MIN_KEY_BYTES)).decode().rstrip("=")


def decode_key(text: SecretStr) -> bytes:
    """The bytes of a key in settings.

    Raises:
        ValueError: *text* is not base64url, or the key is shorter than 32 bytes. The error does not quote the key.
    """
    raw = text.get_secret_value()
    try:
        key = base64.b64decode(raw + "=" * (-len(raw) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        message = "a key must be base64url text; make one with `callback-bridge keys new`"
        raise ValueError(message) from None
    if len(key) < MIN_KEY_BYTES:
        message = f"a key needs at least {MIN_KEY_BYTES} bytes, this one has {len(key)}; make one with `keys new`"
        raise ValueError(message)
    return key


class KeySet(BaseModel):
    """The keys for one purpose between two holders."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    signing: KeyId
    """Id of the key that signs, one of `keys`."""
    keys: dict[KeyId, Key] = Field(min_length=1, max_length=MAX_KEYS)
    """All keys by id, 1 to 10. Each of them verifies."""
    file: str | None = None
    """The TOML file that has `signing` and `keys`. It is read again when it changes. If it is left out, the settings
    themselves have both."""

    def __call__(self) -> Self:
        """Return this key set: it is its own source, which never changes."""
        return self

    @field_validator("keys")
    @classmethod
    def _keys_are_strong(cls, keys: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for key_id, key in keys.items():
            try:
                decode_key(key)
            except ValueError as error:
                message = f"key {key_id!r}: {error}"
                raise ValueError(message) from None
        return keys

    @model_validator(mode="after")
    def _signing_key_is_known(self) -> Self:
        if self.signing not in self.keys:
            message = f"signing: no key {self.signing!r} in this key set (it has: {', '.join(self.keys)})"
            raise ValueError(message)
        return self

    def raw(self) -> dict[str, bytes]:
        """All keys by id."""
        return {key_id: decode_key(key) for key_id, key in self.keys.items()}

    def fingerprints(self) -> dict[str, str]:
        """A short public text for each key by id, the same for the same key. It does not reveal the key."""
        return {each: hmac.digest(key, b"fingerprint", "sha256").hex()[:16] for each, key in self.raw().items()}

    def signing_last(self) -> list[bytes]:
        """All keys, the signing key last. itsdangerous signs with the last key and verifies with all."""
        raw = self.raw()
        return [key for key_id, key in raw.items() if key_id != self.signing] + [raw[self.signing]]


KeySource = Callable[[], KeySet]
"""Returns the present key set. A signer or verifier calls it for every message, so that a rotation needs no restart."""
