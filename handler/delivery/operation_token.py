"""The operation token: the handler's name for the operation of one call. The caller returns it unread.

The token is not signed and grants nothing. The route authenticates the caller, and the memo of the run that the token
names decides whether the caller may cancel it. The token names the namespace by its id. Therefore a handler service of
another cluster, or of a namespace that was deleted and created again, recognizes that the operation is not its own.
"""

import base64
from typing import NamedTuple, Self


class OperationToken(NamedTuple):
    """What a token names. It holds no run id, because the target may continue as new or be reset."""

    namespace_id: str
    """Id of the namespace in which the operation was started."""
    request_id: str
    """Request id of the call."""
    workflow_id: str
    """Workflow id of the target."""

    def encode(self) -> str:
        """Return the text of the token. Equal tokens have equal text, which fits a path, a query and a header."""
        return ".".join(base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in self)

    @classmethod
    def decode(cls, text: str) -> Self | None:
        """Read a token; None if *text* is not spelled as `encode` spells it."""
        try:
            parts = [base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode() for part in text.split(".")]
            token = cls(*parts)
        except (ValueError, TypeError):
            return None
        return token if token.encode() == text else None
