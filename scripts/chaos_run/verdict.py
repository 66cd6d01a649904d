"""What became of the calls of a chaos run, told from the histories of both namespaces and from nothing else. Pure."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from temporalio.api.common.v1 import Payloads
from temporalio.api.enums.v1 import EventType
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent

from bridge.workflow.call import START_OPERATION_ACTIVITY
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY
from handler.delivery.workflow import DELIVERY_WORKFLOW
from scripts.chaos_run.schedule import Call

TARGET = "PaymentWorkflow"

_CLOSINGS = frozenset(
    {
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
        EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CONTINUED_AS_NEW,
    }
)
_LONG_S = 2.0
"""A silence worth telling."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run with its whole history."""

    namespace: str
    workflow_id: str
    run_id: str
    events: Sequence[HistoryEvent]

    @property
    def workflow_type(self) -> str:
        return self.events[0].workflow_execution_started_event_attributes.workflow_type.name

    @property
    def closing(self) -> HistoryEvent | None:
        """None while it is open."""
        return self.events[-1] if self.events[-1].event_type in _CLOSINGS else None

    @property
    def started_at(self) -> float:
        """Unix time in seconds."""
        return seconds_of(self.events[0])


@dataclass(kw_only=True)
class Verdict:
    """What is wrong, a sentence each. All empty: the run was good."""

    lost: list[str] = field(default_factory=list)
    """Never ran, or closed without an answer."""
    wrong: list[str] = field(default_factory=list)
    """Another answer than its own."""
    double: list[str] = field(default_factory=list)
    """Ran or ended more than once: a calling workflow, a call in it, or the target of an order."""
    pending: list[str] = field(default_factory=list)
    undelivered: list[str] = field(default_factory=list)
    """An outcome that nobody was told: a target or a delivery that is open or failed, or a call left out."""

    def counts(self) -> dict[str, int]:
        return {name: len(found) for name, found in vars(self).items()}

    def sentences(self) -> Iterator[str]:
        for name, found in vars(self).items():
            yield from (f"{name}: {each}" for each in found)


def judge(calls: Sequence[Call], *, callers: Iterable[Run], handlers: Iterable[Run]) -> Verdict:
    """Compare every run of both namespaces with what *calls* must have led to."""
    verdict, callers = Verdict(), list(callers)
    calling, handling = _by_workflow_id(callers), _by_workflow_id(handlers)
    for call in calls:
        _judge_call(call, calling.pop(call.workflow_id, []), verdict)
    for workflow_id in calling:
        verdict.wrong.append(f"{workflow_id}: nobody asked for it")
    told = {
        each.activity_task_scheduled_event_attributes.activity_id
        for run in callers
        for each in _waits(run)
        if _endings(run)
    }
    for order_id, runs_wanted in {call.order_id: call.target_runs for call in calls}.items():
        _judge_targets(order_id, handling.pop(f"payment-{order_id}", []), runs_wanted, told, verdict)
    for workflow_id, runs in handling.items():
        for run in runs:
            if run.workflow_type != DELIVERY_WORKFLOW:
                verdict.wrong.append(f"{workflow_id}: nobody asked for it")
            elif run.closing is None or run.closing.event_type != EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                how = "open" if run.closing is None else name_of(run.closing)
                verdict.undelivered.append(f"{workflow_id}: {how}")
    return verdict


def answer_of(closing: HistoryEvent) -> str | None:
    """What a calling workflow was answered, in the words of `Call.answer`; None if it closed without an answer.

    Of a failure the innermost application error counts, by its details: they were made by the target.
    """
    match closing.event_type:
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
            [receipt] = _values(closing.workflow_execution_completed_event_attributes.result)
            return f"order {receipt['order_id']}: {receipt['status']}, payment {receipt['payment_id']}"
        case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
            causes = list(_causes(closing.workflow_execution_failed_event_attributes.failure))
            outermost = causes[0].application_failure_info
            if outermost.type == "OrderNotPaid":
                order_id = causes[0].message.removeprefix("order ").partition(" ")[0]
                for cause in causes:
                    info = cause.application_failure_info
                    if info.type in {"CardDeclined", "PaymentRejected"}:
                        [detail] = _values(info.details)
                        about = detail["order_id"] if isinstance(detail, dict) else detail
                        return f"order {order_id}: {info.type} {about}"
            for cause in causes:
                if cause.HasField("nexus_handler_failure_info"):
                    return f"refused: {cause.cause.message or cause.message}"
            return f"failed: {' <- '.join(cause.message for cause in causes)}"
        case _:
            return None


@dataclass(frozen=True, kw_only=True)
class HarmDone:
    """A harm as it was done."""

    name: str
    began: float
    """Unix time in seconds."""
    ended: float
    """When what was killed was ready again."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How one call came through."""

    workflow_id: str
    recovery_s: float
    """From the last harm of its life that was mended by then, and not before it was due, to its end."""
    late_s: float
    """How much longer it took in all than it would have undisturbed."""
    ended_at: float
    """Unix time in seconds."""
    why: str
    """The longest silences in the histories of call, target and delivery, and the harm done meanwhile."""


