"""The dispatcher: reads how a run closed, and makes the first attempt to deliver it.

It runs in the worker's own process and stores nothing. A delivery workflow repeats a delivery that fails at first. If
the process is killed, the caller's next renewal or the sweep finds the outcome. Reads and requests have separate
limits, so that a receiver that hangs delays no read.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from datetime import timedelta

from temporalio.client import Client
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError
from temporalio.worker import Worker

from bridge.runtime.event_log import event_logger
from bridge.temporal.connection import keeping_inline
from bridge.temporal.rpc_status import is_missing
from handler.delivery.callback_client import CallbackClient
from handler.delivery.calls import decoded_call
from handler.delivery.close_event import CloseEvent, read_close_event
from handler.delivery.close_reporter import MAX_ATTACHED, ClosingRun
from handler.delivery.records import MEMO_KEY, Delivery, deliveries, milliseconds
from handler.delivery.workflow import DELIVERY_WORKFLOW

DRAIN = timedelta(seconds=10)
"""Time that a stopping worker gives its deliveries before it starts delivery workflows for the rest."""

_READS = 100
_QUEUE = 1000
"""Maximum number of runs read and delivered here. For further runs, delivery workflows are started without a read."""
_MAX_RUNS = 10_000
_READ_AGAIN_S = 60
"""Time for which a failed read is repeated. If Temporal does not answer, no delivery workflow can be started either."""
_PATIENCE = timedelta(seconds=5)
"""Maximum wait for a busy destination. A healthy destination is free again within milliseconds."""
_REMEMBERED = 10_000
"""Number of deliveries and runs remembered, so that neither a second report nor this process's sweep repeats them."""

_log = event_logger(__name__)


class Dispatcher:
    """Delivers for one worker."""

    def __init__(self, *, callbacks: CallbackClient, task_queue: str) -> None:
        """*task_queue* is where the delivery workflows run."""
        self._callbacks = callbacks
        self._task_queue = task_queue
        self._reads = asyncio.Semaphore(_READS)
        self._taken: OrderedDict[str, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Worker

    def start(self, worker: Worker) -> None:
        """Accept reports from now on, in the running event loop. Deliver with the current client of *worker*."""
        self._worker, self._loop = worker, asyncio.get_running_loop()

    @property
    def _client(self) -> Client:
        # Read the client each time: a team changes certificates by giving the running worker another client.
        return self._worker.client

    def notice(self, run: ClosingRun) -> None:
        """Accept a report that a run may have closed. May be called from any thread."""
        if run.calls and self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin, run)

    async def drain(self) -> None:
        """Finish the deliveries that have begun. After `DRAIN`, start delivery workflows for the rest."""
        # Let the loop run once, because the reports of the last evictions are still queued in it.
        await asyncio.sleep(0)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=DRAIN.total_seconds())
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def deliver(self, found: Iterable[Delivery], closed: CloseEvent) -> None:
        """Deliver *closed* to each of *found*: by one request or, if that fails, by a delivery workflow.

        Raises:
            temporalio.service.RPCError: A delivery workflow could not be started.
        """
        await asyncio.gather(*(self._deliver(each, closed) for each in found))

    def has_taken(self, run_id: str) -> bool:
        """Whether this process remembers that all calls of a run have the outcome, or a delivery workflow."""
        return run_id in self._taken

    def remember(self, key: str) -> None:
        """Remember the key of a delivery, or the id of a run of which all deliveries are taken."""
        self._taken[key] = None
        if len(self._taken) > _REMEMBERED:
            self._taken.popitem(last=False)

    def _begin(self, run: ClosingRun) -> None:
        if len(self._tasks) >= _MAX_RUNS:
            extra = {"bridge.target": run.workflow_id, "bridge.error": "queue full"}
            _log.error("bridge.delivery_left_to_renewal", extra=extra)
            return
        task = asyncio.create_task(self._dispatch(run, is_read=len(self._tasks) < _QUEUE))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dispatch(self, run: ClosingRun, *, is_read: bool) -> None:
        found = self._deliveries(run)
        try:
            if not found:
                return
            if not is_read:
                await self._start_workflows(found)
                return
            try:
                closed = await self._read(run)
                # The sweep handles terminated and timed-out runs, because a reset terminates the run that it replaces.
                if closed is not None and not closed.is_forced:
                    age = timedelta(milliseconds=milliseconds(closed.close_time) - milliseconds(run.start_time))
                    due = [each for each in found if not _is_answered(each, run, age)]
                    await self.deliver(due, closed)
                    # Beyond the limit the reporter sees no calls, and the sweep delivers to them.
                    if due == found and len(run.calls) < MAX_ATTACHED:
                        self.remember(run.run_id)
            except asyncio.CancelledError:
                await self._start_workflows(found)
        except Exception as error:  # noqa: BLE001 - any error: renewals or the sweep find the outcome
            names = {"bridge.target": run.workflow_id, "bridge.run_id": run.run_id}
            extra = names | {"bridge.error": type(error).__name__}
            _log.warning("bridge.delivery_left_to_renewal", extra=extra)

    def _deliveries(self, run: ClosingRun) -> list[Delivery]:
        converter = self._client.data_converter
        calls = [decoded_call(converter, each, target=run.workflow_id) for each in run.calls]
        return deliveries(calls, run.workflow_id, run.run_id, run.start_time)

    async def _read(self, run: ClosingRun) -> CloseEvent | None:
        for attempt in range(_READ_AGAIN_S):
            try:
                async with self._reads:
                    return await read_close_event(self._client, run.workflow_id, run.run_id)
            except RPCError as error:
                if is_missing(error):
                    return None
                if attempt == _READ_AGAIN_S - 1:
                    raise
            await asyncio.sleep(1)
        return None

    async def _deliver(self, delivery: Delivery, closed: CloseEvent) -> None:
        if delivery.key in self._taken:
            return
        self.remember(delivery.key)
        converter = self._client.data_converter
        try:
            if not (await self._callbacks.deliver(delivery, closed, converter, patience=_PATIENCE)).is_done:
                await self._start_workflows([delivery])
        except Exception:
            self._taken.pop(delivery.key, None)
            raise

    async def _start_workflows(self, found: Iterable[Delivery]) -> None:
        for each in found:
            await start_delivery_workflow(self._client, each, task_queue=self._task_queue)


async def start_delivery_workflow(client: Client, delivery: Delivery, *, task_queue: str) -> None:
    """Start the workflow that delivers *delivery*. The sweep or an earlier report of the run may have started it.

    Raises:
        temporalio.service.RPCError: It could not be started.
    """
    with contextlib.suppress(WorkflowAlreadyStartedError):
        # Keep memo and input inline, so that lists and replays of deliveries need no external storage.
        await keeping_inline(client).start_workflow(
            DELIVERY_WORKFLOW,
            delivery,
            id=delivery.key,
            task_queue=task_queue,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            memo={MEMO_KEY: delivery.memo},
            static_summary=f"to {delivery.call.caller}",
        )


def _is_answered(delivery: Delivery, run: ClosingRun, age: timedelta) -> bool:
    """Whether the start of the call was still held open when the run closed. Its answer then delivers the outcome."""
    return run.is_first and age < timedelta(milliseconds=delivery.call.held_ms)
