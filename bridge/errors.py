"""The errors that cross rooms, and how a failed request is told over HTTP.

Two errors are nexusrpc's own and never mix: `HandlerError` (this request failed) and `OperationError` (the operation
ended badly, which is an outcome). Ours are the small tree below. No error's text holds a URL, a token or a body.
"""

from datetime import timedelta
from types import TracebackType

from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.failure.v1 import Failure


class BridgeError(Exception):
    """Base of the errors below."""


class UntrustedError(BridgeError):
    """A token or a message signature did not verify. *reason* is a label for logs and metrics, never for a peer."""

    def __init__(self, reason: str) -> None:
        super().__init__("not authenticated")
        self.reason = reason


class RemoteProtocolError(BridgeError):
    """The peer's message breaks the protocol. The text says how, and quotes nothing of the message."""


class TransportError(BridgeError):
    """No answer: the network failed or time ran out. Nobody broke anything; trying again is right."""


class UnsignedAnswerError(BridgeError):
    """An answer that the peer has not signed: something in between may have given it. It ends nothing.

    The text says who seems to have answered, and what may help.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class DestinationRefusedError(BridgeError):
    """The address of an outgoing request is not allowed. Trying again changes nothing."""


class PeerHandlerError(HandlerError):
    """A peer's own word that a request failed: a HandlerError in the body, not a proxy's bare status."""

    remote_cause: Failure | None = None
    """What caused it, as the peer's data converter and codec made it."""


class WaitOverError(PeerHandlerError):
    """A receiver of ours says that nobody waits (any more)."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=HandlerErrorType.NOT_FOUND)


class OutcomeUnknownError(PeerHandlerError):
    """The handler cannot know any more how the operation ended, and will not start it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=HandlerErrorType.NOT_FOUND, retryable_override=False)


class UnavailableError(HandlerError):
    """We cannot serve the request now, for a reason that is ours; the peer should come back after *retry_after*."""

    def __init__(self, message: str, *, retry_after: timedelta = timedelta(seconds=1)) -> None:
        super().__init__(message, type=HandlerErrorType.UNAVAILABLE)
        self.retry_after = retry_after


def bad_request(message: str) -> HandlerError:
    """The peer's fault: final."""
    return HandlerError(message, type=HandlerErrorType.BAD_REQUEST)


def not_found(message: str) -> HandlerError:
    """Unknown service, operation or call: final."""
    return HandlerError(message, type=HandlerErrorType.NOT_FOUND)


def without_text(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """*error* as a log's `exc_info`: its class and where it happened, without the text, which may quote a message."""
    return type(error), Exception("(text withheld)"), error.__traceback__
