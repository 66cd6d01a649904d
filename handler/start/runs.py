"""The runs in the handler's namespace. This module looks up runs, starts them, and attaches calls to them.

Temporal deduplicates starts by its own request id. We set it to a keyed hash of the caller, the service, the operation,
the call's request id and the hash of the input.
"""

from dataclasses import dataclass, replace
from datetime import timedelta

from temporalio.api.common.v1 import Callback, Header, Memo, Payload, Payloads, WorkflowExecution, WorkflowType
from temporalio.api.enums.v1 import WorkflowIdConflictPolicy, WorkflowIdReusePolicy
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflow.v1 import OnConflictOptions
from temporalio.api.workflowservice import v1 as workflowservice
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.protocol.headers import OPERATION_TOKEN
from bridge.protocol.link import WorkflowRef, to_temporal_link
from bridge.runtime.tracing import workflow_header
from bridge.temporal.executions import describe, is_open
from bridge.temporal.rpc_status import is_missing
from bridge.workflow.progress import MAX_PROGRESS_BYTES, PROGRESS_MEMO
from handler.delivery.calls import read_memo
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY, CallMemo
from handler.settings import HandlerSettings
from handler.start.call import Call
from handler.start.description import CALLER_MEMO, describe_call
from handler.start.rpc_errors import callback_refused, run_is_full

_MAX_LINK_BYTES = 4000
"""Temporal's default limit (`frontend.linkMaxSize`). With a larger link the server would refuse the start."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The newest run of a workflow id, open or closed."""

    ref: WorkflowRef
    """Its namespace, workflow id and run id."""
    workflow_type: str
    """Temporal's name of the workflow."""
    first_run_id: str
    """The first run of its chain of continue-as-new, retry or cron."""
    events: int
    """Length of its history."""
    history_bytes: int
    """Size of its history."""
    start_time_ms: int
    """Its start, Unix time in milliseconds."""
    is_open: bool
    """Whether it has not closed."""
    memo: CallMemo | None
    """The call that started the first run of its chain; None if no call did."""
    is_recorded: bool
    """Whether its own memo names the call. A worker without the plugin may have continued it with another memo."""
    served: frozenset[str]
    """Operation tokens of the calls to which Temporal's server delivers the outcome. A run that continues this run has
    the same tokens."""
    progress: Payload | None
    """The last progress that the run reported, encoded by its worker's data converter. None if it reported none."""


async def find_run(client: Client, workflow_id: str) -> Run | None:
    """Return the newest run of *workflow_id* in the namespace of *client*; None if it does not exist.

    The memo of a run that continues another is that of the chain's first run, if its own does not name a call.

    Raises:
        nexusrpc.HandlerError: UNAVAILABLE, the codec failed.
    """
    described = await describe(client, workflow_id)
    if described is None:
        return None
    info = described.workflow_execution_info
    headers = (each.callback.nexus.header for each in described.callbacks)
    memo = own = await read_memo(client.data_converter, info)
    if own is None and info.first_run_id not in {"", info.execution.run_id}:
        first = await describe(client, workflow_id, info.first_run_id)
        memo = None if first is None else await read_memo(client.data_converter, first.workflow_execution_info)
    progress = info.memo.fields.get(PROGRESS_MEMO)
    if progress is not None and (progress.external_payloads or progress.ByteSize() > MAX_PROGRESS_BYTES):
        # Progress is a short text for people. A long text and a reference to external storage are left out.
        progress = None
    return Run(
        ref=WorkflowRef(namespace=client.namespace, workflow_id=workflow_id, run_id=info.execution.run_id),
        workflow_type=info.type.name,
        first_run_id=info.first_run_id,
        events=info.history_length,
        history_bytes=info.history_size_bytes,
        start_time_ms=info.start_time.ToMilliseconds(),
        is_open=is_open(info),
        memo=memo,
        is_recorded=own is not None,
        served=frozenset(header.get(OPERATION_TOKEN.lower(), "") for header in headers),
        progress=progress,
    )


