"""From a cancel request to a cancellation request for the target. The target may still succeed."""

from temporalio.api.workflowservice.v1 import RequestCancelWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.errors import UntrustedError, not_found
from bridge.runtime.temporal import is_missing, is_open
from bridge.security.callback_tokens import OperationTokens
from handler.delivery.records import NATIVE_CALLER
from handler.start.runs import Runs
from handler.start.starter import handler_error_from_rpc


class Canceler:
    """Cancels targets in one handler namespace."""

    def __init__(self, *, client: Client, tokens: OperationTokens) -> None:
        self._client = client
        self._tokens = tokens
        self._runs = Runs(client)

    async def cancel(self, caller: str | None, operation_token: str) -> None:
        """Request cancellation of the target behind *operation_token*. A repeat, or a closed target, changes nothing.

        *caller* is None for a native Nexus call. The token alone then identifies the caller.

        Raises:
            nexusrpc.HandlerError: NOT_FOUND, the token was not made for an operation of this caller; else Temporal did
                not carry out the request.
        """
        message = "no such operation"
        try:
            claims = self._tokens.verify(operation_token)
        except UntrustedError:
            raise not_found(message) from None
        if not (claims.caller.startswith(NATIVE_CALLER) if caller is None else claims.caller == caller):
            raise not_found(message)
        try:
            run = await self._runs.describe(claims.wid)
            if run is None or not is_open(run):
                return
            memo = await self._runs.memo(run)
            if memo is None or memo.caller != claims.caller:
                # The workflow id now belongs to a run of another caller.
                return
            await self._client.workflow_service.request_cancel_workflow_execution(
                RequestCancelWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_execution=run.execution,
                    identity=self._client.identity,
                    # Use the operation's request id, so that history shows one request for any number of repeats.
                    request_id=claims.rid,
                    reason=f"canceled by {claims.caller}",
                ),
                retry=True,
            )
        except RPCError as error:
            if not is_missing(error):
                raise handler_error_from_rpc(error) from None
