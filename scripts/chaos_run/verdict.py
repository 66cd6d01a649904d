"""The verdict on the calls of a chaos run, from the histories of both namespaces alone. Pure functions."""

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

from bridge.workflow.call import OPERATION_UNSUCCESSFUL, START_OPERATION_ACTIVITY
from caller.endpoint_client import MAY_HAVE_STARTED
from handler.delivery.records import ATTACH_SIGNAL, MEMO_KEY
from handler.delivery.workflow import DELIVERY_WORKFLOW
from scripts.chaos_run.calls import Call

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
"""Shortest silence in a history that the report names."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run with its whole history."""

    namespace: str
    workflow_id: str
    run_id: str
    events: Sequence[HistoryEvent]

    @property
    def workflow_type(self) -> str:
        """Temporal's name of the workflow."""
        return self.events[0].workflow_execution_started_event_attributes.workflow_type.name

    @property
    def closing(self) -> HistoryEvent | None:
        """The close event; None while the run is open."""
        return self.events[-1] if self.events[-1].event_type in _CLOSINGS else None

    @property
    def started_at(self) -> float:
        """Unix time in seconds."""
        return seconds_of(self.events[0])


@dataclass(kw_only=True)
class Verdict:
    """The mistakes that were found, one sentence each. If all lists are empty, the run was good."""

    lost: list[str] = field(default_factory=list)
    """Calling workflows that never ran, or closed without an answer."""
    wrong: list[str] = field(default_factory=list)
    """Calls with another answer than the right one, and runs that no call started."""
    double: list[str] = field(default_factory=list)
    """Calling workflows, calls or targets that ran or ended more than once."""
    pending: list[str] = field(default_factory=list)
    """Calling workflows that are open."""
    undelivered: list[str] = field(default_factory=list)
    """Outcomes that did not reach a call: a target or a delivery is open or failed, or a call got no outcome."""

    def counts(self) -> dict[str, int]:
        """Number of mistakes of each kind."""
        return {name: len(found) for name, found in vars(self).items()}

    def sentences(self) -> Iterator[str]:
        """All mistakes, each with its kind."""
        for name, found in vars(self).items():
            yield from (f"{name}: {each}" for each in found)


def judge(calls: Sequence[Call], *, callers: Iterable[Run], handlers: Iterable[Run]) -> Verdict:
    """Compare every run of both namespaces with the runs and answers that *calls* must have."""
    verdict, callers = Verdict(), list(callers)
    calling, handling = _by_workflow_id(callers), _by_workflow_id(handlers)
    for call in calls:
        _judge_call(call, calling.pop(call.workflow_id, []), verdict)
    for workflow_id in calling:
        verdict.wrong.append(f"{workflow_id}: not started by a call")
    answered = {request_id for run in callers for request_id in _request_ids(run) if _endings(run)}
    for order_id, runs_wanted in {call.order_id: call.target_runs for call in calls}.items():
        _judge_targets(order_id, handling.pop(f"payment-{order_id}", []), runs_wanted, answered, verdict)
    for workflow_id, runs in handling.items():
        for run in runs:
            if run.workflow_type != DELIVERY_WORKFLOW:
                verdict.wrong.append(f"{workflow_id}: not started by a call")
            elif run.closing is None or run.closing.event_type != EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                how = "open" if run.closing is None else name_of(run.closing)
                verdict.undelivered.append(f"{workflow_id}: {how}")
    return verdict


def answer_of(closing: HistoryEvent) -> str | None:
    """The answer that a calling workflow got, in the words of `Call.answer`; None if it closed without an answer.

    The answer of a failure comes from the details of its innermost application error, which the target set.
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
    """A harm that was done."""

    name: str
    """Its kind."""
    began: float
    """Unix time in seconds."""
    ended: float
    """When the killed processes were ready again, Unix time in seconds."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How long one call took to recover from harm."""

    workflow_id: str
    """Id of the calling workflow."""
    recovery_s: float
    """Seconds to the end of the call, from the later of two times: the end of the last harm during the call, and the
    end of the call without harm."""
    late_s: float
    """Difference to the duration without harm, in seconds."""
    ended_at: float
    """Unix time in seconds."""
    why: str
    """The longest silences in the histories of call, target and delivery, and the harm during the call."""


