"""From a cancel request to a cancel of the target. Cancel asks, it does not decide."""

from temporalio.api.workflowservice.v1 import RequestCancelWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.errors import UntrustedError, not_found
from bridge.runtime.temporal import is_open
from bridge.security.callback_tokens import OperationTokens
from handler.delivery.records import NATIVE_CALLER
from handler.start.runs import Runs
from handler.start.starter import translated


class Canceler:
    """Cancels targets in one handler namespace."""

    def __init__(self, *, client: Client, tokens: OperationTokens) -> None:
        self._client = client
        self._tokens = tokens
        self._runs = Runs(client)

    async def cancel(self, caller: str | None, operation_token: str) -> None:
        """Ask the target behind *operation_token* to cancel. Asked twice, or after its end, nothing happens.

        *caller* is None for a native Nexus call, where the token alone tells whose operation it is.

        Raises:
            nexusrpc.HandlerError: NOT_FOUND if the token never was one of ours for this caller; else Temporal is away.
        """
        try:
            claims = self._tokens.verify(operation_token)
        except UntrustedError:
            message = "no such operation"
            raise not_found(message) from None
        is_own = claims.caller.startswith(NATIVE_CALLER) if caller is None else claims.caller == caller
        if not is_own:
            message = "no such operation"
            raise not_found(message)
        try:
            run = await self._runs.describe(claims.wid)
            if run is None or not is_open(run):
                return
            memo = await self._runs.memo(run)
            if memo is None or memo.caller != claims.caller:
                # The id has passed to somebody else's run since.
                return
            await self._client.workflow_service.request_cancel_workflow_execution(
                RequestCancelWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_execution=run.execution,
                    identity=self._client.identity,
                    # The operation's own id: however often it is asked for, history shows one request.
                    request_id=claims.rid,
                    reason=f"canceled by {claims.caller}",
                ),
                retry=True,
            )
        except RPCError as error:
            if error.status is not RPCStatusCode.NOT_FOUND:
                raise translated(error) from None
