"""Which workflow id a start gets: the team's `workflow_id` derives it from the input that the team's `check` accepts.

A run is started only if the check returned None and the workflow id is usable. Otherwise the call is answered with an
error, which states whether the call may be retried. An error is final if every repeat would give the same error. The
caller gets the function's name and the error's class. The handler's log has the traceback.
"""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from datetime import timedelta
from typing import Any

from nexusrpc import HandlerError, HandlerErrorType
from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from bridge.errors import UnavailableError, bad_request, without_text
from bridge.runtime.event_log import event_logger
from bridge.workflow.targets import Target
from handler.user_code.conversion import reasons
from handler.user_code.threads import close_coroutine

TIMEOUT = timedelta(seconds=8)
"""Time limit for both functions and `authorize` together, because a caller waits 10 seconds for the answer."""

_MAX_WORKFLOW_ID = 1000
MAX_TEXT = 1000
"""Most characters of a function's text that the caller gets."""

_log = event_logger(__name__)


async def workflow_id_for(value: Any, target: Target, executor: Executor) -> tuple[str, HandlerError | None]:
    """Check *value*, the operation's input, and derive the workflow id from it. Both run in a thread of *executor*.

    Returns the workflow id, and why the check refused the input; None if it did not. A check may refuse the repeat of
    a start that it has let pass.

    Raises:
        nexusrpc.HandlerError: No run may be started. BAD_REQUEST, the input is refused; UNAVAILABLE, no thread is free
            or the functions took too long; else the error that the function raised, by default not retryable.
    """
    judging = asyncio.get_running_loop().run_in_executor(executor, _judge, value, target)
    try:
        return await asyncio.wait_for(judging, TIMEOUT.total_seconds())
    except TimeoutError:
        _log.error("bridge.user_function_slow", extra=_labels(target))
        message = "the operation's check took too long"
        raise UnavailableError(message) from None


def _judge(value: Any, target: Target) -> tuple[str, HandlerError | None]:
    try:
        _check(value, target)
    except HandlerError as refusal:
        # What a check refuses may have no workflow id.
        with contextlib.suppress(HandlerError):
            return _workflow_id(value, target), refusal
        raise
    return _workflow_id(value, target), None


def _check(value: Any, target: Target) -> None:
    if target.check is not None:
        answered = _call("check", target.check, value, target)
        if answered is not None:
            message = f"returned {type(answered).__name__} and not None; a check refuses an input by raising ValueError"
            raise _broken(target, "check", message)


def _workflow_id(value: Any, target: Target) -> str:
    workflow_id = _call("workflow_id", target.workflow_id, value, target)
    if not isinstance(workflow_id, str):
        raise _broken(target, "workflow_id", f"returned {type(workflow_id).__name__} and not str")
    size = len(workflow_id.encode(errors="surrogatepass"))
    if not 0 < size <= _MAX_WORKFLOW_ID:
        message = f"the workflow id has {size} bytes, 1 to {_MAX_WORKFLOW_ID} are allowed"
        raise bad_request(message)
    if any("\ud800" <= each <= "\udfff" for each in workflow_id):
        message = "the workflow id is not valid Unicode"
        raise bad_request(message)
    return workflow_id


def _call(role: str, function: Callable[[Any], Any], value: Any, target: Target) -> Any:
    try:
        answered = function(value)
    except HandlerError:
        raise
    except ApplicationError as error:
        kind, is_retryable = HandlerErrorType.INTERNAL, not error.non_retryable
        raise HandlerError(error.message[:MAX_TEXT], type=kind, retryable_override=is_retryable) from None
    except ValueError as error:
        if role != "check":
            raise _broken(target, role, f"raised {type(error).__name__}", error) from None
        text = f"the check refuses {reasons(error)}" if isinstance(error, ValidationError) else str(error)
        raise bad_request(text[:MAX_TEXT]) from None
    except OSError as error:
        _log.warning("bridge.user_function_unavailable", extra=_labels(target), exc_info=without_text(error))
        message = f"the operation's {role} is unavailable ({type(error).__name__})"
        raise UnavailableError(message) from None
    except BaseException as error:  # noqa: BLE001 - also SystemExit, which would end the service
        raise _broken(target, role, f"raised {type(error).__name__}", error) from None
    close_coroutine(answered)
    return answered


def _broken(target: Target, role: str, what: str, error: BaseException | None = None) -> HandlerError:
    """Log a mistake in the team's function, and return the final error for it: every repeat would fail equally."""
    trace = None if error is None else without_text(error)
    _log.error("bridge.user_function_failed: %s %s", role, what, extra=_labels(target), exc_info=trace)
    return HandlerError(f"the operation's {role} {what}", type=HandlerErrorType.INTERNAL, retryable_override=False)


def _labels(target: Target) -> dict[str, str]:
    return {"bridge.service": target.service, "bridge.operation": target.operation}
