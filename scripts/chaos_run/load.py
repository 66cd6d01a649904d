"""Makes the calls of a plan, waits for their end, and reads the histories of both namespaces."""

import asyncio
import sys
import time
from collections.abc import Sequence

from temporalio.client import Client, WorkflowFailureError
from temporalio.common import WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.runtime import LoggingConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError, RPCStatusCode

from examples.payments.order import Order
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from handler.sweep.workflow import SWEEP_WORKFLOW
from scripts.chaos_run.calls import REVIEW_S, Call, CallKind
from scripts.chaos_run.verdict import Run
from scripts.environment.stack import CALLER_NAMESPACE, HANDLER_NAMESPACE

AGAIN_S = 0.5
"""Pause between two tries while the server is unavailable."""
_READS_AT_ONCE = 16

_REVIEWS = {CallKind.APPROVED: "approve", CallKind.REJECTED: "reject"}


async def connect_both(address: str) -> list[Client]:
    """Clients of the caller's and the handler's namespace."""
    # The SDK's core logs every try while the server is unavailable.
    quiet = Runtime(telemetry=TelemetryConfig(logging=LoggingConfig(TelemetryFilter("ERROR", "ERROR"))))
    return [
        await Client.connect(address, namespace=namespace, runtime=quiet)
        for namespace in (CALLER_NAMESPACE, HANDLER_NAMESPACE)
    ]


async def make_call(clients: Sequence[Client], call: Call) -> None:
    """Start one calling workflow at its time. If its payment needs a review, review it."""
    await asyncio.sleep(call.at)
    await start_call(clients[0], call)
    if call.kind in _REVIEWS:
        await asyncio.sleep(REVIEW_S)
        await review(clients[1], call)


async def start_call(caller: Client, call: Call) -> None:
    """Start one calling workflow once. Repeat the request while the server is unavailable."""
    while True:
        try:
            await caller.start_workflow(
                OrderWorkflow.run,
                Order(order_id=call.order_id, amount=call.amount),
                id=call.workflow_id,
                task_queue=ORDER_QUEUE,
                # An earlier try may have started the workflow. It must run once.
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            )
            break
        except WorkflowAlreadyStartedError:
            break
        except RPCError:
            await asyncio.sleep(AGAIN_S)


async def is_paid(caller: Client, call: Call, *, patience_s: float) -> bool:
    """Make *call*, and return whether its workflow has completed within *patience_s* seconds.

    It has not if it failed, or if the server does not answer.
    """
    try:
        async with asyncio.timeout(patience_s):
            await start_call(caller, call)
            await caller.get_workflow_handle(call.workflow_id).result()
    except (TimeoutError, WorkflowFailureError, RPCError):
        return False
    return True


async def review(handler: Client, call: Call) -> None:
    """Make the decision about a payment that waits for it. Repeat the request while the server is unavailable."""
    payment = handler.get_workflow_handle(f"payment-{call.order_id}")
    while True:
        try:
            await payment.signal(_REVIEWS[call.kind])
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND and "completed" in error.message:
                return
            await asyncio.sleep(AGAIN_S)
        else:
            return


async def count(client: Client, query: str) -> int:
    """Number of workflows that *query* finds."""
    return (await client.count_workflows(query)).count


OPEN = f"ExecutionStatus = 'Running' AND WorkflowType != '{SWEEP_WORKFLOW}'"


async def until_quiet(clients: Sequence[Client], patience: float) -> None:
    """Wait until no workflow is open in either namespace, or for *patience* seconds the number has not become less.

    A busy machine may need long for the workflows that are open, but it goes on to end some.
    """
    least, quiet, until = sys.maxsize, 0, time.monotonic() + patience
    # Visibility may show a run late, therefore count several times.
    while quiet < 5 and time.monotonic() < until:
        await asyncio.sleep(AGAIN_S)
        try:
            is_open = sum([await count(client, OPEN) for client in clients])
        except RPCError:
            # A server that was restarted late may still load its namespaces.
            quiet = 0
            continue
        quiet = 0 if is_open else quiet + 1
        if is_open < least:
            least, until = is_open, time.monotonic() + patience


async def read_runs(client: Client, query: str = f"WorkflowType != '{SWEEP_WORKFLOW}'") -> list[Run]:
    """Every run that *query* finds, with its history; without a query every run but those of the sweep."""
    found = [run async for run in client.list_workflows(query)]
    gate = asyncio.Semaphore(_READS_AT_ONCE)

    async def read(workflow_id: str, run_id: str) -> Run:
        async with gate:
            history = await client.get_workflow_handle(workflow_id, run_id=run_id).fetch_history()
        return Run(namespace=client.namespace, workflow_id=workflow_id, run_id=run_id, events=history.events)

    return list(await asyncio.gather(*(read(run.id, run.run_id) for run in found)))
