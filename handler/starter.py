"""From a start request to a run: started once, however often and by whomever it is asked for.

Temporal deduplicates by a request id that is a keyed hash of caller, request id and input. An equal repeat so finds its
run without a look-up; everything else is decided by the memo of the run that holds the workflow id.
"""

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from nexusrpc import HandlerError, HandlerErrorType
from temporalio.api.common.v1 import Memo, Payload, Payloads, RetryPolicy, WorkflowType
from temporalio.api.enums.v1 import WorkflowExecutionStatus, WorkflowIdConflictPolicy, WorkflowIdReusePolicy
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.api.workflowservice.v1 import (
    SignalWorkflowExecutionRequest,
    StartWorkflowExecutionRequest,
    StartWorkflowExecutionResponse,
)
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from bridge.errors import OutcomeUnknownError, UnavailableError, bad_request
from bridge.links import WorkflowRef, to_temporal_link
from bridge.namespace import is_open
from bridge.operations import Target
from bridge.starts import Finished, Running, StartAnswer, StartRequest
from bridge.tokens import OperationTokens
from handler.calls import ATTACH_SIGNAL, MEMO_KEY, CallMemo
from handler.outcomes import read_outcome
from handler.runs import Runs

DEFAULT_DEADLINE = timedelta(days=7)
"""How long we deliver to a caller that names no deadline."""

_MAX_WORKFLOW_ID = 1000
_LOOKS = 3
"""How often a run that changes while it is looked at is looked at again, in one request."""
_RETENTION_MARGIN = timedelta(minutes=10)
"""For the clocks of two namespaces: a start this close to retention is already too old to start a run."""

_PASSED_ON = frozenset({"temporal-callback-token", "source", "bridge-token"})
"""Callback headers that a caller may ask us to send. Anything else could replace what the protocol says."""

