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
from bridge.protocol.start import Finished, Running, StartAnswer, StartRequest
from bridge.runtime.temporal import is_open
from bridge.security.callback_tokens import OperationTokens
from bridge.workflow.targets import Target
from handler.delivery.close_event import read_outcome
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY, CallMemo
from handler.start.held_starts import Holds
from handler.start.runs import Runs

DEFAULT_DEADLINE = timedelta(days=7)
"""How long we deliver to a caller that names no deadline."""

_MAX_WORKFLOW_ID = 1000
_TOO_OLD = "the operation was scheduled longer ago than the handler keeps closed runs: outcome unknown"
_LOOKS = 3
"""How often a run that changes while it is looked at is looked at again, in one request."""
_RETENTION_MARGIN = timedelta(minutes=10)
"""For the clocks of two namespaces: a start this close to retention is already too old to start a run."""

_PASSED_ON = frozenset({"temporal-callback-token", "source", "bridge-token"})
"""Callback headers that a caller may ask us to send. Anything else could replace what the protocol says."""

_MAX_HOLD_MARGIN = timedelta(seconds=2)

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


@dataclass(frozen=True, kw_only=True)
class _Start:
    """One start, and all that is known of it."""

    caller: str
    target: Target
    request: StartRequest
    payload: Payload
    identity: _Identity
    token: str
    server_callback: Callback.Nexus | None
    hold: timedelta | None


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
        holds: Holds,
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
        self._holds = holds
        self._clock = clock
        self._is_eager = is_eager

    async def start(
        self,
        caller: str,
        target: Target,
        request: StartRequest,
        payload: Payload,
        *,
        server_callback: Callback.Nexus | None = None,
    ) -> StartAnswer:
        """Start *target* for the authenticated *caller*, or find out how its operation stands.

        The answer to a renewal carries the progress that a running target has reported.

        Args:
            caller: Its name, as authenticated.
            target: What the operation stands for.
            request: The start; one that prefers to wait is held open for a while.
            payload: The operation's input.
            server_callback: Where Temporal's server shall tell the outcome, instead of the target's worker.

        Raises:
            nexusrpc.HandlerError: The input is refused, the id is held by somebody else, or Temporal is away.
        """
        with self._holds.reserve(request.wait) as hold:
            try:
                identity = await self._identify(caller, target, request, payload)
                start = _Start(
                    caller=caller,
                    target=target,
                    request=request,
                    payload=payload,
                    identity=identity,
                    token=self._tokens.mint(
                        caller=caller, workflow_id=identity.workflow_id, request_id=request.request_id
                    ),
                    server_callback=server_callback,
                    hold=hold,
                )
                answer = await self._answer(start)
                if hold is not None and answer.target is not None and isinstance(answer, Running):
                    answer = await self._holds.outcome_of(answer.target, within=hold) or answer
            except RPCError as error:
                raise translated(error) from None
        if isinstance(answer, Running) and request.attempt > 1 and target.instrumented and answer.target is not None:
            return replace(answer, progress=await self._runs.progress(answer.target))
        return answer

    def close(self) -> None:
        """Let go of the starts that are held open."""
        self._holds.close()

    async def _answer(self, start: _Start) -> StartAnswer:
        if await self._is_too_old(start.request):
            return await self._answer_for_holder(start, may_start=False)
        started = await self._start(start)
        if started is not None and started.status in {
            WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING,
            WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_UNSPECIFIED,
        }:
            target = self._runs.ref(start.identity.workflow_id, started.run_id)
            return Running(operation_token=start.token, target=target)
        return await self._answer_for_holder(start, may_start=True)

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

    async def _start(self, start: _Start) -> StartWorkflowExecutionResponse | None:
        """Ask for the run. None if the workflow id is held by a run that this start did not make."""
        response = await self._ask(start)
        return response if response is not None and response.started else None

    async def _ask(
        self, start: _Start, on_conflict: OnConflictOptions | None = None
    ) -> StartWorkflowExecutionResponse | None:
        """None if the run that holds the workflow id has closed.

        *on_conflict* says what to attach to one that is open. Even empty options write an event to its history.
        """
        target, request, identity = start.target, start.request, start.identity
        [memo] = await self._client.data_converter.encode([self._memo(start)])
        callbacks = []
        if (callback := start.server_callback) is not None:
            # The token tells of a completion that overtakes the answer which operation it ends.
            header = {**callback.header, OPERATION_TOKEN.lower(): start.token}
            callbacks = [Callback(nexus=Callback.Nexus(url=callback.url, header=header))]
        try:
            return await self._client.workflow_service.start_workflow_execution(
                StartWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_id=identity.workflow_id,
                    workflow_type=WorkflowType(name=target.workflow_type),
                    task_queue=TaskQueue(name=target.task_queue or self._task_queue),
                    input=Payloads(payloads=[start.payload]),
                    identity=self._client.identity,
                    request_id=identity.temporal_request_id,
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
                # Not only for the retries: without it the SDK does not hand an eager first task to its worker, and
                # the target would wait for its workflow task timeout.
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.ALREADY_EXISTS:
                return None
            if callback is not None and error.status is RPCStatusCode.INVALID_ARGUMENT:
                raise _callback_refused(callback.url, error) from None
            raise

    def _memo(self, start: _Start) -> CallMemo:
        request, source = start.request, WorkflowRef.from_links(start.request.links)
        deadline = self._clock() + (request.operation_timeout or DEFAULT_DEADLINE)
        return CallMemo(
            caller=start.caller,
            request_id=request.request_id,
            input_hash=start.identity.input_hash,
            service=request.service,
            operation=request.operation,
            operation_token=start.token,
            # What the server tells, no worker has to.
            callback_url=None if start.server_callback is not None else request.callback_url,
            callback_headers={name: each for name, each in request.callback_headers.items() if name in _PASSED_ON}
            if start.server_callback is None
            else {},
            deadline_ms=int(deadline.timestamp() * 1000),
            caller_namespace=source.namespace if source else "",
            caller_workflow_id=source.workflow_id if source else "",
            caller_run_id=source.run_id if source else "",
            on_orphaned=start.target.on_orphaned,
            held_ms=0 if start.hold is None else int(_told_by_answer_for(start.hold) / timedelta(milliseconds=1)),
        )

    async def _answer_for_holder(self, start: _Start, *, may_start: bool) -> StartAnswer:
        """Answer by the run that holds the workflow id, if its memo shows that the caller may know of it."""
        target, identity = start.target, start.identity
        for _ in range(_LOOKS):
            holder = await self._runs.describe(identity.workflow_id)
            if holder is None and may_start:
                break
            if holder is None:
                raise OutcomeUnknownError(_TOO_OLD)
            memo = await self._runs.memo(holder)
            # A memo is compared before a word is said: workflow ids are business ids, and all callers share them.
            is_own = memo is not None and memo.caller == start.caller
            # So is the workflow type: two operations may lead to one id, and one's outcome is not the other's.
            if holder.type.name != target.workflow_type or (not is_own and not target.shared):
                if not may_start:
                    # The answer must not say whether the id is held: no run is made that would have to be paid for.
                    raise OutcomeUnknownError(_TOO_OLD)
                message = "the workflow id that this input leads to is taken"
                raise bad_request(message)
            is_same = is_own and memo is not None and memo.request_id == start.request.request_id
            if is_same and memo is not None and memo.input_hash != identity.input_hash:
                message = "this request id was used before with another input"
                raise bad_request(message)
            ref = self._runs.ref(identity.workflow_id, holder.execution.run_id)
            if is_open(holder):
                if is_same or await self._attach(start, holder):
                    return Running(operation_token=start.token, target=ref)
            elif (outcome := await read_outcome(self._client, ref.workflow_id, ref.run_id)) is not None:
                return Finished(outcome=outcome.fitted(), target=ref)
            # It closed, or went on as another run, between two reads: look again.
        message = "the run is changing, try again"
        raise UnavailableError(message)

    async def _attach(self, start: _Start, holder: WorkflowExecutionInfo) -> bool:
        """Have the run tell this call too. False if it closed before it could promise that.

        Accepted is told: a signal that is accepted while the run closes makes the server refuse the closing.
        """
        if start.server_callback is not None and not await self._runs.has_callback(holder, start.token):
            options = OnConflictOptions(
                attach_request_id=True, attach_completion_callbacks=True, attach_links=bool(start.request.links)
            )
            if await self._ask(start, options) is None:
                return False
        # Held or not, an attached call is told by the run.
        call = replace(self._memo(start), held_ms=0)
        if not start.target.instrumented or (call.callback_url is None and start.target.on_orphaned == "keep"):
            # Nobody to do it, or nobody to tell or to mind: the server, renewals or the sweep find the outcome.
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
                    request_id=start.identity.temporal_request_id,
                ),
                retry=True,
            )
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND:
                return False
            raise
        return True


def _callback_refused(url: str, error: RPCError) -> HandlerError:
    """Why our server does not take a callback. Not the caller's fault: it may ask again until that has changed."""
    if "callbacks to a workflow" in error.message:
        message = "more calls wait for this run than the handler's Temporal server tells: ask again for the outcome"
        return HandlerError(message, type=HandlerErrorType.RESOURCE_EXHAUSTED)
    if "callback" not in error.message:
        return translated(error)
    place = URL(url).authority
    message = (
        f"the handler's Temporal server refuses to send completions to {place}: "
        "its operator has to allow that in component.callbacks.allowedAddresses (from 1.32: callback.allowedAddresses)"
    )
    _log.error("bridge.server_callback_refused", extra={"bridge.callback_host": place})
    return UnavailableError(message, retry_after=timedelta(seconds=10))


def _told_by_answer_for(hold: timedelta) -> timedelta:
    """The rest is for the task in which a run ends: its ending must reach the start while that is still held."""
    return hold - min(hold / 5, _MAX_HOLD_MARGIN)


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
