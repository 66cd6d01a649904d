"""From a start request to a run: started once, however often and by whomever it is asked for.

Temporal deduplicates by a request id that is a keyed hash of caller, request id and input. An equal repeat so finds its
run without a look-up; everything else is decided by the memo of the run that holds the workflow id.
"""

import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

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
from bridge.protocol.outcome import Outcome
from bridge.protocol.payload import holds_reference
from bridge.protocol.start import Finished, Running, StartAnswer, StartRequest
from bridge.runtime.temporal import is_open
from bridge.security.callback_tokens import OperationTokens
from bridge.workflow.targets import Target
from handler.delivery.close_event import inlined, read_close_event
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY, NATIVE_CALLER, CallMemo
from handler.start.conversion import Conversion
from handler.start.held_starts import HeldStarts
from handler.start.runs import Runs
from handler.start.user_functions import workflow_id_for

DEFAULT_DEADLINE = timedelta(days=7)
"""How long we deliver to a caller that names no deadline."""

_TOO_OLD = "the operation was scheduled longer ago than the handler keeps closed runs: outcome unknown"
_LOOKS = 3
"""How often a run that changes while it is looked at is looked at again, in one request."""
_RETENTION_MARGIN = timedelta(minutes=10)
"""For the clocks of two namespaces: a start this close to retention is already too old to start a run."""

