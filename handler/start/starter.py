"""From a start request to a run. A repeated request, from any caller, starts no second run.

Temporal deduplicates by a request id, which is a keyed hash of caller, operation, request id and input. An equal repeat
therefore finds its run without a look-up. In all other cases the memo of the run that holds the workflow id decides.
"""

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType

from google.protobuf.duration_pb2 import Duration
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.common.v1 import Callback, Memo, Payload, Payloads, RetryPolicy, WorkflowType
from temporalio.api.enums.v1 import WorkflowExecutionStatus, WorkflowIdConflictPolicy, WorkflowIdReusePolicy
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflow.v1 import OnConflictOptions, WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    SignalWorkflowExecutionRequest,
    StartWorkflowExecutionRequest,
    StartWorkflowExecutionResponse,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode
from yarl import URL

from bridge.errors import OutcomeUnknownError, UnavailableError, bad_request
from bridge.protocol.headers import OPERATION_TOKEN
from bridge.protocol.link import WorkflowRef, to_temporal_link
from bridge.protocol.payload import holds_reference
from bridge.protocol.start import Finished, Running, StartAnswer, StartRequest
from bridge.runtime.temporal import is_open
from bridge.security.callback_tokens import OperationTokens
from bridge.workflow.targets import Target
from handler.delivery.close_event import read_close_event, sendable
from handler.delivery.dispatcher import start_delivery_workflow
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY, NATIVE_CALLER, CallMemo, Delivery
from handler.settings import CallerPeer
from handler.start.conversion import Conversion
from handler.start.held_starts import HeldStarts
from handler.start.runs import UNAVAILABLE, Runs
from handler.start.user_functions import workflow_id_for

DEFAULT_DEADLINE = timedelta(days=7)
"""Deadline of deliveries to a caller that names no deadline."""

_TOO_OLD = "the operation was scheduled longer ago than the handler keeps closed runs: outcome unknown"
_LOOKS = 3
"""Maximum number of reads, in one request, of a run that changes meanwhile."""
_RETENTION_MARGIN = timedelta(minutes=10)
"""Allowance for clock differences: a start this close to the end of retention is already too old to start a run."""

_PASSED_ON = frozenset({"temporal-callback-token", "source"})
"""Callback headers that a caller may ask us to send. Other headers could replace headers of the protocol."""
_MAX_CALLBACK_HEADERS = 2048
"""Limit in characters, because continue-as-new carries all attached calls and the server terminates a run at 2 MiB."""

_MAX_HOLD_MARGIN = timedelta(seconds=2)

