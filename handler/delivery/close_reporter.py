"""Notices that this worker closes a run of a target: the private adapter below the interceptor.

An interceptor sees only what is inside a workflow. A run can also close by a signal handler, by `@workflow.init`, by a
conversion that fails, or because another interceptor changed the result. The workflow runner sees every activation of a
run and the completion of each. The reporter therefore replaces `activate` of the instances that the runner makes.

The reporter reports a hint and never an outcome. The dispatcher then reads the outcome from Temporal. A wrong hint
costs one read. The reporter catches every error, because an exception would fail the team's workflow task or keep the
worker from shutting down.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.bridge.proto.workflow_activation import RemoveFromCache, WorkflowActivation
from temporalio.bridge.proto.workflow_commands import ContinueAsNewWorkflowExecution
from temporalio.bridge.proto.workflow_completion import WorkflowActivationCompletion
from temporalio.worker import WorkflowInstance, WorkflowInstanceDetails, WorkflowRunner
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from bridge.runtime.event_log import event_logger
from bridge.workflow.targets import Targets
from handler.delivery.calls import call_in
from handler.delivery.records import ATTACH_SIGNAL, ATTACHED_HEADER, MEMO_KEY

MAX_ATTACHED = 1000
"""Maximum number of attached calls of one run. A call beyond it gets the outcome by its renewals."""

_MAX_CARRIED_BYTES = 1024 * 1024
"""Maximum size of a continue-as-new command with attached calls. The server terminates a run at 2 MiB."""
_OVERDUE_S = 5.0
"""Maximum time from the closing task to the eviction. Workers without safe eviction report no eviction."""

_FORGOTTEN_S = 600.0
"""Time after which a late eviction is no longer expected."""

_CLOSING = {"complete_workflow_execution", "fail_workflow_execution", "cancel_workflow_execution"}
_MAY_HAVE_CLOSED = {
    RemoveFromCache.WORKFLOW_EXECUTION_ENDING,
    # These three reasons do not show whether the server accepted the closing. The close event does.
    RemoveFromCache.CACHE_FULL,
    RemoveFromCache.TASK_NOT_FOUND,
    RemoveFromCache.FATAL,
}

_log = event_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClosingRun:
    """A run that this worker may have closed, and the calls that wait for it."""

    workflow_id: str
    """Of the target."""
    run_id: str
    """Of the run that may have closed."""
    start_time: datetime
    """Start of the run, by the server's clock."""
    is_first: bool
    """Whether the start request created this run: it follows no continue-as-new, retry or cron."""
    calls: Sequence[Payload]
    """Each is a `CallMemo` without the codec. The first is the call that started the run, if a call did."""


class CloseReporter:
    """Reports the closing runs of one worker."""

    def __init__(self, report: Callable[[ClosingRun], None]) -> None:
        """The worker's threads call *report*."""
        self.prepared: set[str] = set()
        """Names of the workflows that run under this reporter."""
        self._report = report
        self._targets: set[str] = set()
        self._remembered: dict[str, tuple[_WatchedRun, float]] = {}
        self._overdue: dict[str, float] = {}
        """Run ids that were reported without an eviction. The server may accept their closing later."""

    def around(self, runner: WorkflowRunner) -> WorkflowRunner:
        """Return a runner that behaves as *runner* and reports."""
        if type(runner) is not SandboxedWorkflowRunner:
            return _ReportingRunner(runner, self)
        # Keep it a SandboxedWorkflowRunner, because other plugins check the type and replace the restrictions.
        values = {each.name: getattr(runner, each.name) for each in fields(runner) if each.init}
        return _ReportingSandbox(**values, reporter=self)

    def prepare(self, defn: Any) -> None:
        """Note a workflow definition that the worker registers; a target is watched from now on."""
        self.prepared.add(defn.name)
        if list(Targets([defn.cls])):
            self._targets.add(defn.name)

    def watch(self, instance: WorkflowInstance, det: WorkflowInstanceDetails) -> WorkflowInstance:
        """Return *instance*, with a watched `activate` if it is a run of a target, or continues one."""
        # A target may continue as a workflow that is no target. The memo with the call goes on with it.
        is_continued = MEMO_KEY in det.info.raw_memo and det.info.continued_run_id is not None
        if is_continued or det.defn.name in self._targets:
            watched = _WatchedRun(self, det, instance.activate)
            # A delegating instance would break: the SDK has added methods to that class three times in a year.
            instance.activate = watched.activate  # type: ignore[method-assign] # replaced for this instance alone
        return instance

    def remember(self, run: "_WatchedRun") -> None:
        """Remember that a task of *run* has decided to close it."""
        self._remembered[run.run_id] = run, time.monotonic()

    def forget(self, run_id: str) -> bool:
        """Drop what is remembered of a run. Returns whether it was remembered as closing."""
        return bool(self._remembered.pop(run_id, None)) | bool(self._overdue.pop(run_id, None))

    def report(self, run: "_WatchedRun") -> None:
        """Report that *run* may have closed."""
        self._report(run.closing_run())

    def report_overdue(self, *, older_than_s: float = _OVERDUE_S) -> None:
        """Report the runs whose closing was decided more than *older_than_s* ago and whose eviction did not come."""
        before = time.monotonic() - older_than_s
        for run, decided in list(self._remembered.values()):
            if decided <= before and self.forget(run.run_id):
                self._overdue[run.run_id] = decided
                self.report(run)
        for run_id, decided in list(self._overdue.items()):
            if decided <= before - _FORGOTTEN_S:
                self._overdue.pop(run_id, None)


