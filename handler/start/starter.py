"""From a start request to a run. A repeated request, from any caller, starts no second run.

An equal repeat finds its run without a look-up, because Temporal deduplicates it. In all other cases the memo of the
run that holds the workflow id decides. A renewal that names its operation by a token starts nothing.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from nexusrpc import HandlerError
from temporalio.api.common.v1 import Callback, Payload
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import OnConflictOptions
from temporalio.client import Client
from temporalio.service import RPCError

from bridge.errors import OutcomeUnknownError, UnavailableError, bad_request
from bridge.protocol.link import WorkflowRef
from bridge.protocol.payload import holds_reference
from bridge.protocol.start import Finished, Running, StartAnswer, StartRequest
from bridge.security.keys import decode_key
from bridge.temporal.connection import Namespace
from bridge.workflow.targets import Target
from handler.authorization import Authorization
from handler.delivery.close_event import read_close_event, sendable
from handler.delivery.dispatcher import start_delivery_workflow
from handler.delivery.operation_token import OperationToken
from handler.delivery.records import Delivery
from handler.settings import HandlerSettings
from handler.start.call import Call
from handler.start.call_records import CallRecords
from handler.start.held_starts import HeldStarts
from handler.start.limits import AttachedCalls
from handler.start.rpc_errors import handler_error_from_rpc, run_is_full
from handler.start.runs import Run, Runs, find_run
from handler.start.same_call import OUTCOME_UNKNOWN, input_hash, is_same_call, keyed_hash
from handler.user_code.conversion import Conversion
from handler.user_code.workflow_id import TIMEOUT, workflow_id_for

DEFAULT_DEADLINE = timedelta(days=7)
"""Deadline of deliveries to a caller that names no deadline."""

_LOOKS = 3
"""Maximum number of reads, in one request, of a run that changes meanwhile."""
_RETENTION_MARGIN = timedelta(minutes=10)
"""Allowance for clock differences: a start this close to the end of retention is already too old to start a run."""
_RUNNING = WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_RUNNING


class Starter:
    """Starts targets in one handler namespace."""

    def __init__(
        self,
        *,
        client: Client,
        namespace: Namespace,
        settings: HandlerSettings,
        holds: HeldStarts,
        threads: Mapping[str, Executor],
        clock: Callable[[], datetime],
        authorization: Authorization,
        is_eager: bool = False,
    ) -> None:
        """Create a starter.

        Args:
            client: Connected to the handler's namespace.
            namespace: Describes that namespace.
            settings: Name the callers, the task queue of targets that name none, and the key of the hashes.
            holds: Keeps count of the starts that are held open.
            threads: Run the team's functions that are not `async`, by caller.
            clock: Returns the time.
            authorization: Decides whether a start is allowed.
            is_eager: Whether a worker for the task queue runs in this process and uses the same client.
        """
        self._client = client
        self._authorization = authorization
        self._namespace = namespace
        self._runs = Runs(client, settings, is_eager=is_eager)
        self._conversion = Conversion(client.data_converter)
        self._threads = threads
        self._hash_key = decode_key(settings.hash_key)
        self._holds = holds
        self._attached = AttachedCalls()
        self._records = CallRecords(client)
        self._clock = clock
        self._settings = settings

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

        The answer for a run that was found has the progress that the run has reported.

        Args:
            caller: Authenticated name of the caller.
            target: The workflow that the operation stands for.
            request: The start. If it prefers to wait, it may be held open. If it has an operation token, it starts
                nothing; the token must name this namespace.
            payload: The operation's input.
            server_callback: The callback of a native Nexus call, to which Temporal's server delivers the outcome.
            is_gone: Whether the sender of the request has disconnected.

        Raises:
            nexusrpc.HandlerError: The input is refused, another call's run holds the workflow id, or Temporal did not
                start the run.
        """
        peer = self._settings.caller(caller)
        with self._holds.reserve(request.wait, caller=caller, limit=peer.limits.held_starts) as hold:
            loop = asyncio.get_running_loop()
            began = loop.time()
            try:
                value, workflow_id, hashed, refusal = await self._identify(caller, target, request, payload)
                token = OperationToken(await self._namespace.id(), request.request_id, workflow_id)
                longest, timeout = timedelta(days=peer.limits.deadline_days), request.operation_timeout
                names = (caller, target.service, target.operation, request.request_id, hashed)
                call = Call(
                    caller=caller,
                    target=target,
                    request=request,
                    payload=payload,
                    workflow_id=workflow_id,
                    input_hash=hashed,
                    temporal_request_id=keyed_hash(self._hash_key, "request", *(name.encode() for name in names)),
                    token=token.encode(),
                    server_callback=server_callback,
                    hold=hold,
                    renews=peer.is_renewing and request.scheduled_time is not None,
                    deadline=min(DEFAULT_DEADLINE if timeout is None else timeout, longest),
                )
                call = await self._with_id_at_start(call)
                # If the first answer was lost, a refusal of the repeat would end the call while its run goes on.
                if refusal is not None and not await self._records.has_started(call):
                    raise refusal
                if self._authorization.is_needed:
                    await self._require(call, value, within=TIMEOUT - timedelta(seconds=loop.time() - began))
                answer = await self._answer(call)
                if hold is not None and answer.target is not None and isinstance(answer, Running):
                    answer = await self._holds.outcome_of(answer.target, within=hold) or answer
                    if isinstance(answer, Finished) and is_gone():
                        await self._deliver(call, answer)
                if isinstance(answer, Finished):
                    answer = replace(answer, outcome=await sendable(self._client.data_converter, answer.outcome, peer))
            except RPCError as error:
                raise handler_error_from_rpc(error) from None
        return answer

    async def _with_id_at_start(self, call: Call) -> Call:
        """Return *call*; a renewal with the workflow id in its token, if the run of that id has a record of the call.

        A deployment may have changed the function `workflow_id`. Another run, or none, may hold the id that it derives.
        """
        named = OperationToken.decode(call.request.operation_token or "")
        if named is None or named.workflow_id == call.workflow_id:
            return call
        # The token is not signed. A record of the call shows that its sender did not invent the workflow id.
        token = named._replace(request_id=call.request.request_id).encode()
        earlier = replace(call, workflow_id=named.workflow_id, token=token)
        return earlier if await self._records.has_started(earlier) else call

    async def _identify(
        self, caller: str, target: Target, request: StartRequest, payload: Payload
    ) -> tuple[Any, str, str, HandlerError | None]:
        """Check the input. Returns it decoded, the workflow id, the input's hash, and why the input is refused.

        If a renewal is refused, the workflow id is that of its token: a deployment may have changed the functions or
        the type of the input.
        """
        if holds_reference(payload) and not self._settings.caller(caller).shares_storage:
            message = "the input is a reference to external storage, which this caller does not share with the handler"
            raise bad_request(message)
        opened = await self._conversion.open(payload)
        hashed = input_hash(self._hash_key, opened)
        try:
            value = await self._conversion.read(opened, target.input_type, self._threads[caller])
            workflow_id, refusal = await workflow_id_for(value, target, self._threads[caller])
        except HandlerError as error:
            if (named := OperationToken.decode(request.operation_token or "")) is None:
                raise
            return None, named.workflow_id, hashed, error
        return value, workflow_id, hashed, refusal

    async def _require(self, call: Call, value: Any, *, within: timedelta) -> None:
        """Return if the team's function allows the call, or if the call has started its run or attached to it already.

        Raises:
            nexusrpc.HandlerError: The function refuses the call or failed.
        """
        # An operation token is no proof: it only says that the call may have started its run.
        if call.is_renewal and await self._records.has_started(call):
            return
        try:
            names = f"{call.target.service}/{call.target.operation}"
            await self._authorization.require(call.caller, names, value, within=within)
        except HandlerError:
            # The function may decide otherwise than before.
            if call.is_renewal or not await self._records.has_started(call):
                raise

    async def _deliver(self, call: Call, answer: Finished) -> None:
        """Deliver the outcome of a held start whose sender is gone. The worker leaves the outcome to the answer."""
        run, target = await find_run(self._client, call.workflow_id), call.target
        if run is None or run.ref != answer.target or not target.instrumented or call.request.callback_url is None:
            return
        delivery = Delivery(
            call=replace(call, hold=None).memo(self._clock()),
            workflow_id=run.ref.workflow_id,
            run_id=run.ref.run_id,
            start_time_ms=run.start_time_ms,
        )
        task_queue = target.task_queue or self._settings.task_queue
        await start_delivery_workflow(self._client, delivery, task_queue=task_queue)

    async def _answer(self, call: Call) -> StartAnswer:
        may_start = not call.is_renewal and not await self._is_too_old(call.request)
        if may_start:
            response = await self._runs.start(call, call.memo(self._clock()))
            # An equal repeat counts as started too, even if its run has closed.
            if response is not None and response.started and response.status == _RUNNING:
                ref = WorkflowRef(
                    namespace=self._client.namespace, workflow_id=call.workflow_id, run_id=response.run_id
                )
                return Running(operation_token=call.token, target=ref)
        return await self._answer_for_holder(call, may_start=may_start)

    async def _is_too_old(self, request: StartRequest) -> bool:
        if request.scheduled_time is None:
            return False
        return self._clock() - request.scheduled_time > await self._namespace.retention() - _RETENTION_MARGIN

    async def _answer_for_holder(self, call: Call, *, may_start: bool) -> StartAnswer:
        """Answer with the state of the run that holds the workflow id, if its memo lets the caller know it."""
        for _ in range(_LOOKS):
            run = await find_run(self._client, call.workflow_id)
            if run is None and may_start:
                break
            if run is None:
                raise OutcomeUnknownError(OUTCOME_UNKNOWN)
            is_same, refusal = False, None
            try:
                is_same = is_same_call(call, run, may_start=may_start)
            except HandlerError as error:
                refusal = error
            if call.is_renewal and not is_same:
                earlier = await self._records.state_of_earlier(call, run, is_refused=refusal is not None)
                if earlier is not None:
                    return earlier
            if refusal is not None:
                raise refusal
            if (answer := await self._state_of(run, call, is_same=is_same)) is not None:
                return answer
        message = "the run is changing, try again"
        raise UnavailableError(message)

    async def _state_of(self, run: Run, call: Call, *, is_same: bool) -> StartAnswer | None:
        """Return the state of *run*; None if it closed or continued as another run between two reads."""
        if run.is_open:
            if is_same or await self._attach(call, run):
                return Running(operation_token=call.token, target=run.ref, progress=run.progress)
        elif (closed := await read_close_event(self._client, call.workflow_id, run.ref.run_id)) is not None:
            return Finished(outcome=closed.outcome, target=run.ref)
        return None

    async def _attach(self, call: Call, run: Run) -> bool:
        """Attach this call to the run, so that it gets the outcome too. False if the run closed before.

        An attached call always gets the outcome: if the server accepts the signal while a worker closes the run, the
        server refuses the closing, and the worker sees the signal first.

        Raises:
            nexusrpc.HandlerError: UNAVAILABLE, this caller does not renew, and no worker or sweep would deliver to it;
                RESOURCE_EXHAUSTED, the run can have no further call.
        """
        # A held start's answer does not replace the delivery to an attached call.
        memo, target = replace(call, hold=None).memo(self._clock()), call.target
        if call.server_callback is not None and call.token not in run.served:
            options = OnConflictOptions(
                attach_request_id=True, attach_completion_callbacks=True, attach_links=bool(call.request.links)
            )
            if await self._runs.start(call, memo, options) is None:
                return False
        # A retried workflow's last run has not seen the first run's signals. The sweep reads only runs with a memo.
        is_certain = target.instrumented and target.retry_policy is None and run.is_recorded
        if memo.callback_url is not None and not memo.renews and not is_certain:
            message = "another call's run of this operation is still running: ask again for its outcome"
            raise UnavailableError(message)
        if not call.attaches_by_signal:
            # The caller's renewals get the outcome, or Temporal's server delivers it.
            return True
        if not self._attached.admit(call.temporal_request_id, run):
            if not call.is_renewal:
                raise run_is_full()
            # This call was answered 201 before. It is attached already, or gets the outcome by its renewals.
            return True
        return await self._runs.attach(call, memo, run)
