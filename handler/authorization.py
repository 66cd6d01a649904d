"""Which caller may start which operation: the settings decide first, then the team's function `authorize`."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from datetime import timedelta
from types import ModuleType
from typing import Any

from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import without_text
from bridge.runtime.event_log import event_logger
from handler.settings import CallerPeer
from handler.user_code.threads import close_coroutine, is_cancellation
from handler.user_code.workflow_id import MAX_TEXT, TIMEOUT

Authorize = Callable[[str, str, Any], Awaitable[None] | None]
"""`authorize(caller, operation, input)`, plain or `async`: returns None to allow the start, or raises
`PermissionError("why not")`, whose text the caller gets. *caller* is its authenticated name, *operation* is
`Service/operation`, *input* is decoded. It may be called again for the same start."""

_log = event_logger(__name__)


def require_in_settings(peer: CallerPeer, service: str, operation: str) -> None:
    """Return if the settings of *peer* allow it this operation.

    Raises:
        nexusrpc.HandlerError: UNAUTHORIZED, they do not.
    """
    if not peer.may_start(service, operation):
        message = "this caller may not start this operation"
        raise HandlerError(message, type=HandlerErrorType.UNAUTHORIZED)


def authorize_in(module: ModuleType) -> Authorize | None:
    """Return the function `authorize` of *module*; None if it has none.

    Raises:
        ValueError: `authorize` cannot be called with three arguments.
    """
    function: Authorize | None = getattr(module, "authorize", None)
    if function is not None:
        try:
            inspect.signature(function).bind("caller", "Service/operation", None)
        except TypeError:
            message = f"{module.__name__}.authorize must be a function of (caller, operation, input)"
            raise ValueError(message) from None
    return function


class Authorization:
    """Asks the team's function."""

    def __init__(self, function: Authorize | None, threads: Mapping[str, Executor]) -> None:
        """*threads*, by caller, run a *function* that is not `async`. None allows every start."""
        self._function = function
        self._threads = threads

    @property
    def is_needed(self) -> bool:
        """Whether the team has a function to ask."""
        return self._function is not None

    async def require(self, caller: str, operation: str, value: Any, *, within: timedelta = TIMEOUT) -> None:
        """Return if *caller* may start *operation* with the input *value*. The function gets the time *within*.

        Raises:
            nexusrpc.HandlerError: UNAUTHORIZED, it may not; INTERNAL and retryable, the function failed or took too
                long.
        """
        if self._function is None:
            return
        failed: BaseException | None
        try:
            async with asyncio.timeout(within.total_seconds()):
                answered = await self._ask(self._function, caller, operation, value)
        except BaseException as error:
            if is_cancellation(error):
                raise
            # A PermissionError of the operating system has a number and is no refusal: its text names a file.
            if isinstance(error, PermissionError) and error.errno is None:
                raise HandlerError(str(error)[:MAX_TEXT], type=HandlerErrorType.UNAUTHORIZED) from None
            reason, failed = f"raised {type(error).__name__}", error
        else:
            if answered is None:
                return
            close_coroutine(answered)
            reason, failed = f"returned {type(answered).__name__} and not None", None
        extra = {"bridge.caller": caller, "bridge.operation": operation, "bridge.error": reason}
        _log.error("bridge.authorize_failed", extra=extra, exc_info=failed and without_text(failed))
        message = "the handler could not decide whether this caller may start this operation"
        raise HandlerError(message, type=HandlerErrorType.INTERNAL) from None

    async def _ask(self, function: Authorize, caller: str, operation: str, value: Any) -> object:
        if inspect.iscoroutinefunction(function):
            return await function(caller, operation, value)
        loop = asyncio.get_running_loop()
        answered: object = await loop.run_in_executor(self._threads[caller], function, caller, operation, value)
        return await answered if inspect.isawaitable(answered) else answered
