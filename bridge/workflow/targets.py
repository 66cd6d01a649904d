"""The contract side of the handler: which workflow stands behind which operation.

`emits_callback` only notes facts on the class, and `external_target` makes them for a workflow that runs elsewhere; the
handler's service and worker collect both into a `Targets` registry, and nothing outside that registry can be started.
Everything that can be checked is checked when the module is imported, so that a mismatch stops a deploy and not a
payment. Safe to import in workflow code.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import nexusrpc
from temporalio import workflow
from temporalio.common import RetryPolicy

_TARGET_ATTRIBUTE = "__bridge_target__"

_WorkflowT = TypeVar("_WorkflowT", bound=type)
_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One operation and the workflow that carries it out."""

    service: str
    operation: str
    input_type: type[Any]
    workflow_type: str
    """Temporal's name of the workflow."""
    workflow_class: type[Any] | None
    """None: it runs elsewhere."""
    workflow_id: Callable[[Any], str]
    """From the decoded input to the business id; the same input must always give the same id."""
    check: Callable[[Any], None] | None
    """Refuses an input by raising ValueError, before anything starts."""
    task_queue: str | None
    """None: the handler service's own."""
    instrumented: bool = True
    """Whether its workers have `HandlerPlugin` and deliver outcomes. If not, the sweep delivers every outcome."""
    retry_policy: RetryPolicy | None = None
    """As in `TargetOptions`; so are the following."""
    shared: bool = False
    bounded: bool = False
    on_orphaned: Literal["keep", "cancel"] = "keep"

    @property
    def name(self) -> str:
        """For people: the class, or the workflow type where there is none here."""
        return self.workflow_type if self.workflow_class is None else self.workflow_class.__name__


class TargetOptions(TypedDict, total=False):
    """What may be said of a target beside its operation."""

    retry_policy: RetryPolicy | None
    """Runs the workflow again after a failed run. The callers hear of the last run."""
    shared: bool
    """Whether a call may wait for, and learn the outcome of, a run that its own caller did not start. Default: no."""
    bounded: bool
    """Whether the caller's deadline is also the workflow's: it then times out with its call. Default: no."""
    on_orphaned: Literal["keep", "cancel"]
    """What becomes of a run that nobody waits for any more, because its callers ended or their deadlines passed.
    Default: it goes on."""


def emits_callback(
    *,
    service: type[Any],
    operation: nexusrpc.Operation[_InputT, _OutputT],
    workflow_id: Callable[[_InputT], str],
    check: Callable[[_InputT], None] | None = None,
    task_queue: str | None = None,
    instrumented: bool = True,
    **options: Unpack[TargetOptions],
) -> Callable[[_WorkflowT], _WorkflowT]:
    """Declare that a workflow carries out *operation* of *service*, and tells its callers when it has ended.

    Stands above `@workflow.defn`. The workflow itself stays ordinary: it knows nothing of callers or HTTP.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`.
        operation: One operation of that contract.
        workflow_id: Derives the workflow id from the operation's input. It decides what "the same" is: an id that was
            used before is answered with that run's outcome, never run again.
        check: May refuse an input with ValueError; its text reaches the caller as a bad request and nothing starts.
        task_queue: Where the workflow runs, if not on the task queue in the handler's settings.
        instrumented: False if workers without `HandlerPlugin` run it. The sweep then delivers every outcome.
        **options: See `TargetOptions`.

    Raises:
        TypeError: The class is no workflow, its types differ from the contract's, or *operation* is not *service*'s.
    """
    service_name, declared = _declared(service, operation)

    def decorate(workflow_class: _WorkflowT) -> _WorkflowT:
        # The SDK's own record of a workflow class: the only place that tells its name and types in one piece.
        found = workflow._Definition.from_class(workflow_class)  # noqa: SLF001
        if found is None or found.name is None:
            message = f"{workflow_class.__name__}: put @emits_callback above @workflow.defn (and give it a fixed name)"
            raise TypeError(message)
        input_type, output_type = declared.input_type, declared.output_type
        takes = found.arg_types if found.arg_types is not None else [input_type]
        expected = [[input_type]] + ([[]] if input_type is type(None) else [])
        if takes not in expected:
            message = f"{workflow_class.__name__}.run takes {takes}, but {operation.name!r} gives {input_type}"
            raise TypeError(message)
        if found.ret_type is not None and found.ret_type != output_type:
            message = f"{workflow_class.__name__}.run returns {found.ret_type}, but {operation.name!r} {output_type}"
            raise TypeError(message)
        target = Target(
            service=service_name,
            operation=operation.name,
            input_type=input_type,
            workflow_type=found.name,
            workflow_class=workflow_class,
            workflow_id=workflow_id,
            check=check,
            task_queue=task_queue,
            instrumented=instrumented,
            **options,
        )
        setattr(workflow_class, _TARGET_ATTRIBUTE, target)
        return workflow_class

    return decorate


