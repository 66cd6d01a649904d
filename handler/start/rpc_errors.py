"""What the caller of a start or a cancel is answered if Temporal failed. The texts quote nothing of Temporal's text."""

from datetime import timedelta

from nexusrpc import HandlerError, HandlerErrorType
from temporalio.service import RPCError
from yarl import URL

from bridge.errors import UnavailableError, bad_request, over_limit
from bridge.runtime.event_log import event_logger
from bridge.temporal.rpc_status import error_type

_log = event_logger(__name__)


def handler_error_from_rpc(error: RPCError) -> HandlerError:
    """Return the error for the caller if Temporal failed. It omits the text, which may hold a callback URL."""
    _log.warning("bridge.start_failed", extra={"bridge.rpc_status": error.status.name})
    kind = error_type(error)
    if kind is HandlerErrorType.RESOURCE_EXHAUSTED:
        return HandlerError("too many starts at the moment", type=kind)
    if kind is HandlerErrorType.BAD_REQUEST:
        if "size exceeds limit" in error.message:
            return bad_request("the input is larger than the handler's namespace allows (limit.blobSize.error)")
        return bad_request("the handler's Temporal server refuses the start")
    # Refused credentials too are a fault of the handler, and may be repaired.
    return UnavailableError(f"the handler's Temporal server does not serve requests now ({error.status.name})")


def run_is_full() -> HandlerError:
    """Return the error for a call that cannot attach. The repeated call gets the outcome in the end."""
    message = "no further call may wait for the run of this operation: ask again for its outcome"
    return over_limit(message, retry_after=timedelta(seconds=30))


def callback_refused(url: str, error: RPCError) -> HandlerError:
    """Return the error for a callback that our server refused. The caller is not at fault, and may retry."""
    if "callbacks to a workflow" in error.message:
        return run_is_full()
    if "callback" not in error.message:
        return handler_error_from_rpc(error)
    host = URL(url).authority
    message = (
        f"the handler's Temporal server refuses to send completions to {host}: "
        "its operator has to allow that in component.callbacks.allowedAddresses (from 1.32: callback.allowedAddresses)"
    )
    _log.error("bridge.server_callback_refused", extra={"bridge.callback_host": host})
    return UnavailableError(message, retry_after=timedelta(seconds=10))
