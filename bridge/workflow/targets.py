"""The targets of a handler: which workflow carries out which operation.

`emits_callback` records a target on its class. `external_target` returns a target for a workflow that runs elsewhere.
The handler's service and worker collect both into a `Targets` registry, and the handler starts no other workflow.
Targets are checked when the module is imported, so that a mistake stops a deployment and not a payment. Workflow code
may import this module.
"""

import builtins
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType, NoneType
from typing import Any, Literal, TypedDict, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

import nexusrpc
from temporalio import workflow
from temporalio.common import RetryPolicy

_TARGET_ATTRIBUTE = "__bridge_target__"

OnInputMismatch = Literal["attach", "refuse"]
CallerClosePolicy = Literal["abandon", "request_cancel"]

_WorkflowT = TypeVar("_WorkflowT", bound=type)
_InputT = TypeVar("_InputT")
_OutputT = TypeVar("_OutputT")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One operation and the workflow that carries it out."""

    service: str
    """Name of the service."""
    operation: str
    """Name of the operation."""
    input_type: type[Any]
    """Type to which the operation's input is decoded."""
    workflow_type: str
    """Temporal's name of the workflow."""
    workflow_class: type[Any] | None
    """Class of the workflow; None if the workflow runs elsewhere."""
    workflow_id: Callable[[Any], str]
    """Derives the business id from the decoded input. The same input must always give the same id."""
    check: Callable[[Any], None] | None
    """Refuses an input by raising ValueError, before the workflow starts."""
    task_queue: str | None
    """Task queue of the workflow; None for the task queue in the handler's settings."""
    instrumented: bool = True
    """Whether its workers have `HandlerPlugin` and deliver outcomes. If not, the sweep delivers every outcome."""
    retry_policy: RetryPolicy | None = None
    """See `TargetOptions`."""
    attach_across_callers: bool = False
    """See `TargetOptions`."""
    bounded: bool = False
    """See `TargetOptions`."""
    caller_close_policy: CallerClosePolicy = "abandon"
    """See `TargetOptions`."""
    on_input_mismatch: OnInputMismatch = "attach"
    """See `TargetOptions`."""

    def __post_init__(self) -> None:
        """Refuse functions that would not run, and options with unknown values.

        Raises:
            TypeError: `check` or `workflow_id` is not a plain function, or is annotated to return another type.
            ValueError: An option has an unknown value.
        """
        _require_plain_function("workflow_id", self.workflow_id, returns=str)
        if self.check is not None:
            _require_plain_function("check", self.check, returns=NoneType)
        for option, choices in (("caller_close_policy", CallerClosePolicy), ("on_input_mismatch", OnInputMismatch)):
            if getattr(self, option) not in get_args(choices):
                message = f"{self.name}: {option}={getattr(self, option)!r} is not one of {get_args(choices)}"
                raise ValueError(message)

    @property
    def name(self) -> str:
        """Name for people: that of the class, or the workflow type if the workflow runs elsewhere."""
        return self.workflow_type if self.workflow_class is None else self.workflow_class.__name__