# Servers before the field `status` leave it unspecified.
_RUNNING = {
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
    WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_UNSPECIFIED,
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One start with the names that follow from it."""

    caller: str
    """Authenticated name of the caller."""
    target: Target
    """The workflow that the operation stands for."""
    request: StartRequest
    """As the caller sent it."""
    payload: Payload
    """The operation's input, encoded."""
    workflow_id: str
    """Derived from the input by the target's `workflow_id`."""
    input_hash: str
    """Keyed hash of the decoded input."""
    temporal_request_id: str
    """Keyed hash by which Temporal recognises an equal start."""
    token: str
    """Operation token of the answer."""
    server_callback: Callback.Nexus | None
    """To this callback Temporal's server delivers the outcome; None if a worker or the caller's renewals do."""
    hold: timedelta | None
    """How long the start is held open; None if it is answered at once."""


class Starter:
    """Starts targets in one handler namespace."""

    def __init__(
        self,
        *,
        client: Client,
        tokens: OperationTokens,
        hash_key: bytes,
        task_queue: str,
        retention: Callable[[], Awaitable[timedelta]],
        holds: HeldStarts,
        executor: Executor,
        clock: Callable[[], datetime],
        is_eager: bool = False,
        callers: Mapping[str, CallerPeer] = MappingProxyType({}),
    ) -> None:
        """Create a starter.

        Args:
            client: Connected to the handler's namespace.
            tokens: Mints the operation tokens.
            hash_key: Keys the input hash and the request ids.
            task_queue: Task queue of targets that name none.
            retention: How long the namespace keeps closed runs.
            holds: Keeps count of the starts that are held open.
            executor: Runs the team's `check` and `workflow_id`.
            clock: Returns the time.
            is_eager: Whether a worker for the task queue runs in this process and uses the same client.
            callers: The settings of the callers, by name.
        """
        self._client = client
        self._runs = Runs(client)
        self._conversion = Conversion(client.data_converter)
        self._executor = executor
        self._tokens = tokens
        self._hash_key = hash_key
        self._task_queue = task_queue
        self._retention = retention
        self._holds = holds
        self._clock = clock
        self._is_eager = is_eager
        self._callers = callers
        # Keep memos and signals inline, so that visibility and workers read them without external storage.
        self._inline = replace(client.data_converter, external_storage=None)

    async def start(
        self,
        caller: str,
        target: Target,
        request: StartRequest,
        payload: Payload,
        *,
        server_callback: Callback.Nexus | None = None,
        is_gone: Callable[[], bool] = lambda: False,
    ) -> StartAnswer:
        """Start *target* for the authenticated *caller*, or find the state of the operation that it started earlier.

        The answer to a renewal has the progress that a running target has reported.

        Args:
            caller: Authenticated name of the caller.
            target: The workflow that the operation stands for.
            request: The start. If it prefers to wait, it may be held open.
            payload: The operation's input.
            server_callback: The callback of a native Nexus call, to which Temporal's server delivers the outcome.
            is_gone: Whether the sender of the request has disconnected.

        Raises:
            nexusrpc.HandlerError: The input is refused, another call's run holds the workflow id, or Temporal did not
                start the run.
        """
        peer = self._callers.get(caller)
        with self._holds.reserve(request.wait) as hold:
            try:
                workflow_id, input_hash = await self._identify(peer, target, payload)
                names = (caller, target.service, target.operation, request.request_id, input_hash)
                start = _Start(
                    caller=caller,
                    target=target,
                    request=request,
                    payload=payload,
                    workflow_id=workflow_id,
                    input_hash=input_hash,
                    temporal_request_id=self._hash("request", *(name.encode() for name in names)),
                    token=self._tokens.mint(caller=caller, workflow_id=workflow_id, request_id=request.request_id),
                    server_callback=server_callback,
                    hold=hold,
                )
                answer = await self._answer(start)
                if hold is not None and answer.target is not None and isinstance(answer, Running):
                    answer = await self._holds.outcome_of(answer.target, within=hold) or answer
                    if isinstance(answer, Finished) and is_gone():
                        await self._deliver(start, answer)
                if isinstance(answer, Finished):
                    answer = replace(answer, outcome=await sendable(self._client.data_converter, answer.outcome, peer))
            except RPCError as error:
                raise handler_error_from_rpc(error) from None
        if isinstance(answer, Running) and request.attempt > 1 and target.instrumented and answer.target is not None:
            return replace(answer, progress=await self._runs.progress(answer.target))
        return answer

    async def _deliver(self, start: _Start, answer: Finished) -> None:
        """Deliver the outcome of a held start whose sender is gone. The worker leaves the outcome to the answer."""
        info = None if answer.target is None else await self._runs.describe(start.workflow_id, answer.target.run_id)
        if info is None or not start.target.instrumented or start.request.callback_url is None:
            return
        delivery = Delivery(
            call=self._memo(start),
            workflow_id=start.workflow_id,
            run_id=info.execution.run_id,
            start_time_ms=info.start_time.ToMilliseconds(),
        )
        task_queue = start.target.task_queue or self._task_queue
        await start_delivery_workflow(self._client, delivery, task_queue=task_queue)

    async def _answer(self, start: _Start) -> StartAnswer:
        if await self._is_too_old(start.request):
            return await self._answer_for_holder(start, may_start=False)
        response = await self._ask(start)
        # An equal repeat counts as started too, even if its run has closed.
        if response is not None and response.started and response.status in _RUNNING:
            target = self._runs.ref(start.workflow_id, response.run_id)
            return Running(operation_token=start.token, target=target)
        return await self._answer_for_holder(start, may_start=True)

    async def _identify(self, peer: CallerPeer | None, target: Target, payload: Payload) -> tuple[str, str]:
        """Check the input. Returns the workflow id and the input's hash."""
        if holds_reference(payload) and (peer is None or not peer.shares_storage):
            message = "the input is a reference to external storage, which this caller does not share with the handler"
            raise bad_request(message)
        opened = await self._conversion.open(payload)
        value = self._conversion.value(opened, target.input_type)
        workflow_id = await workflow_id_for(value, target, self._executor)
        return workflow_id, self._hash("input", *_canonical(opened))

    def _hash(self, purpose: str, *parts: bytes) -> str:
        digest = hmac.new(self._hash_key, digestmod=hashlib.sha256)
        for part in (purpose.encode(), *parts):
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    async def _is_too_old(self, request: StartRequest) -> bool:
        if request.scheduled_time is None:
            return False
        return self._clock() - request.scheduled_time > await self._retention() - _RETENTION_MARGIN

    async def _ask(
        self, start: _Start, on_conflict: OnConflictOptions | None = None
    ) -> StartWorkflowExecutionResponse | None:
        """Ask Temporal for the run. None if a closed run holds the workflow id.

        *on_conflict* names what to attach to an open run. Even empty options write an event to its history.
        """
        target, request = start.target, start.request
        [memo] = await self._inline.encode([self._memo(start)])
        callbacks = []
        if (callback := start.server_callback) is not None:
            # If the completion overtakes the answer to the start, the token in it names the operation.
            header = {**callback.header, OPERATION_TOKEN.lower(): start.token}
            callbacks = [Callback(nexus=Callback.Nexus(url=callback.url, header=header))]
        try:
            return await self._client.workflow_service.start_workflow_execution(
                StartWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_id=start.workflow_id,
                    workflow_type=WorkflowType(name=target.workflow_type),
                    task_queue=TaskQueue(name=target.task_queue or self._task_queue),
                    input=Payloads(payloads=[start.payload]),
                    identity=self._client.identity,
                    request_id=start.temporal_request_id,
                    workflow_id_reuse_policy=WorkflowIdReusePolicy.WORKFLOW_ID_REUSE_POLICY_REJECT_DUPLICATE,
                    workflow_id_conflict_policy=WorkflowIdConflictPolicy.WORKFLOW_ID_CONFLICT_POLICY_USE_EXISTING,
                    on_conflict_options=on_conflict,
                    memo=Memo(fields={MEMO_KEY: memo}),
                    retry_policy=_retry_policy(target),
                    links=[link for link in map(to_temporal_link, request.links) if link is not None],
                    completion_callbacks=callbacks,
                    workflow_execution_timeout=_bound(target, request),
                    request_eager_execution=self._is_eager and target.task_queue in {None, self._task_queue},
                ),
                # Needed for eager starts too: without `retry` the SDK does not pass an eager first task to its worker,
                # and the target would wait for its workflow task timeout.
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.ALREADY_EXISTS:
                return None
            # Servers from 1.31 answer FAILED_PRECONDITION if there are too many callbacks.
            if callback is not None and error.status in {
                RPCStatusCode.INVALID_ARGUMENT,
                RPCStatusCode.FAILED_PRECONDITION,
            }:
                raise _callback_refused(callback.url, error) from None
            raise

    def _memo(self, start: _Start) -> CallMemo:
        request, source = start.request, WorkflowRef.from_links(start.request.links)
        passed_on = {name: each for name, each in request.callback_headers.items() if name in _PASSED_ON}
        if sum(len(name) + len(value) for name, value in passed_on.items()) > _MAX_CALLBACK_HEADERS:
            message = f"the callback headers are over {_MAX_CALLBACK_HEADERS} characters"
            raise bad_request(message)
        deadline = self._clock() + (request.operation_timeout or DEFAULT_DEADLINE)
        return CallMemo(
            caller=start.caller,
            request_id=request.request_id,
            input_hash=start.input_hash,
            service=request.service,
            operation=request.operation,
            operation_token=start.token,
            # If the server delivers, no worker has to.
            callback_url=None if start.server_callback is not None else request.callback_url,
            callback_headers=passed_on if start.server_callback is None else {},
            deadline_ms=int(deadline.timestamp() * 1000),
            caller_namespace=source.namespace if source else "",
            caller_workflow_id=source.workflow_id if source else "",
            caller_run_id=source.run_id if source else "",
            caller_close_policy=start.target.caller_close_policy,
            held_ms=0 if start.hold is None else int(_answer_window(start.hold) / timedelta(milliseconds=1)),
            renews=request.scheduled_time is not None,
        )

    async def _answer_for_holder(self, start: _Start, *, may_start: bool) -> StartAnswer:
        """Answer with the state of the run that holds the workflow id, if its memo lets the caller know it."""
        for _ in range(_LOOKS):
            holder = await self._runs.describe(start.workflow_id)
            if holder is None and may_start:
                break
            if holder is None:
                raise OutcomeUnknownError(_TOO_OLD)
            memo = await self._runs.memo(holder)
            is_same = _is_same_call(start, holder, memo, may_start=may_start)
            ref = self._runs.ref(start.workflow_id, holder.execution.run_id)
            if is_open(holder):
                if is_same or await self._attach(start, holder, memo):
                    return Running(operation_token=start.token, target=ref)
            elif (closed := await read_close_event(self._client, ref.workflow_id, ref.run_id)) is not None:
                return Finished(outcome=closed.outcome, target=ref)
            # The run closed or continued as another run between two reads: read again.
        message = "the run is changing, try again"
        raise UnavailableError(message)

    async def _attach(self, start: _Start, holder: WorkflowExecutionInfo, memo: CallMemo | None) -> bool:
        """Attach this call to the run, so that it gets the outcome too. False if the run closed before.

        An attached call always gets the outcome: if the server accepts the signal while a worker closes the run, the
        server refuses the closing, and the worker sees the signal first.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, this caller does not renew, and no worker or sweep would deliver to it.
        """
        if start.server_callback is not None and not await self._runs.has_callback(holder, start.token):
            options = OnConflictOptions(
                attach_request_id=True, attach_completion_callbacks=True, attach_links=bool(start.request.links)
            )
            if await self._ask(start, options) is None:
                return False
        # A held start's answer does not replace the delivery to an attached call.
        call = replace(self._memo(start), held_ms=0)
        # A retried workflow's last run has not seen the first run's signals. The sweep reads only runs with a memo.
        is_certain = start.target.instrumented and start.target.retry_policy is None and memo is not None
        if call.callback_url is not None and not call.renews and not is_certain:
            message = "another call's run of this operation is still running: ask again for its outcome"
            raise UnavailableError(message)
        is_watched = start.target.caller_close_policy == "request_cancel"
        if not start.target.instrumented or (call.callback_url is None and not is_watched):
            # The caller's renewals get the outcome, or Temporal's server delivers it.
            return True
        try:
            await self._client.workflow_service.signal_workflow_execution(
                SignalWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_execution=holder.execution,
                    signal_name=ATTACH_SIGNAL,
                    input=Payloads(payloads=await self._inline.encode([call])),
                    identity=self._client.identity,
                    # A renewal sends the signal again. The server drops it by this id.
                    request_id=start.temporal_request_id,
                ),
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise
        return True


def _is_same_call(start: _Start, holder: WorkflowExecutionInfo, memo: CallMemo | None, *, may_start: bool) -> bool:
    """Whether the call of *start* started the run *holder*. False if it did not, but may attach to the run.

    Raises:
        nexusrpc.HandlerError: BAD_REQUEST or CONFLICT, the call must not get the outcome of this run.
        bridge.errors.OutcomeUnknownError: The same, for a start that is too old to start a run.
    """
    # Compare the memo before answering. Workflow ids are business ids that all callers share.
    is_own = memo is not None and memo.caller == start.caller
    # Servers from 1.31 do not name the calling namespace. Then only the call that started the run counts as its owner.
    if start.caller == NATIVE_CALLER and memo is not None:
        is_own = is_own and memo.request_id == start.request.request_id
    # Compare the workflow type too: two operations may lead to one id, and their outcomes differ.
    if holder.type.name != start.target.workflow_type or (not is_own and not start.target.attach_across_callers):
        if not may_start:
            # The answer must not reveal whether the id is held: old starts could probe ids without starting a run.
            raise OutcomeUnknownError(_TOO_OLD)
        message = "the workflow id that this input leads to is taken"
        raise bad_request(message)
    is_same = is_own and memo is not None and memo.request_id == start.request.request_id
    # A run that was started without the bridge has no hash. It counts as a run with another input.
    is_same_input = memo is not None and memo.input_hash == start.input_hash
    if is_same and not is_same_input:
        message = "this request id was used before with another input"
        raise bad_request(message)
    if start.target.on_input_mismatch == "refuse" and not is_same_input:
        message = "the workflow id that this input leads to belongs to a run with another input"
        raise HandlerError(message, type=HandlerErrorType.CONFLICT)
    return is_same


def _callback_refused(url: str, error: RPCError) -> HandlerError:
    """Return the error for a callback that our server refused. The caller is not at fault, and may retry."""
    if "callbacks to a workflow" in error.message:
        message = "more calls wait for this run than the handler's Temporal server allows: ask again for the outcome"
        return HandlerError(message, type=HandlerErrorType.RESOURCE_EXHAUSTED)
    if "callback" not in error.message:
        return handler_error_from_rpc(error)
    host = URL(url).authority
    message = (
        f"the handler's Temporal server refuses to send completions to {host}: "
        "its operator has to allow that in component.callbacks.allowedAddresses (from 1.32: callback.allowedAddresses)"
    )
    _log.error("bridge.server_callback_refused", extra={"bridge.callback_host": host})
    return UnavailableError(message, retry_after=timedelta(seconds=10))


def _answer_window(hold: timedelta) -> timedelta:
    """Return the time within which a closing run is delivered by the held start's own answer.

    It is shorter than *hold*, because the closing must reach the start while the start is still held.
    """
    return hold - min(hold / 5, _MAX_HOLD_MARGIN)


def _bound(target: Target, request: StartRequest) -> Duration | None:
    """Return the workflow's execution timeout if the operation is declared to adopt its caller's timeout."""
    if not target.bounded or request.operation_timeout is None:
        return None
    bound = Duration()
    bound.FromTimedelta(request.operation_timeout)
    return bound


def _canonical(payload: Payload) -> list[bytes]:
    metadata = [part for key in sorted(payload.metadata) for part in (key.encode(), payload.metadata[key])]
    return [*metadata, payload.data]


def _retry_policy(target: Target) -> RetryPolicy | None:
    if target.retry_policy is None:
        return None
    policy = RetryPolicy()
    target.retry_policy.apply_to_proto(policy)
    return policy


def handler_error_from_rpc(error: RPCError) -> HandlerError:
    """Return the error for the caller if Temporal failed. It omits the text, which may hold a callback URL."""
    _log.warning("bridge.start_failed", extra={"bridge.rpc_status": error.status.name})
    if error.status is RPCStatusCode.RESOURCE_EXHAUSTED:
        return HandlerError("too many starts at the moment", type=HandlerErrorType.RESOURCE_EXHAUSTED)
    if error.status is RPCStatusCode.INVALID_ARGUMENT:
        if "size exceeds limit" in error.message:
            return bad_request("the input is larger than the handler's namespace allows (limit.blobSize.error)")
        return bad_request("the handler's Temporal server refuses the start")
    if error.status in UNAVAILABLE | {RPCStatusCode.INTERNAL, RPCStatusCode.NOT_FOUND}:
        return UnavailableError("the handler cannot reach its Temporal server")
    return HandlerError("internal error", type=HandlerErrorType.INTERNAL)
