"""From a cancel request to a cancellation request for the target. The target may still succeed."""

from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.errors import not_found
from bridge.temporal.connection import Namespace
from bridge.temporal.rpc_status import is_missing
from bridge.workflow.targets import Target
from handler.delivery.operation_token import OperationToken
from handler.delivery.records import NATIVE_CALLER
from handler.start.rpc_errors import handler_error_from_rpc
from handler.start.runs import find_run
from handler.start.same_call import may_cancel


class Canceler:
    """Cancels targets in one handler namespace."""

    def __init__(self, *, client: Client, namespace: Namespace) -> None:
        self._client = client
        self._namespace = namespace

    async def cancel(self, caller: str | None, target: Target | None, operation_token: str) -> None:
        """Request cancellation of the run behind *operation_token*. A repeat, or a closed run, changes nothing.

        Args:
            caller: Authenticated name of the caller; None for a native Nexus call.
            target: The operation's workflow; None for an operation without one, which no token names.
            operation_token: As the caller sent it.

        Raises:
            nexusrpc.HandlerError: NOT_FOUND, the token names no operation of this caller and target; else Temporal did
                not carry out the request.
        """
        token = OperationToken.decode(operation_token)
        try:
            if token is not None and target is not None and token.namespace_id == await self._namespace.id():
                run = await find_run(self._client, token.workflow_id)
                if run is not None and may_cancel(caller, target, token.request_id, run):
                    if run.is_open:
                        by = NATIVE_CALLER if caller is None else caller
                        # The server keeps one cancellation request for any number of repeats.
                        # The run may continue as another run meanwhile, which is then the one to cancel.
                        handle = self._client.get_workflow_handle(
                            token.workflow_id, first_execution_run_id=run.first_run_id
                        )
                        await handle.cancel(reason=f"canceled by {by}")
                    return
        except RPCError as error:
            if is_missing(error):
                # The run has closed meanwhile.
                return
            # INVALID_ARGUMENT: no workflow can have the id in the token.
            if error.status is not RPCStatusCode.INVALID_ARGUMENT:
                raise handler_error_from_rpc(error) from None
        # One answer for all cases, so that a forged token does not reveal whether a workflow id is held.
        message = "no such operation"
        raise not_found(message)