def is_reporting(runner: WorkflowRunner | None) -> bool:
    """Whether a reporter made *runner*."""
    return isinstance(runner, _ReportingSandbox | _ReportingRunner)


@dataclass(frozen=True)
class _ReportingSandbox(SandboxedWorkflowRunner):
    reporter: CloseReporter | None = None
    """Never None in fact. The base class has fields with defaults, which require one here too."""

    def prepare_workflow(self, defn: workflow._Definition) -> None:
        assert self.reporter is not None
        self.reporter.prepare(defn)
        super().prepare_workflow(defn)

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        assert self.reporter is not None
        return self.reporter.watch(super().create_instance(det), det)


class _ReportingRunner(WorkflowRunner):
    def __init__(self, inner: WorkflowRunner, reporter: CloseReporter) -> None:
        self._inner = inner
        self._reporter = reporter

    def prepare_workflow(self, defn: workflow._Definition) -> None:
        self._reporter.prepare(defn)
        self._inner.prepare_workflow(defn)

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        return self._reporter.watch(self._inner.create_instance(det), det)

    def set_worker_level_failure_exception_types(self, types: Sequence[type[BaseException]]) -> None:
        self._inner.set_worker_level_failure_exception_types(types)


class _WatchedRun:
    """One cached run of a target."""

    def __init__(
        self,
        reporter: CloseReporter,
        det: WorkflowInstanceDetails,
        inner: Callable[[WorkflowActivation], WorkflowActivationCompletion],
    ) -> None:
        self.run_id = det.info.run_id
        self._reporter = reporter
        self._info = det.info
        self._inner = inner
        self._det = det
        self._attached: dict[object, Payload] = {}
        for name, each in det.info.headers.items():
            if name.startswith(ATTACHED_HEADER):
                self._guarded(self._attach, each)
        failure_types = (*det.worker_level_failure_exception_types, *det.defn.failure_exception_types)
        self._fails_on_nondeterminism = any(issubclass(workflow.NondeterminismError, each) for each in failure_types)
        self._may_close = False
        """Whether the last activation was neither a replay nor continue-as-new."""

    def activate(self, act: WorkflowActivation) -> WorkflowActivationCompletion:
        self._guarded(self._before, act)
        completion = self._inner(act)
        self._guarded(self._after, act, completion)
        return completion

    def closing_run(self) -> ClosingRun:
        own, info = self._info.raw_memo.get(MEMO_KEY), self._info
        return ClosingRun(
            workflow_id=info.workflow_id,
            run_id=info.run_id,
            start_time=info.workflow_start_time,
            is_first=info.run_id == info.first_execution_run_id,
            calls=[*([own] if own is not None else []), *self._attached.values()],
        )

    def _guarded(self, step: Callable[..., None], *arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception:  # noqa: BLE001 - any error: the team's run must go on
            _log.exception("bridge.close_not_noticed", extra={"bridge.target": self._info.workflow_id})

    def _before(self, act: WorkflowActivation) -> None:
        for job in act.jobs:
            if job.HasField("signal_workflow") and job.signal_workflow.signal_name == ATTACH_SIGNAL:
                for each in job.signal_workflow.input:
                    # Copy the payload. The original would keep the whole activation in memory.
                    self._attach(Payload.FromString(each.SerializeToString()))
            elif job.HasField("remove_from_cache"):
                self._evicted(job.remove_from_cache.reason)

    def _attach(self, call: Payload) -> None:
        """Keep *call*, once for all its signals: a renewal attaches it to each run that continues the target."""
        found = call_in(self._det.payload_converter_factory(), call)
        if len(self._attached) < MAX_ATTACHED:
            self._attached.setdefault(call.SerializeToString() if found is None else found.identity, call)

    def _evicted(self, reason: int) -> None:
        # This runs before the inner eviction, which may hang and may be repeated.
        may_close, self._may_close = self._may_close, False
        if self._reporter.forget(self.run_id):
            is_reported = reason in _MAY_HAVE_CLOSED
        elif reason == RemoveFromCache.NONDETERMINISM:
            # The SDK's core itself then fails the run.
            is_reported = self._fails_on_nondeterminism
        else:
            # If a payload can never be decoded, the SDK's worker closes the run without an activation.
            is_reported = reason == RemoveFromCache.WORKFLOW_EXECUTION_ENDING and may_close
        if is_reported:
            self._reporter.report(self)

    def _after(self, act: WorkflowActivation, completion: WorkflowActivationCompletion) -> None:
        if any(job.HasField("remove_from_cache") for job in act.jobs):
            return
        commands = {each.WhichOneof("variant"): each for each in completion.successful.commands}
        continuing = commands.get("continue_as_new_workflow_execution")
        if continuing is not None:
            self._carry(continuing.continue_as_new_workflow_execution)
        self._may_close = not act.is_replaying and continuing is None
        self._reporter.forget(self.run_id)
        if not act.is_replaying and _CLOSING & commands.keys():
            self._reporter.remember(self)

    def _carry(self, command: ContinueAsNewWorkflowExecution) -> None:
        """Add the calls to the next run. The server keeps the old memo only if the command has no memo."""
        own = self._info.raw_memo.get(MEMO_KEY)
        if command.memo and own is not None:
            command.memo[MEMO_KEY].CopyFrom(own)
        room = _MAX_CARRIED_BYTES - command.ByteSize()
        for index, call in enumerate(self._attached.values()):
            room -= call.ByteSize()
            if room < 0:
                extra = {"bridge.target": self._info.workflow_id, "bridge.calls": len(self._attached) - index}
                _log.warning("bridge.attached_calls_dropped", extra=extra)
                return
            command.headers[f"{ATTACHED_HEADER}{index}"].CopyFrom(call)