def recoveries(
    calls: Sequence[Call], *, callers: Iterable[Run], handlers: Iterable[Run], harms: Sequence[HarmDone]
) -> list[Recovery]:
    """Of every call that has ended, the slowest first."""
    calling, handling = _by_workflow_id(callers), _by_workflow_id(handlers)
    deliveries = [run for runs in handling.values() for run in runs if run.workflow_type == DELIVERY_WORKFLOW]
    found = []
    for call in calls:
        for run in calling.get(call.workflow_id, []):
            if run.closing is None:
                continue
            due_at, ended_at = run.started_at + call.own_s, seconds_of(run.closing)
            mended = [harm.ended for harm in harms if run.started_at <= harm.ended <= ended_at]
            request_ids = {event.activity_task_scheduled_event_attributes.activity_id for event in _waits(run)}
            told = [each for each in deliveries if any(request_id in each.workflow_id for request_id in request_ids)]
            found.append(
                Recovery(
                    workflow_id=call.workflow_id,
                    recovery_s=max(0.0, ended_at - max([due_at, *mended])),
                    late_s=max(0.0, ended_at - due_at),
                    ended_at=ended_at,
                    why=_why(run, [*handling.get(f"payment-{call.order_id}", []), *told], harms),
                )
            )
    return sorted(found, key=lambda recovery: -recovery.recovery_s)


def seconds_of(event: HistoryEvent) -> float:
    """When *event* was written, Unix time in seconds."""
    return event.event_time.ToNanoseconds() / 1e9


def name_of(event: HistoryEvent) -> str:
    """The event's type in words: "workflow task timed out"."""
    return EventType.Name(event.event_type).removeprefix("EVENT_TYPE_").replace("_", " ").lower()


def _judge_call(call: Call, runs: Sequence[Run], verdict: Verdict) -> None:
    if not runs:
        verdict.lost.append(f"{call.workflow_id}: never ran")
    if len(runs) > 1:
        verdict.double.append(f"{call.workflow_id}: ran {len(runs)} times")
    for run in runs:
        if len(_waits(run)) > 1 or len(_endings(run)) > 1:
            verdict.double.append(f"{call.workflow_id}: its call was made or ended more than once")
        if run.closing is None:
            verdict.pending.append(f"{call.workflow_id}: open")
            continue
        answer = answer_of(run.closing)
        if answer is None:
            verdict.lost.append(f"{call.workflow_id}: {name_of(run.closing)}")
        elif answer != call.answer:
            verdict.wrong.append(f"{call.workflow_id}: {answer!r} in place of {call.answer!r}")


def _judge_targets(order_id: str, runs: Sequence[Run], runs_wanted: int, told: set[str], verdict: Verdict) -> None:
    if len(runs) > runs_wanted:
        verdict.double.append(f"order {order_id}: its target ran {len(runs)} times")
    if len(runs) < runs_wanted:
        verdict.wrong.append(f"order {order_id}: its target never ran")
    for run in runs:
        if run.closing is None:
            verdict.undelivered.append(f"{run.workflow_id}: open")
        verdict.undelivered += [f"{run.workflow_id}: never delivered to {each}" for each in _calls_of(run) - told]


def _calls_of(target: Run) -> set[str]:
    """Request ids of the calls that wait for *target*."""
    memo = target.events[0].workflow_execution_started_event_attributes.memo.fields[MEMO_KEY]
    signals = [event.workflow_execution_signaled_event_attributes for event in target.events]
    attached = [call for each in signals if each.signal_name == ATTACH_SIGNAL for call in _values(each.input)]
    return {str(call["request_id"]) for call in (json.loads(memo.data), *attached)}


def _why(run: Run, others: Iterable[Run], harms: Sequence[HarmDone]) -> str:
    """Tell where the time of a call went."""
    until = seconds_of(run.events[-1])
    lines = sorted(
        ((seconds_of(event), each.namespace, event) for each in (run, *others) for event in each.events),
        key=lambda line: line[0],
    )
    lines = [line for line in lines if run.started_at <= line[0] <= until]
    silences = sorted(
        ((later[0] - earlier[0], earlier, later) for earlier, later in itertools.pairwise(lines)),
        key=lambda silence: -silence[0],
    )[:3]
    told = [
        f"{length:.1f} s from {_label(earlier)} to {_label(later)}"
        for length, earlier, later in sorted(silences, key=lambda silence: silence[1][0])
        if length >= _LONG_S
    ]
    done = Counter(harm.name for harm in harms if harm.began <= until and harm.ended >= run.started_at)
    meanwhile = ", ".join(f"{count} {name}" for name, count in sorted(done.items())) or "none"
    return f"{'; '.join(told) or 'no long silence'} (harm meanwhile: {meanwhile})"


def _label(line: tuple[float, str, HistoryEvent]) -> str:
    _, namespace, event = line
    attempt = event.activity_task_started_event_attributes.attempt
    return f"{namespace} {name_of(event)}{f' (attempt {attempt})' if attempt else ''}"


def _waits(run: Run) -> list[HistoryEvent]:
    return [
        event
        for event in run.events
        if event.activity_task_scheduled_event_attributes.activity_type.name == START_OPERATION_ACTIVITY
    ]


def _endings(run: Run) -> list[HistoryEvent]:
    ends = {
        EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
        EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
        EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
        EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED,
    }
    return [event for event in run.events if event.event_type in ends]


def _by_workflow_id(runs: Iterable[Run]) -> dict[str, list[Run]]:
    grouped: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        grouped[run.workflow_id].append(run)
    return dict(grouped)


def _causes(failure: Failure) -> Iterator[Failure]:
    yield failure
    if failure.HasField("cause"):
        yield from _causes(failure.cause)


def _values(payloads: Payloads) -> list[Any]:
    """The example uses JSON throughout, and no codec."""
    return [json.loads(payload.data) for payload in payloads.payloads]