class TargetOptions(TypedDict, total=False):
    """The optional properties of a target."""

    retry_policy: RetryPolicy | None
    """Runs the workflow again after a failed run. The callers get the outcome of the last run."""
    attach_across_callers: bool
    """Whether a call may wait for, and get the outcome of, a run that another caller started. Default: no."""
    bounded: bool
    """Whether the workflow gets the caller's deadline and times out together with the call. Default: no."""
    caller_close_policy: CallerClosePolicy
    """What happens to a run when no call waits for it any more, because its callers ended or their deadlines passed.
    Default: "abandon", the run goes on."""
    on_input_mismatch: OnInputMismatch
    """What happens to a call whose workflow id belongs to a run that was started with another input. "attach": the call
    gets the outcome of that run. "refuse": the call fails with a conflict error. Default: "attach"."""


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
    """Declare that a workflow carries out *operation* of *service*, and that its outcome is delivered to its callers.

    Put this decorator above `@workflow.defn`. The workflow's code needs no change and contains nothing about callers or
    HTTP.

    Args:
        service: The contract, a class decorated with `nexusrpc.service`.
        operation: One operation of that contract.
        workflow_id: Derives the workflow id from the operation's input, at most 1 000 bytes. Two calls with the same id
            get the outcome of the same run: a workflow id never runs twice.
        check: May refuse an input by raising ValueError. The caller then gets the error's text as a bad request, and no
            workflow starts. A refusal does not end a call that has started its workflow already. The function must
            return None. After an OSError of `check` or `workflow_id` (a lost connection, a timeout) the call is
            retried. `nexusrpc.HandlerError` and `temporalio.exceptions.ApplicationError` define whether the call is
            retried. Any other exception fails the call permanently, because most such exceptions are mistakes in the
            function and would repeat until the call's deadline.
            Both functions run in a thread and may block for up to 8 seconds.
        task_queue: Task queue of the workflow, if it is not the task queue in the handler's settings.
        instrumented: False if workers without `HandlerPlugin` run the workflow. The sweep then delivers every outcome.
        **options: See `TargetOptions`.

    Raises:
        TypeError: The class is not a workflow, carries out another operation already, or has other types than the
            contract, *operation* does not belong to *service*, or `check` or `workflow_id` is not a plain function.
        ValueError: An option has an unknown value.
    """
    if workflow.unsafe.in_sandbox():
        # The module is imported again for each run. What it declares was read, and checked, outside the sandbox.
        return lambda workflow_class: workflow_class
    declared = _declared(service, operation)

    def decorate(workflow_class: _WorkflowT) -> _WorkflowT:
        # Only the SDK's own record of a workflow class has its name and its types together.
        found = workflow._Definition.from_class(workflow_class)  # noqa: SLF001
        if found is None or found.name is None:
            message = f"{workflow_class.__name__}: put @emits_callback above @workflow.defn (and give it a fixed name)"
            raise TypeError(message)
        input_type, output_type = declared["input_type"], operation.output_type
        takes = found.arg_types if found.arg_types is not None else [input_type]
        fits = not takes and input_type is NoneType
        if len(takes) == 1:
            # The SDK records None for a parameter without an annotation, and then decodes the input without a type.
            fits = takes[0] is None or _without_extras(takes[0]) == _without_extras(input_type)
        if not fits:
            message = f"{workflow_class.__name__}.run takes {takes}, but {operation.name!r} gives {input_type}"
            raise TypeError(message)
        if found.ret_type is not None and _without_extras(found.ret_type) != _without_extras(output_type):
            message = f"{workflow_class.__name__}.run returns {found.ret_type}, but {operation.name!r} {output_type}"
            raise TypeError(message)
        other = vars(workflow_class).get(_TARGET_ATTRIBUTE)
        if other is not None and (other.service, other.operation) != (declared["service"], declared["operation"]):
            message = (
                f"{workflow_class.__name__} carries out {other.service}/{other.operation} already, and may carry out "
                f"only one operation: declare another workflow for {operation.name!r}"
            )
            raise TypeError(message)
        target = Target(
            **declared,
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

    Assign the result to a name in the module that the handler serves. The sweep delivers the outcome shortly after the
    workflow has ended. The sweep needs a worker with `HandlerPlugin` on the task queue in the handler's settings. The
    other arguments are those of `emits_callback`. The types of input and result cannot be checked, because the workflow
    is declared elsewhere.

    Args:
        workflow_type: Temporal's name of the workflow.
        task_queue: Task queue of the workflow.

    Raises:
        TypeError: *operation* does not belong to *service*, or `check` or `workflow_id` is not a plain function.
        ValueError: An option has an unknown value.
    """
    return Target(
        **_declared(service, operation),
        workflow_type=workflow_type,
        workflow_class=None,
        workflow_id=workflow_id,
        check=check,
        task_queue=task_queue,
        instrumented=False,
        **options,
    )


def _declared(service: type[Any], operation: nexusrpc.Operation[_InputT, _OutputT]) -> dict[str, Any]:
    """Return the fields of a `Target` that the contract gives: names of service and operation, and the input's type.

    Raises:
        TypeError: *service* is not a contract, or *operation* does not belong to it.
    """
    definition = nexusrpc.get_service_definition(service)
    if definition is None:
        message = f"service={service.__name__}: not decorated with @nexusrpc.service"
        raise TypeError(message)
    declared = definition.operation_definitions.get(operation.name)
    # Compare by identity, because another service may have an operation of the same name and types.
    is_own = any(getattr(service, name, None) is operation for name in (operation.method_name or "", operation.name))
    if declared is None or not is_own:
        known = ", ".join(definition.operation_definitions)
        message = f"operation={operation.name!r} is not an operation of {definition.name} (it has: {known})"
        raise TypeError(message)
    return {"service": definition.name, "operation": declared.name, "input_type": declared.input_type}


def _without_extras(hint: Any) -> Any:
    """*hint* without the metadata of `Annotated`, also inside containers. The SDK reads signatures without it.

    Equal types get one form, for example `List[int] | None` and `Optional[list[int]]`.

    Raises:
        TypeError: A part of *hint* is a name in quotes. The converter cannot resolve it.
    """
    try:
        return _form(get_type_hints(type("_", (), {"__annotations__": {"hint": hint}}))["hint"])
    except NameError:
        message = f"the type {hint} has a name in quotes: put the type itself in its place"
        raise TypeError(message) from None


def _form(hint: Any) -> Any:
    origin, parts = get_origin(hint), tuple(map(_form, get_args(hint)))
    if origin in {Union, types.UnionType}:
        return Union, frozenset(parts)
    return (origin, parts) if parts else origin or hint


def _require_plain_function(role: str, function: Callable[..., Any], *, returns: type) -> None:
    """Refuse a function whose call would only create a coroutine or a generator, because its body would not run.

    Raises:
        TypeError: *function* is such a function, is not callable, or is annotated to return another type.
    """
    plain: Any = function
    while isinstance(plain, functools.partial):
        plain = plain.func
    name = getattr(plain, "__qualname__", type(plain).__qualname__)
    if not callable(plain):
        message = f"{role}: {name} is not a function"
        raise TypeError(message)
    # A call of an object runs the `__call__` of its class.
    for body in (plain, type(plain).__call__):
        is_lazy = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
        if any(is_that(body) for is_that in is_lazy):
            message = f"{role}: {name} must be a plain `def`, neither `async def` nor a generator"
            raise TypeError(message)
        declared = getattr(body, "__annotations__", {}).get("return")
        declared = getattr(builtins, declared, None) if isinstance(declared, str) else declared
        if not isinstance(declared, type) or declared is Any:
            continue
        if not issubclass(declared, returns) and not issubclass(returns, declared):
            cure = "a check raises ValueError to refuse an input" if returns is NoneType else "it must return a str"
            message = f"{role}: {name} is annotated to return {declared.__name__}; {cure}"
            raise TypeError(message)


class Targets:
    """The operations that a handler serves: a closed set, looked up by service and operation."""

    def __init__(self, declared: Iterable[object]) -> None:
        """Collect the targets among *declared*: decorated classes, and targets that run elsewhere. Ignore the rest.

        Raises:
            ValueError: Two workflows are declared for one operation.
        """
        self._targets: dict[tuple[str, str], Target] = {}
        for each in declared:
            target = each if isinstance(each, Target) else getattr(each, "__dict__", {}).get(_TARGET_ATTRIBUTE)
            if target is None:
                continue
            key = target.service, target.operation
            if self._targets.get(key, target) is not target:
                both = f"{self._targets[key].name} and {target.name}"
                message = f"{target.service}/{target.operation} is claimed by {both}"
                raise ValueError(message)
            self._targets[key] = target

    @classmethod
    def in_module(cls, module: ModuleType) -> "Targets":
        """Collect every target that *module* defines or imports."""
        return cls(vars(module).values())

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets.values())

    def get(self, service: str, operation: str) -> Target | None:
        """The target of *operation*; None if the handler does not serve it."""
        return self._targets.get((service, operation))

    @property
    def workflow_classes(self) -> list[type[Any]]:
        """The workflows that a worker of this process can register."""
        return [target.workflow_class for target in self if target.workflow_class is not None]
