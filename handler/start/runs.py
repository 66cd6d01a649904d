"""Reads of the runs in the handler's namespace, and of the calls that started them."""

import logging

from temporalio.api.common.v1 import Payload, WorkflowExecution
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import DescribeWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.errors import UnavailableError
from bridge.protocol.headers import OPERATION_TOKEN
from bridge.protocol.link import WorkflowRef
from bridge.workflow.progress import MAX_PROGRESS_BYTES, PROGRESS_MEMO
from handler.delivery.records import MEMO_KEY, CallMemo

UNAVAILABLE = (
    {RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.RESOURCE_EXHAUSTED}
    | {RPCStatusCode.ABORTED, RPCStatusCode.CANCELLED, RPCStatusCode.UNKNOWN}
    | {RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED}
)
"""Statuses of a call to Temporal that may succeed later. Refused credentials are a fault of ours, not the caller's."""

_log = logging.getLogger(__name__)


class Runs:
    """Reads runs and their memos. The memo names the call that started a run."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def describe(self, workflow_id: str, run_id: str = "") -> WorkflowExecutionInfo | None:
        """Return a run, open or closed; None if it does not exist. Without *run_id*: the newest of *workflow_id*."""
        try:
            described = await self._client.workflow_service.describe_workflow_execution(
                DescribeWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id),
                ),
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return None
            raise
        return described.workflow_execution_info

    async def has_callback(self, info: WorkflowExecutionInfo, operation_token: str) -> bool:
        """Whether the server already has a callback for this operation. The server copies callbacks to later runs."""
        described = await self._client.workflow_service.describe_workflow_execution(
            DescribeWorkflowExecutionRequest(namespace=self._client.namespace, execution=info.execution), retry=True
        )
        headers = (each.callback.nexus.header for each in described.callbacks)
        return any(header.get(OPERATION_TOKEN.lower()) == operation_token for header in headers)

    async def memo(self, info: WorkflowExecutionInfo) -> CallMemo | None:
        """Return the call that started the run; None if no call did.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, the codec failed.
        """
        payload = info.memo.fields.get(MEMO_KEY)
        if payload is None:
            return None
        converter = self._client.data_converter
        try:
            [decoded] = await converter.payload_codec.decode([payload]) if converter.payload_codec else [payload]
        except Exception as error:  # noqa: BLE001 - any error of the codec: its keys may be unavailable
            _log.warning("bridge.codec_failed", extra={"bridge.error": type(error).__name__})
            message = "the handler cannot decode memos at the moment"
            raise UnavailableError(message) from None
        try:
            [memo] = converter.payload_converter.from_payloads([decoded], [CallMemo])
        except Exception as error:  # noqa: BLE001 - another program wrote a memo under our key
            _log.warning("bridge.memo_unreadable", extra={"bridge.error": type(error).__name__})
            return None
        return memo if isinstance(memo, CallMemo) else None

    async def progress(self, target: WorkflowRef) -> Payload | None:
        """Return the target's last progress, as its worker's converter and codec made it; None without progress.

        A reference to external storage is left out, because progress is a few words for people.
        """
        try:
            info = await self.describe(target.workflow_id, target.run_id)
        except RPCError:
            # Progress is optional: answer without it.
            return None
        found = None if info is None else info.memo.fields.get(PROGRESS_MEMO)
        return None if found is None or found.external_payloads or found.ByteSize() > MAX_PROGRESS_BYTES else found

    def ref(self, workflow_id: str, run_id: str) -> WorkflowRef:
        """Return the reference to a run in our namespace."""
        return WorkflowRef(namespace=self._client.namespace, workflow_id=workflow_id, run_id=run_id)
