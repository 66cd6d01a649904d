"""The errors that several packages raise and handle.

Two errors are nexusrpc's own and must not be mixed: `HandlerError` (this request failed) and `OperationError` (the
operation ended failed or canceled, which is an outcome). All other errors are defined below. No error's text holds a
URL, a token or a body.
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
    """The peer's message breaks the protocol. The text names the broken rule and does not quote the message."""


class TransportError(BridgeError):
    """A request got no answer, because the network failed or time ran out. Neither side is at fault. Retry.

    *layer* is what failed: "address" (the look-up of the name), "connection", "TLS", or "signed answer".
    """

    def __init__(self, message: str, *, layer: str = "signed answer") -> None:
        super().__init__(message)
        self.layer = layer


class UnsignedAnswerError(BridgeError):
    """An answer that the peer has not signed. A proxy may have given it, therefore it does not end the call.

    The text describes the answer, names the probable sender and proposes a remedy.
    """


class DestinationRefusedError(BridgeError):
    """The address of an outgoing request is not allowed. A retry gives the same result."""


class DestinationBusyError(BridgeError):
    """The maximum number of requests is in flight to the destination, and none ended in time. Nothing was sent."""

    retry_after: timedelta | None = None
    """A delay after which a place may be free, if the destination hangs. None if the destination answers requests."""


class PeerHandlerError(HandlerError):
    """A request failed, and the peer itself reported it: the body holds a HandlerError, not only a status."""

    remote_cause: Failure | None = None
    """The cause of the error, encoded by the peer's data converter and codec."""


class WaitOverError(PeerHandlerError):
    """A receiver of the bridge reports that no call waits, or that the call does not wait any more."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=HandlerErrorType.NOT_FOUND)


class OutcomeUnknownError(PeerHandlerError):
    """The handler has no record of how the operation ended and does not start it again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, type=HandlerErrorType.NOT_FOUND, retryable_override=False)


class WrongHandlerError(PeerHandlerError):
    """The handler does not have the operation that a repeated start names: another handler started it (status 421).

    The caller repeats the start. The first handler's callback still ends the call.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, type=HandlerErrorType.UNAVAILABLE)


class UnavailableError(HandlerError):
    """This side cannot serve the request now. The peer should send it again after *retry_after*."""

    def __init__(
        self,
        message: str,
        *,
        retry_after: timedelta = timedelta(seconds=1),
        kind: HandlerErrorType = HandlerErrorType.UNAVAILABLE,
    ) -> None:
        super().__init__(message, type=kind)
        self.retry_after = retry_after


def bad_request(message: str) -> HandlerError:
    """A HandlerError for a request that the peer must change. Not retryable."""
    return HandlerError(message, type=HandlerErrorType.BAD_REQUEST)


def not_found(message: str) -> HandlerError:
    """A HandlerError for an unknown service, operation or call. Not retryable."""
    return HandlerError(message, type=HandlerErrorType.NOT_FOUND)


def over_limit(message: str, *, retry_after: timedelta) -> UnavailableError:
    """A HandlerError for a request over a limit of its sender (status 429). Retryable."""
    return UnavailableError(message, retry_after=retry_after, kind=HandlerErrorType.RESOURCE_EXHAUSTED)


def without_text(error: BaseException) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """*error* as the `exc_info` of a log record: class and traceback without the text, which may quote a message."""
    return type(error), Exception("(text withheld)"), error.__traceback__


_REASONS = {
    "clock": "clock",
    "no such peer": "unknown peer",
    "certificate": "certificate",
    "bearer": "key",
    "key": "key",
    "sign": "signature",
    "digest": "signature",
    "token": "callback token",
}
"""Labels for the reasons of an `UntrustedError`. The first of these words that the text contains decides."""


def reason_label(reason: str) -> str:
    """Return one of a few words for the reason of an `UntrustedError`."""
    return next((label for word, label in _REASONS.items() if word in reason.lower()), "other")
