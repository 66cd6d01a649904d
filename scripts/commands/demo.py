"""Run the main job: order workflows in one namespace have their payments made by workflows in another.

Starts a real Temporal server, the receiver, the handler service and both workers as separate processes, sends five
orders through, prints what happened, and ends all of it. Exits 0 only if every outcome was the expected one.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError, is_cancelled_exception

from examples.payments.orders import ORDER_QUEUE, Order, OrderReceipt, OrderWorkflow
from scripts.commands.up import add_stack_options, end, stack_options, until_stopped
from scripts.environment.server import say
from scripts.environment.stack import CALLER_NAMESPACE, HANDLER_NAMESPACE, Stack, running_stack

START_ROUTE = "/c/{caller}/{service}/{operation}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One order to send."""

    title: str
    order_id: str
    amount: float
    expected: str
    """Outcome, and the failure's type where there is one."""


STEPS = (
    Step(title="paid at once", order_id="1001", amount=42.0, expected="succeeded"),
    Step(title="takes longer than the first lease", order_id="1002", amount=420.0, expected="succeeded"),
    Step(title="card declined", order_id="1003", amount=42_000.0, expected="failed CardDeclined"),
    Step(title="a second small one", order_id="1004", amount=7.5, expected="succeeded"),
    Step(title="the first order again: charged once", order_id="1001", amount=42.0, expected="succeeded"),
)


@dataclass(frozen=True, kw_only=True)
class Error:
    """A failure as the order's caller sees it."""

    type: str
    message: str
    cause: str | None


@dataclass(frozen=True, kw_only=True)
class Ref:
    """One run."""

    namespace: str
    workflow_id: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one order."""

    order_id: str
    amount: float
    outcome: str
    result: dict[str, Any] | None
    error: Error | None
    caller: Ref
    target: Ref | None
    http_requests: int
    renewals: int
    caller_events: int
    seconds: float


async def send(client: Client, step: Step) -> tuple[WorkflowHandle[OrderWorkflow, OrderReceipt], float]:
    """Send one order and wait until it has ended."""
    began = time.monotonic()
    handle = await client.start_workflow(
        OrderWorkflow.run,
        Order(order_id=step.order_id, amount=step.amount),
        id=f"order-{step.order_id}",
        task_queue=ORDER_QUEUE,
    )
    # This very run: the same order may be sent again under the same id.
    run: WorkflowHandle[OrderWorkflow, OrderReceipt] = client.get_workflow_handle(
        handle.id, run_id=handle.first_execution_run_id, result_type=OrderReceipt
    )
    with contextlib.suppress(WorkflowFailureError):
        await run.result()
    return run, time.monotonic() - began


def describe_error(error: WorkflowFailureError) -> Error:
    """What the order workflow saw of its payment, or else its own failure."""
    failure = error.cause
    if isinstance(failure, ApplicationError) and failure.type == "OrderNotPaid":
        return Error(**failure.details[0])
    reason = getattr(failure, "cause", None) or failure
    return Error(type=type(reason).__name__, message=str(reason), cause=None)


async def report(
    stack: Stack, step: Step, handle: WorkflowHandle[OrderWorkflow, OrderReceipt], seconds: float
) -> Report:
    """Read the facts: the outcome from the history, the HTTP requests from the services' access logs."""
    result, error, outcome = None, None, "succeeded"
    try:
        result = asdict(await handle.result())
    except WorkflowFailureError as failure:
        outcome = "canceled" if is_cancelled_exception(failure.cause) else "failed"
        error = describe_error(failure)
    run = (await handle.describe()).run_id
    history = await handle.fetch_history()
    [request_id] = [
        event.activity_task_scheduled_event_attributes.activity_id
        for event in history.events
        if event.HasField("activity_task_scheduled_event_attributes")
    ]
    requests = [
        line
        for line in stack.log_lines("receiver", "handler")
        if line["event"] == "bridge.http_request" and line.get("bridge.request_id") == request_id
    ]
    starts = [line for line in requests if line["bridge.route"] == START_ROUTE]
    runs = [line for line in starts if "bridge.run_id" in line]
    target = None
    if runs:
        target = Ref(
            namespace=HANDLER_NAMESPACE,
            workflow_id=runs[-1]["bridge.target"],
            run_id=runs[-1]["bridge.run_id"],
        )
    return Report(
        order_id=step.order_id,
        amount=step.amount,
        outcome=outcome,
        result=result,
        error=error,
        caller=Ref(namespace=CALLER_NAMESPACE, workflow_id=handle.id, run_id=run),
        target=target,
        http_requests=len(requests),
        renewals=sum(line.get("bridge.attempt", 1) > 1 for line in starts),
        caller_events=len(history.events),
        seconds=round(seconds, 3),
    )


