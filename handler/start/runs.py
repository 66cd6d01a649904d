"""Reads of the runs in the handler's namespace, and of the calls that started them."""

from temporalio.api.common.v1 import Payload
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.protocol.headers import OPERATION_TOKEN
from bridge.protocol.link import WorkflowRef
from bridge.runtime.temporal import describe
from bridge.workflow.progress import MAX_PROGRESS_BYTES, PROGRESS_MEMO
from handler.delivery.calls import read_call
from handler.delivery.records import MEMO_KEY, CallMemo


class Runs:
    """Reads runs and their memos. The memo names the call that started a run."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def describe(self, workflow_id: str, run_id: str = "") -> WorkflowExecutionInfo | None:
        """Return a run, open or closed; None if it does not exist. Without *run_id*: the newest of *workflow_id*."""
        described = await describe(self._client, workflow_id, run_id)
        return None if described is None else described.workflow_execution_info

    async def has_callback(self, info: WorkflowExecutionInfo, operation_token: str) -> bool:
        """Whether the server already has a callback for this operation. The server copies callbacks to later runs."""
        described = await describe(self._client, info.execution.workflow_id, info.execution.run_id)
        headers = (each.callback.nexus.header for each in (described.callbacks if described is not None else ()))
        return any(header.get(OPERATION_TOKEN.lower()) == operation_token for header in headers)

    async def memo(self, info: WorkflowExecutionInfo) -> CallMemo | None:
        """Return the call that started the run; None if no call did.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, the codec failed.
        """
        payload = info.memo.fields.get(MEMO_KEY)
        if payload is None:
            return None
        return await read_call(self._client.data_converter, payload, target=info.execution.workflow_id)

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