def external_target(
    *,
    service: type[Any],
    operation: nexusrpc.Operation[_InputT, _OutputT],
    workflow_type: str,
    workflow_id: Callable[[_InputT], str],
    task_queue: str,
    check: Callable[[_InputT], None] | None = None,
    **options: Unpack[TargetOptions],
) -> Target:
    """Declare that a workflow which runs elsewhere (Go, Java, a worker without the plugin) carries out *operation*.

    Assign it to a name in the module that the handler serves. The sweep tells its outcome, a little after the ending;
    it needs a worker with `HandlerPlugin` on the handler's own task queue. The other arguments are those of
    `emits_callback`; the types are not checked, because nothing here knows those of the workflow.

    Args:
        workflow_type: Temporal's name of the workflow.
        task_queue: Where it runs.

    Raises:
        TypeError: *operation* is not *service*'s.
    """
    service_name, declared = _declared(service, operation)
    return Target(
        service=service_name,
        operation=declared.name,
        input_type=declared.input_type,
        workflow_type=workflow_type,
        workflow_class=None,
        workflow_id=workflow_id,
        check=check,
        task_queue=task_queue,
        instrumented=False,
        **options,
    )


def _declared(
    service: type[Any], operation: nexusrpc.Operation[_InputT, _OutputT]
) -> tuple[str, nexusrpc.OperationDefinition[Any, Any]]:
    """The service's name, and *operation* as its definition has it."""
    definition = nexusrpc.get_service_definition(service)
    if definition is None:
        message = f"service={service.__name__}: not decorated with @nexusrpc.service"
        raise TypeError(message)
    declared = definition.operation_definitions.get(operation.name)
    # By identity: another service may well have an operation of the same name and types.
    is_own = any(getattr(service, name, None) is operation for name in (operation.method_name or "", operation.name))
    if declared is None or not is_own:
        known = ", ".join(definition.operation_definitions)
        message = f"operation={operation.name!r} is not an operation of {definition.name} (it has: {known})"
        raise TypeError(message)
    return definition.name, declared


class Targets:
    """The operations that a handler serves: a closed set, looked up by service and operation."""

    def __init__(self, declared: Iterable[type[Any] | Target]) -> None:
        """Collect the targets among *declared*: decorated classes, and targets that run elsewhere.

        Raises:
            ValueError: Two workflows claim one operation.
        """
        self._targets: dict[tuple[str, str], Target] = {}
        for target in _targets_of(declared):
            key = target.service, target.operation
            if self._targets.get(key, target) is not target:
                both = f"{self._targets[key].name} and {target.name}"
                message = f"{target.service}/{target.operation} is claimed by {both}"
                raise ValueError(message)
            self._targets[key] = target

    @classmethod
    def in_module(cls, module: ModuleType) -> "Targets":
        """Collect every target that *module* defines or imports."""
        return cls(each for _, each in inspect.getmembers(module) if isinstance(each, type | Target))

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def has_service(self, service: str) -> bool:
        return any(known == service for known, _ in self._targets)

    def get(self, service: str, operation: str) -> Target | None:
        return self._targets.get((service, operation))

    @property
    def workflow_classes(self) -> list[type[Any]]:
        """What a worker of the handler's own can register."""
        return [target.workflow_class for target in self if target.workflow_class is not None]


def _targets_of(declared: Iterable[type[Any] | Target]) -> Iterator[Target]:
    for each in declared:
        target = each if isinstance(each, Target) else vars(each).get(_TARGET_ATTRIBUTE)
        if target is not None:
            yield target