def is_expected(step: Step, told: Report) -> bool:
    """Whether an order ended as it should."""
    return f"{told.outcome} {told.error.type if told.error else ''}".strip() == step.expected


def tell(stack: Stack, step: Step, told: Report) -> None:
    """One order's timeline, for a person."""

    def link(ref: Ref) -> str:
        where = f"{ref.namespace}/{ref.workflow_id}"
        if stack.server.ui is None:
            return where
        path = f"namespaces/{ref.namespace}/workflows/{ref.workflow_id}/{ref.run_id}"
        return f"{where}\n               {stack.server.ui}/{path}"

    mark = "✓" if is_expected(step, told) else f"✗ expected {step.expected}"
    say(f"\n{mark} order {step.order_id}, amount {step.amount:g}: {step.title}")
    say(f"    caller     {link(told.caller)}")
    say(f"    target     {link(told.target) if told.target else 'none'}")
    if told.result is not None:
        say(f"    outcome    {told.outcome}: {told.result['status']}, payment {told.result['payment_id']}")
    if told.error is not None:
        cause = f" (because: {told.error.cause})" if told.error.cause else ""
        say(f"    outcome    {told.outcome}: {told.error.type}: {told.error.message}{cause}")
    say(
        f"    cost       {told.http_requests} HTTP requests, {told.renewals} renewals, "
        f"{told.caller_events} history events in the caller, {told.seconds:.2f} s"
    )


async def _demo(arguments: argparse.Namespace) -> int:
    async def work() -> int:
        async with running_stack(stack_options(arguments)) as stack:
            client = await Client.connect(stack.server.address, namespace=CALLER_NAMESPACE)
            say("sending five orders; the slow one takes several seconds …")
            first = await asyncio.gather(*(send(client, step) for step in STEPS[:-1]))
            # The last is the first one again, after that has ended.
            sent = [*first, await send(client, STEPS[-1])]
            reports = [await report(stack, step, *each) for step, each in zip(STEPS, sent, strict=True)]
            for step, told in zip(STEPS, reports, strict=True):
                tell(stack, step, told)
            once = reports[0].target is not None and reports[0].target == reports[-1].target
            ok = once and all(map(is_expected, STEPS, reports))
            say(
                f"\n{'every order ended as expected' if ok else 'NOT as expected'}; order 1001 was charged "
                f"{'once' if once else 'TWICE'}"
            )
            if arguments.json:
                print(json.dumps({"orders": [asdict(each) for each in reports], "ok": ok}), flush=True)
            if arguments.stay and sys.stdin.isatty():
                say("the links above work until you press Enter")
                await asyncio.to_thread(sys.stdin.readline)
        return 0 if ok else 1

    return await until_stopped(work)


def main() -> NoReturn:
    """Parse the command line and run the orders."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print the facts as one JSON object, the last line of output"
    )
    parser.add_argument("--stay", action="store_true", help="wait for Enter before stopping, to follow the links")
    add_stack_options(parser, first_lease=2.0, renewal=2.0)
    end(_demo(parser.parse_args()))


if __name__ == "__main__":
    main()