_PASSED_ON = frozenset({"temporal-callback-token", "source"})
"""Callback headers that a caller may ask us to send. Anything else could replace what the protocol says."""
_MAX_CALLBACK_HEADERS = 2048
"""Characters. Every attached call is carried over continue-as-new, and the server terminates a run at 2 MiB."""

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
        holds: HeldStarts,
        executor: Executor,
        clock: Callable[[], datetime],
        is_eager: bool = False,
        shares_storage: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Make a starter.

        Args:
            client: Connected to the handler's namespace.
            tokens: Mints the operation tokens.
            hash_key: Keys the input hash and the request ids.
            task_queue: Where targets run that name no task queue of their own.
            retention: How long the namespace keeps closed runs.
            holds: The starts that are held open.
            executor: Runs the team's `check` and `workflow_id`.
            clock: Gives the time.
            is_eager: A worker for the task queue lives in this process and uses the same client.
            shares_storage: Whether a caller, by name, takes references to our external storage.
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
        self._shares_storage = shares_storage
        # Memos and signals of ours stand in history themselves: visibility and workers read them without a store.
        self._inline = replace(client.data_converter, external_storage=None)

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
            server_callback: The callback of a native Nexus call, to which Temporal's server delivers the outcome.

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
                if isinstance(answer, Finished):
                    answer = replace(answer, outcome=await self._crossing(caller, answer.outcome))
            except RPCError as error:
                raise translated(error) from None
        if isinstance(answer, Running) and request.attempt > 1 and target.instrumented and answer.target is not None:
            return replace(answer, progress=await self._runs.progress(answer.target))
        return answer

    async def _crossing(self, caller: str, outcome: Outcome) -> Outcome:
        if not self._shares_storage(caller):
            outcome = await inlined(self._client.data_converter, outcome)
        return outcome.within_size_limit()

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
        if holds_reference(payload) and not self._shares_storage(caller):
            message = "the input is a reference to external storage, which this caller does not share with the handler"
            raise bad_request(message)
        opened = await self._conversion.open(payload)
        value = self._conversion.value(opened, target.input_type)
        workflow_id = await workflow_id_for(value, target, self._executor)
        input_hash = self._hash("input", *_canonical(opened))
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
        [memo] = await self._inline.encode([self._memo(start)])
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
            # Of too many callbacks, servers from 1.31 say FAILED_PRECONDITION.
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
            input_hash=start.identity.input_hash,
            service=request.service,
            operation=request.operation,
            operation_token=start.token,
            # What the server tells, no worker has to.
            callback_url=None if start.server_callback is not None else request.callback_url,
            callback_headers=passed_on if start.server_callback is None else {},
            deadline_ms=int(deadline.timestamp() * 1000),
            caller_namespace=source.namespace if source else "",
            caller_workflow_id=source.workflow_id if source else "",
            caller_run_id=source.run_id if source else "",
            caller_close_policy=start.target.caller_close_policy,
            held_ms=0 if start.hold is None else int(_told_by_answer_for(start.hold) / timedelta(milliseconds=1)),
            renews=request.scheduled_time is not None,
        )

    async def _answer_for_holder(self, start: _Start, *, may_start: bool) -> StartAnswer:
        """Answer by the run that holds the workflow id, if its memo shows that the caller may know of it."""
        identity = start.identity
        for _ in range(_LOOKS):
            holder = await self._runs.describe(identity.workflow_id)
            if holder is None and may_start:
                break
            if holder is None:
                raise OutcomeUnknownError(_TOO_OLD)
            memo = await self._runs.memo(holder)
            is_same = _is_same_call(start, holder, memo, may_start=may_start)
            ref = self._runs.ref(identity.workflow_id, holder.execution.run_id)
            if is_open(holder):
                if is_same or await self._attach(start, holder, memo):
                    return Running(operation_token=start.token, target=ref)
            elif (closed := await read_close_event(self._client, ref.workflow_id, ref.run_id)) is not None:
                return Finished(outcome=closed.outcome, target=ref)
            # It closed, or went on as another run, between two reads: look again.
        message = "the run is changing, try again"
        raise UnavailableError(message)

    async def _attach(self, start: _Start, holder: WorkflowExecutionInfo, memo: CallMemo | None) -> bool:
        """Have this call delivered to as well. False if the run closed before the call could be attached.

        An accepted signal is delivered to: if it is accepted while the run closes, the server refuses the closing.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, this caller does not renew, and no worker or sweep would deliver to it.
        """
        if start.server_callback is not None and not await self._runs.has_callback(holder, start.token):
            options = OnConflictOptions(
                attach_request_id=True, attach_completion_callbacks=True, attach_links=bool(start.request.links)
            )
            if await self._ask(start, options) is None:
                return False
        # Held or not, an attached call is told by the run.
        call = replace(self._memo(start), held_ms=0)
        # The last run of a retried target has not seen the signals of the first. The sweep reads runs with a memo.
        is_certain = start.target.instrumented and start.target.retry_policy is None and memo is not None
        if call.callback_url is not None and not call.renews and not is_certain:
            message = "another call's run of this operation goes on: ask again for its outcome"
            raise UnavailableError(message)
        is_watched = start.target.caller_close_policy == "request_cancel"
        if not start.target.instrumented or (call.callback_url is None and not is_watched):
            # Renewals, or Temporal's server, find the outcome.
            return True
        try:
            await self._client.workflow_service.signal_workflow_execution(
                SignalWorkflowExecutionRequest(
                    namespace=self._client.namespace,
                    workflow_execution=holder.execution,
                    signal_name=ATTACH_SIGNAL,
                    input=Payloads(payloads=await self._inline.encode([call])),
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


def _is_same_call(start: _Start, holder: WorkflowExecutionInfo, memo: CallMemo | None, *, may_start: bool) -> bool:
    """Whether the call of *start* has started the run *holder*; False if it may attach to it.

    Raises:
        nexusrpc.HandlerError: BAD_REQUEST or CONFLICT, the call must not get the outcome of this run.
        bridge.errors.OutcomeUnknownError: The same, for a start that is too old to make a run.
    """
    # Compare the memo before answering. Workflow ids are business ids that all callers share.
    is_own = memo is not None and memo.caller == start.caller
    # Servers from 1.31 do not name the namespace that calls: then only the call itself is its own.
    if start.caller == NATIVE_CALLER and memo is not None:
        is_own = is_own and memo.request_id == start.request.request_id
    # Compare the workflow type too: two operations may lead to one id, and their outcomes differ.
    if holder.type.name != start.target.workflow_type or (not is_own and not start.target.attach_across_callers):
        if not may_start:
            # The answer must not say whether the id is held: no run is made that would have to be paid for.
            raise OutcomeUnknownError(_TOO_OLD)
        message = "the workflow id that this input leads to is taken"
        raise bad_request(message)
    is_same = is_own and memo is not None and memo.request_id == start.request.request_id
    # A run that was started without the bridge has no hash, and counts as one with another input.
    is_same_input = memo is not None and memo.input_hash == start.identity.input_hash
    if is_same and not is_same_input:
        message = "this request id was used before with another input"
        raise bad_request(message)
    if start.target.on_input_mismatch == "refuse" and not is_same_input:
        message = "the workflow id that this input leads to belongs to a run with another input"
        raise HandlerError(message, type=HandlerErrorType.CONFLICT)
    return is_same


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


def translated(error: RPCError) -> HandlerError:
    """The caller's view of a refusal by our Temporal; its text may repeat a callback URL, so it stays here."""
    _log.warning("bridge.start_failed", extra={"bridge.rpc_status": error.status.name})
    if error.status is RPCStatusCode.RESOURCE_EXHAUSTED:
        return HandlerError("too many starts at the moment", type=HandlerErrorType.RESOURCE_EXHAUSTED)
    if error.status is RPCStatusCode.INVALID_ARGUMENT:
        if "size exceeds limit" in error.message:
            return bad_request("the input is larger than the handler's namespace allows (limit.blobSize.error)")
        return bad_request("the start is not acceptable to the handler's Temporal")
    if error.status in _TEMPORAL_IS_AWAY or error.status is RPCStatusCode.NOT_FOUND:
        return UnavailableError("the handler's Temporal cannot be reached")
    return HandlerError("internal error", type=HandlerErrorType.INTERNAL)