def recoveries(
    calls: Sequence[Call], *, callers: Iterable[Run], handlers: Iterable[Run], harms: Sequence[HarmDone]
) -> list[Recovery]:
    """The recovery of every call that has ended, the slowest first."""
    calling, handling = _by_workflow_id(callers), _by_workflow_id(handlers)
    deliveries: defaultdict[str, list[Run]] = defaultdict(list)
    for delivery in (run for runs in handling.values() for run in runs if run.workflow_type == DELIVERY_WORKFLOW):
        for request_id in _calls_of(delivery):
            deliveries[request_id].append(delivery)
    found = []
    for call in calls:
        for run in calling.get(call.workflow_id, []):
            if run.closing is None:
                continue
            due_at, ended_at = run.started_at + call.own_s, seconds_of(run.closing)
            mended = [harm.ended for harm in harms if run.started_at <= harm.ended <= ended_at]
            sent = [each for request_id in _request_ids(run) for each in deliveries[request_id]]
            found.append(
                Recovery(
                    workflow_id=call.workflow_id,
                    recovery_s=max(0.0, ended_at - max([due_at, *mended])),
                    late_s=max(0.0, ended_at - due_at),
                    ended_at=ended_at,
                    why=_why(run, [*handling.get(f"payment-{call.order_id}", []), *sent], harms),
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
        if len(_request_ids(run)) > 1 or len(_endings(run)) > 1:
            verdict.double.append(f"{call.workflow_id}: its call was made or ended more than once")
        if run.closing is None:
            verdict.pending.append(f"{call.workflow_id}: open")
            continue
        answer = answer_of(run.closing)
        if answer is None:
            verdict.lost.append(f"{call.workflow_id}: {name_of(run.closing)}")
        elif answer.removesuffix(MAY_HAVE_STARTED) != call.answer:
            verdict.wrong.append(f"{call.workflow_id}: {answer!r} in place of {call.answer!r}")


def _judge_targets(order_id: str, runs: Sequence[Run], runs_wanted: int, answered: set[str], verdict: Verdict) -> None:
    if len(runs) > runs_wanted:
        verdict.double.append(f"order {order_id}: its target ran {len(runs)} times")
    if len(runs) < runs_wanted:
        verdict.wrong.append(f"order {order_id}: its target never ran")
    for run in runs:
        if run.closing is None:
            verdict.undelivered.append(f"{run.workflow_id}: open")
        verdict.undelivered += [f"{run.workflow_id}: never delivered to {each}" for each in _calls_of(run) - answered]


def _calls_of(run: Run) -> set[str]:
    """Request ids of the calls that wait for *run*, which is a target or a delivery."""
    memo = run.events[0].workflow_execution_started_event_attributes.memo.fields[MEMO_KEY]
    signals = [event.workflow_execution_signaled_event_attributes for event in run.events]
    attached = [call for each in signals if each.signal_name == ATTACH_SIGNAL for call in _values(each.input)]
    return {str(call["request_id"]) for call in (json.loads(memo.data), *attached)}


def _why(run: Run, others: Iterable[Run], harms: Sequence[HarmDone]) -> str:
    """Describe where the time of a call went."""
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
    described = [
        f"{length:.1f} s from {_label(earlier)} to {_label(later)}"
        for length, earlier, later in sorted(silences, key=lambda silence: silence[1][0])
        if length >= _LONG_S
    ]
    done = Counter(harm.name for harm in harms if harm.began <= until and harm.ended >= run.started_at)
    meanwhile = ", ".join(f"{count} {name}" for name, count in sorted(done.items())) or "none"
    return f"{'; '.join(described) or 'no long silence'} (harm meanwhile: {meanwhile})"


def _label(line: tuple[float, str, HistoryEvent]) -> str:
    _, namespace, event = line
    attempt = event.activity_task_started_event_attributes.attempt
    return f"{namespace} {name_of(event)}{f' (attempt {attempt})' if attempt else ''}"


def _request_ids(run: Run) -> set[str]:
    """The ids of the run's calls. An activity that ended without an outcome is scheduled again under the same id."""
    scheduled = (event.activity_task_scheduled_event_attributes for event in run.events)
    return {each.activity_id for each in scheduled if each.activity_type.name == START_OPERATION_ACTIVITY}


def _endings(run: Run) -> list[HistoryEvent]:
    """The events that ended a call, without those after which its activity is scheduled again."""
    ends = {
        EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
        EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
        EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED,
    }
    failed = EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED
    return [
        event for event in run.events if event.event_type in ends or (event.event_type == failed and _is_outcome(event))
    ]


def _is_outcome(failed: HistoryEvent) -> bool:
    failure = failed.activity_task_failed_event_attributes.failure
    return failure.application_failure_info.type == OPERATION_UNSUCCESSFUL


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
    """The decoded *payloads*. The example uses JSON everywhere, and no codec."""
    return [json.loads(payload.data) for payload in payloads.payloads]
