"""Run the main job: order workflows in one namespace have their payments made by workflows in another.

Starts two real Temporal servers that know nothing of each other, one for each team, and one process for each team.
Sends five orders through, prints what happened, and ends everything. Exits 0 only if every outcome was the expected
one.
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

from examples.payments.order import Order, OrderReceipt
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from scripts.commands.up import add_stack_options, stack_options
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import say
from scripts.environment.server import Server
from scripts.environment.stack import CALLER_NAMESPACE, HANDLER_NAMESPACE, Stack, StackOptions, running_stack

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
    Step(title="five seconds later, and nothing polled", order_id="1002", amount=420.0, expected="succeeded"),
    Step(title="the failure arrives whole", order_id="1003", amount=42_000.0, expected="failed CardDeclined"),
    Step(title="another one, at the same time", order_id="1004", amount=7.5, expected="succeeded"),
    Step(title="order 1001 again: charged once", order_id="1001", amount=42.0, expected="succeeded"),
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
        entry
        for entry in stack.log_lines()
        if entry["event"] == "bridge.http_request" and entry.get("bridge.request_id") == request_id
    ]
    starts = [entry for entry in requests if entry["bridge.route"] == START_ROUTE]
    runs = [entry for entry in starts if "bridge.run_id" in entry]
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
        renewals=sum(entry.get("bridge.attempt", 1) > 1 for entry in starts),
        caller_events=len(history.events),
        seconds=round(seconds, 3),
    )


def is_expected(step: Step, seen: Report) -> bool:
    """Whether an order ended as it should."""
    return f"{seen.outcome} {seen.error.type if seen.error else ''}".strip() == step.expected


def line(step: Step, seen: Report) -> str:
    """One order in one line: outcome, seconds, HTTP requests, and what it proves."""
    mark = "✓" if is_expected(step, seen) else "✗"
    outcome = seen.result["status"] if seen.result is not None else seen.error.type if seen.error else seen.outcome
    requests = f"{seen.http_requests} request{'s' if seen.http_requests != 1 else ' '}"
    proves = step.title if is_expected(step, seen) else f"expected {step.expected}"
    return f"{mark} {step.order_id}  {outcome:<13}{seen.seconds:5.2f} s  {requests}  {proves}"


def links(stack: Stack, seen: Report) -> list[str]:
    """One line for each side: the run in Temporal's UI, or its name where there is no UI."""
    sides = {"caller": seen.caller, "handler": seen.target}
    return [_link(stack.servers[side].ui, ref) for side, ref in sides.items() if ref is not None]


def _link(ui: str | None, ref: Ref) -> str:
    if ui is None:
        return f"    {ref.namespace}/{ref.workflow_id}"
    return f"    {ui}/namespaces/{ref.namespace}/workflows/{ref.workflow_id}/{ref.run_id}"


def details(seen: Report) -> list[str]:
    """What `--verbose` adds."""
    lines = []
    if seen.result is not None:
        lines.append(f"    result     {seen.result['status']}, payment {seen.result['payment_id']}")
    if seen.error is not None:
        cause = f" (because: {seen.error.cause})" if seen.error.cause else ""
        lines.append(f"    error      {seen.error.type}: {seen.error.message}{cause}")
    lines.append(f"    cost       {seen.renewals} renewals, {seen.caller_events} history events in the caller")
    return lines


NEXT = """
Next:
  ./scripts/demo --stay      the same, and the links above stay up until you press Enter
  ./scripts/demo --verbose   the same, with results, failures, renewals and history events
  ./scripts/up               keep everything running and send orders yourself"""


def _where(caller: Server, handler: Server) -> str:
    return "the same" if caller is handler else f"another one, {handler.version}, which knows nothing of the first"


async def _demo(arguments: argparse.Namespace, options: StackOptions) -> int:
    async def work() -> int:
        async with running_stack(options) as stack:
            caller, handler = stack.servers["caller"], stack.servers["handler"]
            client = await Client.connect(caller.address, namespace=CALLER_NAMESPACE)
            say(f"{CALLER_NAMESPACE} is on server {caller.version}, {HANDLER_NAMESPACE} on {_where(caller, handler)}")
            say("sending five orders; one of them takes five seconds …\n")
            first = await asyncio.gather(*(send(client, step) for step in STEPS[:-1]))
            # The last is the first one again, after that has ended.
            sent = [*first, await send(client, STEPS[-1])]
            reports = [await report(stack, step, *each) for step, each in zip(STEPS, sent, strict=True)]
            for step, seen in zip(STEPS, reports, strict=True):
                say("\n".join([line(step, seen), *links(stack, seen), *(details(seen) if arguments.verbose else [])]))
            once = reports[0].target is not None and reports[0].target == reports[-1].target
            ok = once and all(map(is_expected, STEPS, reports))
            say(
                f"\n{'every order ended as expected' if ok else 'NOT as expected'}; order 1001 was charged "
                f"{'once' if once else 'TWICE'}"
            )
            if arguments.json:
                print(json.dumps({"orders": [asdict(each) for each in reports], "ok": ok}), flush=True)
            if arguments.stay and sys.stdin.isatty():
                say("The links above work until you press Enter.")
                await asyncio.to_thread(sys.stdin.readline)
            else:
                say(NEXT)
        return 0 if ok else 1

    return await until_stopped(work)


def main() -> NoReturn:
    """Parse the command line and run the orders."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--json", action="store_true", help="print the facts as one JSON object, the last line of output"
    )
    parser.add_argument("--stay", action="store_true", help="wait for Enter before stopping, so that the links work")
    parser.add_argument("--verbose", action="store_true", help="show results, failures, renewals and history events")
    add_stack_options(parser, first_lease=30.0, renewal=60.0, clusters=2)
    arguments = parser.parse_args()
    end(_demo(arguments, stack_options(parser, arguments)))


if __name__ == "__main__":
    main()