class Runs:
    """Starts runs in one namespace, and attaches calls to them."""

    def __init__(self, client: Client, settings: HandlerSettings, *, is_eager: bool = False) -> None:
        """Prepare to start runs in *client*'s namespace.

        Args:
            client: Connected to the handler's namespace.
            settings: Name the task queue of targets that name none, and the Temporal UI of each caller.
            is_eager: Whether a worker for the task queue runs in this process and uses the same client.
        """
        self._client = client
        self._settings = settings
        self._is_eager = is_eager
        # Keep memos and signals inline, so that visibility and workers read them without external storage.
        self._inline = replace(client.data_converter, external_storage=None)

    async def start(
        self, call: Call, memo: CallMemo, on_conflict: OnConflictOptions | None = None
    ) -> workflowservice.StartWorkflowExecutionResponse | None:
        """Start the run, or find the open run with the workflow id. None if a closed run of another start has the id.

        *on_conflict* names what to attach to an open run. Even empty options write an event to its history.
        """
        target, request, callback = call.target, call.request, call.server_callback
        task_queue = target.task_queue or self._settings.task_queue
        callbacks = []
        if callback is not None:
            # If the completion arrives before the answer to the start, the token in its header names the operation.
            header = {**callback.header, OPERATION_TOKEN.lower(): call.token}
            callbacks = [Callback(nexus=Callback.Nexus(url=callback.url, header=header))]
        timeout = request.operation_timeout if target.bounded else None
        caller_memo, metadata = await describe_call(
            memo, converter=self._inline, ui_url=self._settings.caller(memo.caller).ui_url
        )
        message = workflowservice.StartWorkflowExecutionRequest(
            namespace=self._client.namespace,
            workflow_id=call.workflow_id,
            workflow_type=WorkflowType(name=target.workflow_type),
            task_queue=TaskQueue(name=task_queue),
            input=Payloads(payloads=[call.payload]),
            identity=self._client.identity,
            request_id=call.temporal_request_id,
            workflow_id_reuse_policy=WorkflowIdReusePolicy.WORKFLOW_ID_REUSE_POLICY_REJECT_DUPLICATE,
            workflow_id_conflict_policy=WorkflowIdConflictPolicy.WORKFLOW_ID_CONFLICT_POLICY_USE_EXISTING,
            on_conflict_options=on_conflict,
            memo=Memo(fields={CALLER_MEMO: caller_memo, MEMO_KEY: (await self._inline.encode([memo]))[0]}),
            user_metadata=metadata,
            header=Header(fields=workflow_header()),
            links=[
                link for link in map(to_temporal_link, request.links) if link and link.ByteSize() <= _MAX_LINK_BYTES
            ],
            completion_callbacks=callbacks,
            request_eager_execution=self._is_eager and task_queue == self._settings.task_queue,
        )
        if timeout is not None:
            # Zero would mean no timeout.
            message.workflow_execution_timeout.FromTimedelta(max(timeout, timedelta(milliseconds=1)))
        if target.retry_policy is not None:
            target.retry_policy.apply_to_proto(message.retry_policy)
        try:
            # `retry` matters for eager starts too: without it the SDK does not pass an eager first task to its worker,
            # and the target would wait for its workflow task timeout.
            return await self._client.workflow_service.start_workflow_execution(message, retry=True)
        except RPCError as error:
            if error.status is RPCStatusCode.ALREADY_EXISTS:
                return None
            # Servers from 1.31 answer FAILED_PRECONDITION if there are too many callbacks.
            refused = {RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.FAILED_PRECONDITION}
            if callback is not None and error.status in refused:
                raise callback_refused(callback.url, error) from None
            raise

    async def attach(self, call: Call, memo: CallMemo, run: Run) -> bool:
        """Attach *call* to *run* by a signal, so that it gets the outcome too. False if the run has closed."""
        request = workflowservice.SignalWorkflowExecutionRequest(
            namespace=self._client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=run.ref.workflow_id, run_id=run.ref.run_id),
            signal_name=ATTACH_SIGNAL,
            input=Payloads(payloads=await self._inline.encode([memo])),
            identity=self._client.identity,
            # A renewal sends the signal again. The server drops the repeated signal, which has the same request id.
            request_id=call.temporal_request_id,
        )
        try:
            await self._client.workflow_service.signal_workflow_execution(request, retry=True)
        except RPCError as error:
            if is_missing(error):
                return False
            if error.status is RPCStatusCode.INVALID_ARGUMENT and "signal" in error.message:
                # The run has received as many signals as the server allows one run.
                raise run_is_full() from None
            raise
        return True
