"""Who may use the console: the tokens of operators, and the sessions that a token opens.

A token has 256 random bits, which cannot be guessed. Therefore wrong tokens are not counted, and the settings keep a
plain SHA-256 of it: a pause or a slow hash such as scrypt protects only secrets that people choose. Sessions are in
memory, so that nothing in the settings opens one, and end with the process.
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

SESSION_LIFE = timedelta(hours=8)
_MAX_SESSIONS = 100


def hash_token(token: str) -> str:
    """Return the form of *token* that the settings keep: its SHA-256 in hexadecimal."""
    return hashlib.sha256(token.encode(errors="replace")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Session:
    """One login."""

    key: str
    """Secret value of the cookie."""
    operator: str
    """Name of the operator in the settings."""
    csrf: str
    """Secret that every form of the session's pages carries."""
    ends: datetime
    """End of the session. Use does not prolong it."""


class Sessions:
    """The open sessions of one console."""

    def __init__(self, token_hashes: Mapping[str, str], *, clock: Callable[[], datetime]) -> None:
        """*token_hashes* are by operator."""
        self._token_hashes = token_hashes
        self._clock = clock
        self._open: dict[str, Session] = {}

    def open(self, token: str) -> Session | None:
        """Open a session. Returns None if the token is wrong."""
        # Compare every hash, so that timing reveals nothing.
        given = hash_token(token)
        operators = [name for name, each in self._token_hashes.items() if hmac.compare_digest(given, each)]
        if not operators:
            return None
        key, csrf = secrets.token_urlsafe(), secrets.token_urlsafe()
        session = Session(key=key, operator=operators[0], csrf=csrf, ends=self._clock() + SESSION_LIFE)
        self._open[key] = session
        if len(self._open) > _MAX_SESSIONS:
            del self._open[next(iter(self._open))]
        return session

    def find(self, key: str) -> Session | None:
        """Return the open session with this key."""
        session = self._open.get(key)
        return session if session is not None and self._clock() < session.ends else None

    def close(self, session: Session) -> None:
        """End a session."""
        self._open.pop(session.key, None)
