"""The contract side of the handler: which workflow stands behind which operation.

`emits_callback` only notes facts on the class; the handler's service and worker collect the classes into a `Targets`
registry, and nothing outside that registry can be started. Everything that can be checked is checked when the module
is imported, so that a mismatch stops a deploy and not a payment. Safe to import in workflow code.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import nexusrpc
from temporalio import workflow

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
    workflow_class: type[Any]
    workflow_id: Callable[[Any], str]
    """From the decoded input to the business id; the same input must always give the same id."""
    check: Callable[[Any], None] | None
    """Refuses an input by raising ValueError, before anything starts."""
    task_queue: str | None
    """None: the handler service's own."""


def emits_callback(
    *,
    service: type[Any],
    operation: nexusrpc.Operation[_InputT, _OutputT],
    workflow_id: Callable[[_InputT], str],
    check: Callable[[_InputT], None] | None = None,
    task_queue: str | None = None,
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

    Raises:
        TypeError: The class is no workflow, its types differ from the contract's, or *operation* is not *service*'s.
    """
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
            service=definition.name,
            operation=operation.name,
            input_type=input_type,
            workflow_type=found.name,
            workflow_class=workflow_class,
            workflow_id=workflow_id,
            check=check,
            task_queue=task_queue,
        )
        setattr(workflow_class, _TARGET_ATTRIBUTE, target)
        return workflow_class

    return decorate


class Targets:
    """The operations that a handler serves: a closed set, looked up by service and operation."""

    def __init__(self, classes: Iterable[type[Any]]) -> None:
        """Collect the targets among *classes*.

        Raises:
            ValueError: Two workflows claim one operation.
        """
        self._targets: dict[tuple[str, str], Target] = {}
        for target in filter(None, (vars(each).get(_TARGET_ATTRIBUTE) for each in dict.fromkeys(classes))):
            key = target.service, target.operation
            if key in self._targets:
                both = f"{self._targets[key].workflow_class.__name__} and {target.workflow_class.__name__}"
                message = f"{target.service}/{target.operation} is claimed by {both}"
                raise ValueError(message)
            self._targets[key] = target

    @classmethod
    def in_module(cls, module: ModuleType) -> "Targets":
        """Collect every decorated workflow that *module* defines or imports."""
        return cls(each for _, each in inspect.getmembers(module, inspect.isclass))

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def has_service(self, service: str) -> bool:
        return any(known == service for known, _ in self._targets)

    def get(self, service: str, operation: str) -> Target | None:
        return self._targets.get((service, operation))
