"""The runs of the handler's namespace, as the calls behind them see them."""

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

_log = logging.getLogger(__name__)


class Runs:
    """Reads runs and the memo by which each tells whose it is."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def describe(self, workflow_id: str, run_id: str = "") -> WorkflowExecutionInfo | None:
        """The run, or the one that holds *workflow_id*, open or closed; None if there is none."""
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
        """Whether the server tells the operation of that token already: what is attached is carried to later runs."""
        described = await self._client.workflow_service.describe_workflow_execution(
            DescribeWorkflowExecutionRequest(namespace=self._client.namespace, execution=info.execution), retry=True
        )
        headers = (each.callback.nexus.header for each in described.callbacks)
        return any(header.get(OPERATION_TOKEN.lower()) == operation_token for header in headers)

    async def memo(self, info: WorkflowExecutionInfo) -> CallMemo | None:
        """The call that started the run; None if no call did."""
        payload = info.memo.fields.get(MEMO_KEY)
        if payload is None:
            return None
        converter = self._client.data_converter
        try:
            [decoded] = await converter.payload_codec.decode([payload]) if converter.payload_codec else [payload]
        except Exception as error:  # noqa: BLE001 - whatever the codec raises: its keys may be away, and then we know nothing
            _log.warning("bridge.codec_failed", extra={"bridge.error": type(error).__name__})
            message = "the handler cannot decode memos at the moment"
            raise UnavailableError(message) from None
        try:
            [memo] = converter.payload_converter.from_payloads([decoded], [CallMemo])
        except Exception as error:  # noqa: BLE001 - a memo that somebody else wrote under our key
            _log.warning("bridge.memo_unreadable", extra={"bridge.error": type(error).__name__})
            return None
        return memo if isinstance(memo, CallMemo) else None

    async def progress(self, target: WorkflowRef) -> Payload | None:
        """What the target last reported, as its worker's converter and codec made it; None where it reports nothing.

        A reference to external storage is left out: progress is a few words for people.
        """
        try:
            info = await self.describe(target.workflow_id, target.run_id)
        except RPCError:
            # The answer is as good without.
            return None
        found = None if info is None else info.memo.fields.get(PROGRESS_MEMO)
        return None if found is None or found.external_payloads or found.ByteSize() > MAX_PROGRESS_BYTES else found

    def ref(self, workflow_id: str, run_id: str) -> WorkflowRef:
        """The name of a run in our namespace."""
        return WorkflowRef(namespace=self._client.namespace, workflow_id=workflow_id, run_id=run_id)
