"""Which run has a record of a call: in its memo, in a callback of Temporal's server, or in its history.

A run's memo names the call that started the run. Calls that were attached to it later stand only in its history.
"""

import asyncio

from temporalio.client import Client
from temporalio.service import RPCError

from bridge.errors import OutcomeUnknownError
from bridge.protocol.start import Finished, Running, StartAnswer
from bridge.security.signatures import CLOCK_SKEW
from bridge.temporal.executions import list_runs
from bridge.temporal.rpc_status import is_missing
from bridge.temporal.visibility import quoted
from handler.delivery.calls import read_call, read_memo
from handler.delivery.close_event import read_last_event, read_run
from handler.delivery.records import CallMemo, milliseconds
from handler.start.call import Call
from handler.start.runs import Run, find_run
from handler.start.same_call import OUTCOME_UNKNOWN

_EARLIER_RUNS = 20
"""Maximum number of runs of one workflow id in which a renewal looks for its own."""
_CONTINUATIONS = 100
"""Maximum number of runs of one chain that a renewal follows."""
_HISTORIES = 4
"""Maximum number of histories that are read at once, because one may have 50 MB."""


class CallRecords:
    """The records of calls in one namespace."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._histories = asyncio.Semaphore(_HISTORIES)

    async def has_started(self, call: Call) -> bool:
        """Whether the call has started the run that holds the workflow id, or is attached to it."""
        run = await find_run(self._client, call.workflow_id)
        return run is not None and await self._is_in(call, run)

    async def state_of_earlier(self, call: Call, holder: Run, *, is_refused: bool) -> StartAnswer | None:
        """Return the state of a renewal's own run, if it is not *holder*.

        People may have started the workflow id again since the run closed. Or the run went on as one without a record
        of the call, because a worker without the plugin continued it as new with another memo.

        Args:
            call: A renewal.
            holder: The run that holds the workflow id now. The call did not start it.
            is_refused: Whether the call must not get the outcome of that run.

        Returns:
            None if the call belongs to *holder*, or if no earlier run has a record of it.

        Raises:
            bridge.errors.OutcomeUnknownError: None of the last twenty runs has a record of the call.
        """
        if not is_refused and (not _may_be_earlier(call, holder) or await self._is_in(call, holder)):
            return None
        try:
            query = f"WorkflowId = {quoted(call.workflow_id)}"
        except ValueError:
            return None
        left = _EARLIER_RUNS
        async for row in list_runs(self._client, query):
            run_id, memo = row.execution.run_id, await read_memo(self._client.data_converter, row)
            # The holder continues every run with its record, and one that a reset has terminated.
            is_continued = memo is not None and holder.memo is not None and memo.identity == holder.memo.identity
            if run_id == holder.ref.run_id or is_continued:
                continue
            if await self._is_of(call, run_id, memo):
                return await self._state_of_chain(call, run_id, holder)
            left -= 1
            if left == 0:
                # The call may not get the outcome of a run that may be another call's.
                raise OutcomeUnknownError(OUTCOME_UNKNOWN)
        return None

    async def _state_of_chain(self, call: Call, run_id: str, holder: Run) -> StartAnswer:
        for _ in range(_CONTINUATIONS):
            closed, run_id = await read_last_event(self._client, call.workflow_id, run_id)
            if closed is not None:
                return Finished(outcome=closed.outcome, target=closed.target)
            if not run_id:
                # An open run is the newest of its workflow id.
                break
        return Running(operation_token=call.token, target=holder.ref)

    async def _is_in(self, call: Call, run: Run) -> bool:
        return call.token in run.served or await self._is_of(call, run.ref.run_id, run.memo)

    async def _is_of(self, call: Call, run_id: str, memo: CallMemo | None) -> bool:
        """Whether the call has started this run, or is attached to it. *memo* is the call that started the run."""
        if memo is not None and memo.identity == call.identity:
            return True
        is_own = memo is not None and memo.caller == call.caller
        if not call.target.instrumented or not (is_own or call.target.attach_across_callers):
            return False
        # Any copy of the service may have attached the call. Only the run's history shows it.
        try:
            async with self._histories:
                _, attached = await read_run(self._client, call.workflow_id, run_id)
        except RPCError as error:
            # Visibility shows a run for a while after it was deleted.
            if is_missing(error):
                return False
            raise
        found = [await read_call(self._client.data_converter, each, target=call.workflow_id) for each in attached]
        return call.identity in {each.identity for each in found if each is not None}


def _may_be_earlier(call: Call, holder: Run) -> bool:
    """Whether the call may belong to a run before *holder*, to which it may attach: it may be older than that run."""
    scheduled = call.request.scheduled_time
    # Another cluster's clock has set the time. A call that only polls asks often, and no run has a record of it.
    is_older = scheduled is None or milliseconds(scheduled - CLOCK_SKEW) < holder.start_time_ms
    return is_older and call.attaches_by_signal