_TEMPORAL_IS_AWAY = frozenset(
    {
        *(RPCStatusCode.UNAVAILABLE, RPCStatusCode.DEADLINE_EXCEEDED, RPCStatusCode.CANCELLED, RPCStatusCode.ABORTED),
        # Our own credentials were refused: no fault of the caller's.
        *(
            RPCStatusCode.PERMISSION_DENIED,
            RPCStatusCode.UNAUTHENTICATED,
            RPCStatusCode.UNKNOWN,
            RPCStatusCode.INTERNAL,
        ),
    }
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """What makes a start the same start."""

    workflow_id: str
    input_hash: str
    temporal_request_id: str


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
        clock: Callable[[], datetime],
        is_eager: bool = False,
    ) -> None:
        """*is_eager*: a worker for the task queue lives in this process and uses the same client."""
        self._client = client
        self._runs = Runs(client)
        self._tokens = tokens
        self._hash_key = hash_key
        self._task_queue = task_queue
        self._retention = retention
        self._clock = clock
        self._is_eager = is_eager

    async def start(self, caller: str, target: Target, request: StartRequest, payload: Payload) -> StartAnswer:
        """Start *target* for the authenticated *caller*, or find out how its operation stands.

        The answer to a renewal carries the progress that a running target has reported.

        Raises:
            nexusrpc.HandlerError: The input is refused, the id is held by somebody else, or Temporal is away.
        """
        answer = await self._answer(caller, target, request, payload)
        if isinstance(answer, Running) and request.attempt > 1 and target.instrumented and answer.target is not None:
            return replace(answer, progress=await self._runs.progress(answer.target))
        return answer

    async def _answer(self, caller: str, target: Target, request: StartRequest, payload: Payload) -> StartAnswer:
        identity = await self._identify(caller, target, request, payload)
        token = self._tokens.mint(caller=caller, workflow_id=identity.workflow_id, request_id=request.request_id)
        try:
            if await self._is_too_old(request):
                return await self._answer_for_holder(caller, target, request, identity, token=token, may_start=False)
            started = await self._start(caller, target, request, payload, identity, token=token)
            if started is not None and started.status in {
                WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
                WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_UNSPECIFIED,
            }:
                return Running(operation_token=token, target=self._runs.ref(identity.workflow_id, started.run_id))
            return await self._answer_for_holder(caller, target, request, identity, token=token, may_start=True)
        except RPCError as error:
            raise translated(error) from None

    async def _identify(self, caller: str, target: Target, request: StartRequest, payload: Payload) -> _Identity:
        converter = self._client.data_converter
        try:
            [decoded] = await converter.payload_codec.decode([payload]) if converter.payload_codec else [payload]
        except Exception as error:  # noqa: BLE001 - whatever the team's own codec raises: its keys may be away
            _log.warning("bridge.codec_failed", extra={"bridge.error": type(error).__name__})
            message = "the handler cannot decode inputs at the moment"
            raise UnavailableError(message) from None
        try:
            [value] = converter.payload_converter.from_payloads([decoded], [target.input_type])
        except Exception as error:  # noqa: BLE001 - whatever the team's own converter raises on foreign bytes
            message = f"the input is not a {_name(target.input_type)} ({type(error).__name__})"
            raise bad_request(message) from None
        if target.check is not None:
            try:
                target.check(value)
            except ValueError as error:
                raise bad_request(str(error)[:1000]) from None
        workflow_id = target.workflow_id(value)
        if not 0 < len(workflow_id) <= _MAX_WORKFLOW_ID:
            message = f"the workflow id has {len(workflow_id)} characters, 1 to {_MAX_WORKFLOW_ID} are allowed"
            raise bad_request(message)
        input_hash = self._hash("input", *_canonical(decoded))
        names = (caller, target.service, target.operation, request.request_id, input_hash)
        return _Identity(
            workflow_id=workflow_id,
            input_hash=input_hash,
            temporal_request_id=self._hash("request", *(name.encode() for name in names)),
        )

    def _hash(self, purpose: str, *parts: bytes) -> str:
        digest = hmac.new(self._hash_key, digestmod=hashlib.sha256)
        for part in (purpose.encode(), *parts):
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    async def _is_too_old(self, request: StartRequest) -> bool:
        if request.scheduled_time is None:
            return False
        return self._clock() - request.scheduled_time > await self._retention() - _RETENTION_MARGIN

    async def _start(
        self,
        caller: str,
        target: Target,
        request: StartRequest,
        payload: Payload,
        identity: _Identity,
        *,
        token: str,
    ) -> StartWorkflowExecutionResponse | None:
        """Ask for the run. None if the workflow id is held by a run that this start did not make."""
        links = [link for link in map(to_temporal_link, request.links) if link is not None]
        memo = self._memo(caller, request, identity, token=token, on_orphaned=target.on_orphaned)
        [memo_payload] = await self._client.data_converter.encode([memo])
        try:
            response = await self._client.workflow_service.start_workflow_execution(
                StartWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_id=identity.workflow_id,
                    workflow_type=WorkflowType(name=target.workflow_type),
                    task_queue=TaskQueue(name=target.task_queue or self._task_queue),
                    input=Payloads(payloads=[payload]),
                    identity=self._client.identity,
                    request_id=identity.temporal_request_id,
                    workflow_id_reuse_policy=WorkflowIdReusePolicy.WORKFLOW_ID_REUSE_POLICY_REJECT_DUPLICATE,
                    workflow_id_conflict_policy=WorkflowIdConflictPolicy.WORKFLOW_ID_CONFLICT_POLICY_USE_EXISTING,
                    memo=Memo(fields={MEMO_KEY: memo_payload}),
                    retry_policy=_retry_policy(target),
                    links=links,
                    workflow_execution_timeout=_bound(target, request),
                    request_eager_execution=self._is_eager and target.task_queue in {None, self._task_queue},
                ),
                # Not only for the retries: without it the SDK does not hand an eager first task to its worker, and
                # the target would wait for its workflow task timeout.
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.ALREADY_EXISTS:
                return None
            raise
        return response if response.started else None

    def _memo(
        self, caller: str, request: StartRequest, identity: _Identity, *, token: str, on_orphaned: str
    ) -> CallMemo:
        source = WorkflowRef.from_links(request.links)
        deadline = self._clock() + (request.operation_timeout or DEFAULT_DEADLINE)
        return CallMemo(
            caller=caller,
            request_id=request.request_id,
            input_hash=identity.input_hash,
            service=request.service,
            operation=request.operation,
            operation_token=token,
            callback_url=request.callback_url,
            callback_headers={name: each for name, each in request.callback_headers.items() if name in _PASSED_ON},
            deadline_ms=int(deadline.timestamp() * 1000),
            caller_namespace=source.namespace if source else "",
            caller_workflow_id=source.workflow_id if source else "",
            caller_run_id=source.run_id if source else "",
            on_orphaned=on_orphaned,
        )

    async def _answer_for_holder(
        self,
        caller: str,
        target: Target,
        request: StartRequest,
        identity: _Identity,
        *,
        token: str,
        may_start: bool,
    ) -> StartAnswer:
        """Answer by the run that holds the workflow id, if its memo shows that *caller* may know of it."""
        for _ in range(_LOOKS):
            holder = await self._runs.describe(identity.workflow_id)
            if holder is None and not may_start:
                message = "the operation was scheduled longer ago than the handler keeps closed runs: outcome unknown"
                raise OutcomeUnknownError(message)
            if holder is None:
                break
            memo = await self._runs.memo(holder)
            # A memo is compared before a word is said: workflow ids are business ids, and all callers share them.
            is_own = memo is not None and memo.caller == caller
            # So is the workflow type: two operations may lead to one id, and one's outcome is not the other's.
            if holder.type.name != target.workflow_type or (not is_own and not target.shared):
                message = "the workflow id that this input leads to is taken"
                raise bad_request(message)
            is_same = is_own and memo is not None and memo.request_id == request.request_id
            if is_same and memo is not None and memo.input_hash != identity.input_hash:
                message = "this request id was used before with another input"
                raise bad_request(message)
            ref = self._runs.ref(identity.workflow_id, holder.execution.run_id)
            if is_open(holder):
                call = self._memo(caller, request, identity, token=token, on_orphaned=target.on_orphaned)
                if is_same or await self._attach(target, holder, identity, call):
                    return Running(operation_token=token, target=ref)
            elif (outcome := await read_outcome(self._client, ref.workflow_id, ref.run_id)) is not None:
                return Finished(outcome=outcome.fitted(), target=ref)
            # It closed, or went on as another run, between two reads: look again.
        message = "the run is changing, try again"
        raise UnavailableError(message)

    async def _attach(self, target: Target, holder: WorkflowExecutionInfo, identity: _Identity, call: CallMemo) -> bool:
        """Have the run tell *call* too. False if it closed before it could promise that.

        Accepted is told: a signal that is accepted while the run closes makes the server refuse the closing.
        """
        if not target.instrumented or (call.callback_url is None and target.on_orphaned == "keep"):
            # Nobody to do it, or nobody to tell or to mind: renewals or the sweep find the outcome.
            return True
        try:
            await self._client.workflow_service.signal_workflow_execution(
                SignalWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_execution=holder.execution,
                    signal_name=ATTACH_SIGNAL,
                    input=Payloads(payloads=await self._client.data_converter.encode([call])),
                    identity=self._client.identity,
                    # A renewal attaches again, and is one event with the first.
                    request_id=identity.temporal_request_id,
                ),
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise
        return True


def _bound(target: Target, request: StartRequest) -> Duration | None:
    """The workflow's own timeout, where the operation takes over its caller's."""
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


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def translated(error: RPCError) -> HandlerError:
    """The caller's view of a refusal by our Temporal; its text may repeat a callback URL, so it stays here."""
    _log.warning("bridge.start_failed", extra={"bridge.rpc_status": error.status.name})
    if error.status is RPCStatusCode.RESOURCE_EXHAUSTED:
        return HandlerError("too many starts at the moment", type=HandlerErrorType.RESOURCE_EXHAUSTED)
    if error.status is RPCStatusCode.INVALID_ARGUMENT:
        return bad_request("the start is not acceptable to the handler's Temporal")
    if error.status in _TEMPORAL_IS_AWAY or error.status is RPCStatusCode.NOT_FOUND:
        return UnavailableError("the handler's Temporal cannot be reached")
    return HandlerError("internal error", type=HandlerErrorType.INTERNAL)
