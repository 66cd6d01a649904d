"""The same targets as native Nexus operations, for callers on the same cluster.

Starts and cancels use the same starter and canceler, and Temporal's server delivers the outcome. The registration of
the Nexus endpoint decides which namespaces may call. The calling namespace is read from the callback URL, because the
server makes that URL; the calling workflow can invent links and other headers. (A client of the server's HTTP API for
Nexus can invent the callback URL too.) Servers from 1.31 may make callback URLs without a namespace. All such callers
then have one name, and only the call that started a run counts as its owner.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from urllib.parse import unquote

from nexusrpc import HandlerError, HandlerErrorType, OperationError, OperationErrorState
from nexusrpc import handler as nexus
from temporalio.api.common.v1 import Callback, Payload
from temporalio.common import RawValue
from temporalio.converter import DataConverter

from bridge.errors import bad_request
from bridge.protocol.headers import OPERATION_TIMEOUT, OperationState, decode_duration
from bridge.protocol.outcome import Outcome
from bridge.protocol.start import Finished, StartRequest
from bridge.workflow.targets import Target
from handler.delivery.records import NATIVE_CALLER
from handler.start.canceler import Canceler
from handler.start.starter import Starter
from handler.user_code.conversion import Conversion

_CALLBACK_PATH = re.compile(r"^https?://[^/?#]+(?:/[^?#]*)?/namespaces/([^/?#]+)/nexus/callback$")


class TargetOperation(nexus.OperationHandler[RawValue, RawValue]):
    """One target as a Nexus operation."""

    def __init__(self, target: Target, *, starter: Starter, canceler: Canceler, data_converter: DataConverter) -> None:
        self._target = target
        self._starter = starter
        self._canceler = canceler
        self._data_converter = data_converter
        self._conversion = Conversion(replace(data_converter, external_storage=None))

    async def start(
        self,
        ctx: nexus.StartOperationContext,
        input: RawValue,  # noqa: A002 - nexusrpc's parameter name
    ) -> nexus.StartOperationResultSync[RawValue] | nexus.StartOperationResultAsync:
        """Start the target, or answer with its outcome if it has closed."""
        headers = {name.lower(): value for name, value in ctx.headers.items()}
        request = StartRequest(
            service=self._target.service,
            operation=self._target.operation,
            request_id=ctx.request_id,
            callback_url=ctx.callback_url,
            headers=headers,
            links=ctx.inbound_links,
            operation_timeout=decode_duration(headers.get(OPERATION_TIMEOUT.lower(), "")),
        )
        callback = Callback.Nexus(url=ctx.callback_url, header=ctx.callback_headers) if ctx.callback_url else None
        # The worker decodes the input with our codec, and encodes the result. The starter needs the encoded form.
        caller, payload = _caller(ctx.callback_url), await self._conversion.close(input.payload)
        try:
            answer = await self._starter.start(caller, self._target, request, payload, server_callback=callback)
        except HandlerError as error:
            if error.type is HandlerErrorType.CONFLICT:
                # Server 1.29 does not know CONFLICT, and would retry until the deadline.
                raise bad_request(error.message) from None
            raise
        if answer.target is not None:
            ctx.outbound_links.append(answer.target.to_link())
        if isinstance(answer, Finished):
            return nexus.StartOperationResultSync(await self._result(answer.outcome))
        return nexus.StartOperationResultAsync(answer.operation_token)

    async def cancel(self, ctx: nexus.CancelOperationContext, token: str) -> None:
        """Request cancellation of the target. Temporal names no caller; the request id in the token is the proof."""
        del ctx
        await self._canceler.cancel(None, self._target, token)

    async def _result(self, outcome: Outcome) -> RawValue:
        if outcome.failure is not None:
            error = await self._data_converter.decode_failure(outcome.failure)
            is_canceled = outcome.state is OperationState.CANCELED
            state = OperationErrorState.CANCELED if is_canceled else OperationErrorState.FAILED
            raise OperationError(outcome.failure.message, state=state) from error
        result = outcome.result or Payload(metadata={"encoding": b"binary/null"})
        return RawValue(await self._conversion.open(result))


def nexus_services(targets: Iterable[Target], make: Callable[[Target], TargetOperation]) -> list[Any]:
    """Return a Nexus service handler for each service that *targets* belong to."""
    services: dict[str, dict[str, Any]] = {}
    for target in targets:

        def factory(_: object, target: Target = target) -> nexus.OperationHandler[RawValue, RawValue]:
            return make(target)

        operations = services.setdefault(target.service, {})
        # nexusrpc finds the methods of the class by their names.
        factory.__name__ = f"operation_{len(operations)}"
        operations[factory.__name__] = nexus.operation_handler(name=target.operation)(factory)
    found = []
    for name, operations in services.items():
        decorate: Callable[[type[Any]], type[Any]] = nexus.service_handler(name=name)
        found.append(decorate(type(name, (), operations))())
    return found


def _caller(callback_url: str | None) -> str:
    found = _CALLBACK_PATH.search(callback_url or "")
    return NATIVE_CALLER + (unquote(found[1]) if found else "")
