"""The contract side of the handler: a mismatch stops the import, and nothing undeclared can be started."""

import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Dict, List, Literal, Union  # noqa: UP035 - a test's subject

import nexusrpc
import pytest
from pydantic import BaseModel, Field
from temporalio import workflow
from temporalio.common import RawValue, RetryPolicy

from bridge.workflow.targets import Target, Targets, emits_callback, external_target


@dataclass(frozen=True)
class Request:
    order_id: str


@dataclass(frozen=True)
class Response:
    payment_id: str


@nexusrpc.service
class PaymentService:
    process: nexusrpc.Operation[Request, Response]
    renamed: nexusrpc.Operation[Request, Response] = nexusrpc.Operation(name="charge-again")
    ping: nexusrpc.Operation[None, None]


@nexusrpc.service
class RefundService:
    process: nexusrpc.Operation[Request, Response]
    refund: nexusrpc.Operation[Request, Response]


@nexusrpc.service(name="payments.v2")
class NamedService(RefundService):
    extra: nexusrpc.Operation[Request, Response]


class PlainService:
    process: nexusrpc.Operation[Request, Response]


def workflow_id(request: Request) -> str:
    return f"payment-{request.order_id}"


def declare(
    operation: nexusrpc.Operation[Any, Any] = PaymentService.process, service: type[Any] = PaymentService
) -> Callable[[type[Any]], type[Any]]:
    return emits_callback(service=service, operation=operation, workflow_id=workflow_id)


@workflow.defn
class Pay:
    @workflow.run
    async def run(self, request: Request) -> Response:
        return Response(payment_id=request.order_id)


@pytest.fixture(autouse=True)
def undeclared() -> Iterator[None]:
    """Several tests declare the same workflow."""
    yield
    with contextlib.suppress(AttributeError):
        delattr(Pay, "__bridge_target__")


@workflow.defn(name="pay-by-name")
class PayByName:
    @workflow.run
    async def run(self, request: Request) -> Response:
        return Response(payment_id=request.order_id)


@workflow.defn
class UntypedInput:
    @workflow.run
    async def run(self, request) -> Response:  # type: ignore[no-untyped-def]  # noqa: ANN001 - the point of the test
        return Response(payment_id=request.order_id)


@workflow.defn
class UntypedTwo:
    @workflow.run
    async def run(self, request, more) -> Response:  # type: ignore[no-untyped-def]  # noqa: ANN001 - the point
        return Response(payment_id=request.order_id)


@workflow.defn
class UntypedOutput:
    @workflow.run
    async def run(self, request: Request):  # type: ignore[no-untyped-def]  # noqa: ANN201 - the point of the test
        return Response(payment_id=request.order_id)


@workflow.defn(name="first")
class First:
    @workflow.run
    async def run(self, request: Request) -> Response:
        return Response(payment_id="1")


@workflow.defn
class Ping:
    @workflow.run
    async def run(self) -> None:
        return


@workflow.defn
class PingWithNothing:
    @workflow.run
    async def run(self, nothing: None) -> None:
        return


@workflow.defn
class TakesText:
    @workflow.run
    async def run(self, request: str) -> Response:
        return Response(payment_id=request)


@workflow.defn
class TakesTwo:
    @workflow.run
    async def run(self, request: Request, more: Request) -> Response:
        return Response(payment_id=request.order_id)


@workflow.defn
class TakesNothing:
    @workflow.run
    async def run(self) -> Response:
        return Response(payment_id="")


@workflow.defn
class ReturnsText:
    @workflow.run
    async def run(self, request: Request) -> str:
        return request.order_id


@workflow.defn
class ReturnsNothing:
    @workflow.run
    async def run(self, request: Request) -> None:
        return


@workflow.defn(dynamic=True)
class TakesAnything:
    @workflow.run
    async def run(self, args: Sequence[RawValue]) -> None:
        return


class NoWorkflow:
    async def run(self, request: Request) -> Response:
        return Response(payment_id=request.order_id)


class OnlyInherited(Pay):
    pass


def test_a_declared_workflow_becomes_a_target() -> None:
    """With all that a start needs to know."""
    check: Callable[[Request], None] = lambda _: None
    [target] = Targets(
        [
            emits_callback(
                service=PaymentService,
                operation=PaymentService.process,
                workflow_id=workflow_id,
                check=check,
                task_queue="cards",
            )(Pay)
        ]
    )
    assert (target.service, target.operation, target.workflow_type) == ("PaymentService", "process", "Pay")
    assert (target.input_type, target.workflow_class) == (Request, Pay)
    assert (target.workflow_id(Request("7")), target.check, target.task_queue) == ("payment-7", check, "cards")


def test_declaring_leaves_the_workflow_as_it_is() -> None:
    """It stays an ordinary workflow and runs without the bridge."""
    assert declare()(PayByName) is PayByName


@pytest.mark.parametrize(
    ("service", "operation", "workflow_class", "key", "workflow_type"),
    [
        pytest.param(
            PaymentService,
            PaymentService.process,
            PayByName,
            ("PaymentService", "process"),
            "pay-by-name",
            id="workflow",
        ),
        pytest.param(
            PaymentService, PaymentService.renamed, Pay, ("PaymentService", "charge-again"), "Pay", id="operation"
        ),
        pytest.param(NamedService, NamedService.extra, Pay, ("payments.v2", "extra"), "Pay", id="service"),
        pytest.param(
            NamedService, NamedService.refund, Pay, ("payments.v2", "refund"), "Pay", id="inherited operation"
        ),
    ],
)
def test_names_are_those_of_the_wire(
    service: type[Any],
    operation: nexusrpc.Operation[Any, Any],
    workflow_class: type[Any],
    key: tuple[str, str],
    workflow_type: str,
) -> None:
    """Not those of the Python attributes."""
    targets = Targets([declare(operation, service)(workflow_class)])
    target = targets.get(*key)
    assert target is not None
    assert target.workflow_type == workflow_type


@pytest.mark.parametrize("workflow_class", [Ping, PingWithNothing])
def test_an_operation_without_input_needs_no_parameter(workflow_class: type[Any]) -> None:
    """A parameter may not be added or left out."""
    [target] = Targets([declare(PaymentService.ping)(workflow_class)])
    assert target.input_type is type(None)


@pytest.mark.parametrize("workflow_class", [UntypedInput, UntypedOutput])
def test_a_workflow_without_annotations_is_taken_as_the_sdk_takes_it(workflow_class: type[Any]) -> None:
    """A type that is not declared cannot differ."""
    [target] = Targets([declare()(workflow_class)])
    assert (target.workflow_class, target.input_type) == (workflow_class, Request)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]


@nexusrpc.service
class PetService:
    one: nexusrpc.Operation[Pet, Annotated[str, "name"]]
    many: nexusrpc.Operation[list[Pet], dict[str, Annotated[list[Pet], "by owner"]]]
    maybe: nexusrpc.Operation[Annotated[Pet | None, "none"], None]


@workflow.defn
class OnePet:
    @workflow.run
    async def run(self, pet: Annotated[Cat | Dog, "another note"]) -> str:
        return pet.kind


@workflow.defn
class ManyPets:
    @workflow.run
    async def run(self, pets: list[Pet]) -> dict[str, list[Cat | Dog]]:
        return {"": pets}


@workflow.defn
class ManyPetsInOldSpelling:
    @workflow.run
    async def run(self, pets: List[Union[Dog, Cat]]) -> Dict[str, List[Pet]]:  # noqa: UP006, UP007 - as older code has it
        return {"": pets}


@workflow.defn
class MaybePet:
    @workflow.run
    async def run(self, pet: Dog | Cat | None) -> None:
        return


@pytest.mark.parametrize(
    ("operation", "workflow_class"),
    [
        (PetService.one, OnePet),
        (PetService.many, ManyPets),
        (PetService.many, ManyPetsInOldSpelling),
        (PetService.maybe, MaybePet),
    ],
)
def test_types_are_compared_without_the_notes_of_annotated(
    operation: nexusrpc.Operation[Any, Any], workflow_class: type[Any]
) -> None:
    """On both sides and inside containers; the contract's own type still decodes the input."""
    [target] = Targets([declare(operation, PetService)(workflow_class)])
    assert target.input_type == operation.input_type


@nexusrpc.service
class QuotingService:
    process: nexusrpc.Operation[list["Later"], None]  # type: ignore[name-defined]  # noqa: F821 - a name that only the contract's author has


def test_a_name_in_quotes_inside_a_type_of_the_contract_stops_the_import() -> None:
    """The converter could not make the input, and each call would fail."""
    with pytest.raises(TypeError, match=r"has a name in quotes: put the type itself in its place$"):
        declare(QuotingService.process, QuotingService)(ManyPets)


def test_another_type_below_annotated_stops_the_import() -> None:
    """Only the notes are left out."""
    with pytest.raises(TypeError, match=r"ManyPets\.run takes"):
        declare(PetService.one, PetService)(ManyPets)


class AsyncCallable:
    async def __call__(self, request: Request) -> None:
        """Runs nothing when it is called."""


class Checks:
    async def method(self, request: Request) -> None:
        """As a bound method."""


async def an_async_check(request: Request) -> None:
    """Runs nothing when it is called."""


async def an_async_generator(request: Request) -> AsyncIterator[str]:
    yield request.order_id


def a_generator(request: Request) -> Iterator[str]:
    yield request.order_id


def a_predicate(request: Request) -> bool:
    return bool(request.order_id)


def a_quoted_predicate(request: Request) -> "bool":
    return bool(request.order_id)


LAZY: list[Any] = [
    an_async_check,
    an_async_generator,
    a_generator,
    AsyncCallable(),
    Checks().method,
    functools.partial(an_async_check, Request("7")),
    functools.partial(functools.partial(AsyncCallable()), Request("7")),
]


@pytest.mark.parametrize("role", ["check", "workflow_id"])
@pytest.mark.parametrize("function", LAZY)
@pytest.mark.parametrize(
    "declaring",
    [
        lambda options: emits_callback(**options)(Pay),
        lambda options: external_target(workflow_type="GoPayment", task_queue="go", **options),
    ],
    ids=["here", "elsewhere"],
)
def test_a_function_whose_call_runs_nothing_stops_the_import(declaring: Any, role: str, function: Any) -> None:
    """An `async` check would let everything through."""
    options = {"service": PaymentService, "operation": PaymentService.process}
    options |= {"workflow_id": workflow_id, role: function}
    with pytest.raises(TypeError, match=f"^{role}: .* must be a plain `def`"):
        declaring(options)


@pytest.mark.parametrize(
    ("role", "function", "complaint"),
    [
        ("check", a_predicate, "annotated to return bool; a check raises ValueError"),
        ("check", a_quoted_predicate, "annotated to return bool"),
        ("check", functools.partial(a_predicate), "annotated to return bool"),
        ("workflow_id", a_predicate, "annotated to return bool; it must return a str"),
        ("workflow_id", 7, "int is not a function"),
    ],
)
def test_a_function_that_is_annotated_otherwise_stops_the_import(role: str, function: Any, complaint: str) -> None:
    """A check that answers yes or no would be refused at every call."""
    options = {"workflow_id": workflow_id, role: function}
    with pytest.raises(TypeError, match=complaint):
        emits_callback(service=PaymentService, operation=PaymentService.process, **options)(Pay)


def a_vague_function(request: Request) -> Any:
    return request.order_id


def a_function_of_objects(request: Request) -> object:
    return request.order_id


@pytest.mark.parametrize("function", [a_vague_function, a_function_of_objects, lambda _: None, print, Checks.__init__])
def test_a_function_that_may_be_right_is_taken(function: Any) -> None:
    """What it returns is looked at when it has run."""
    for role in ("check", "workflow_id"):
        options = {"workflow_id": workflow_id, role: function}
        emits_callback(service=PaymentService, operation=PaymentService.process, **options)(Pay)


@pytest.mark.parametrize(
    ("workflow_class", "complaint"),
    [
        pytest.param(TakesText, "TakesText.run takes", id="other input"),
        pytest.param(TakesTwo, "TakesTwo.run takes", id="two inputs"),
        pytest.param(TakesNothing, "TakesNothing.run takes", id="no input"),
        pytest.param(UntypedTwo, "UntypedTwo.run takes", id="two inputs without types"),
        pytest.param(ReturnsText, "ReturnsText.run returns", id="other output"),
        pytest.param(ReturnsNothing, "ReturnsNothing.run returns", id="no output"),
        pytest.param(NoWorkflow, "above @workflow.defn", id="no workflow"),
        pytest.param(OnlyInherited, "above @workflow.defn", id="workflow only by inheritance"),
        pytest.param(TakesAnything, "fixed name", id="dynamic workflow"),
    ],
)
def test_a_workflow_that_does_not_fit_stops_the_import(workflow_class: type[Any], complaint: str) -> None:
    """A mismatch stops a deploy and not a payment."""
    with pytest.raises(TypeError, match=complaint):
        declare()(workflow_class)
    assert not list(Targets([workflow_class]))


@pytest.mark.parametrize(
    ("service", "operation", "complaint"),
    [
        pytest.param(PlainService, PaymentService.process, "not decorated", id="service not decorated"),
        pytest.param(PaymentService, RefundService.refund, "not an operation of", id="operation of another service"),
        pytest.param(
            PaymentService, RefundService.process, "not an operation of", id="another service's of the same name"
        ),
        pytest.param(
            PaymentService,
            nexusrpc.Operation[Request, Response](name="process"),
            "not an operation of",
            id="operation of no service",
        ),
    ],
)
def test_an_operation_that_is_not_the_services_stops_the_import(
    service: type[Any], operation: nexusrpc.Operation[Any, Any], complaint: str
) -> None:
    """The check runs before a workflow is named."""
    with pytest.raises(TypeError, match=complaint):
        declare(operation, service)


def test_a_workflow_has_one_operation() -> None:
    """Only the last declaration would be served."""
    with pytest.raises(TypeError, match="Pay carries out PaymentService/charge-again already"):
        declare()(declare(PaymentService.renamed)(Pay))


def test_an_operation_has_one_workflow() -> None:
    """Two that claim it stop the handler before it serves anything."""
    with pytest.raises(ValueError, match="PaymentService/process is claimed by First and PayByName"):
        Targets([declare()(First), declare()(PayByName)])


def test_a_workflow_named_twice_is_one_target() -> None:
    """Modules import each other's workflows."""
    assert len(list(Targets([declare()(Pay), Pay]))) == 1


def test_a_subclass_claims_nothing_by_inheritance() -> None:
    """A declaration belongs to the class that it stands on."""
    declare()(Pay)
    assert list(Targets([OnlyInherited])) == []


def test_nothing_outside_the_registry_is_found() -> None:
    """A closed set, by exact names."""
    targets = Targets([declare()(Pay), NoWorkflow])
    assert targets.get("PaymentService", "process") is not None
    assert targets.get("PaymentService", "refund") is None
    assert targets.get("RefundService", "process") is None


def test_a_modules_workflows_are_collected() -> None:
    """Defined or imported there, each once; what is not declared is passed over."""
    module = ModuleType("payments")
    for name, each in {"Pay": declare()(Pay), "Again": Pay, "Plain": NoWorkflow, "number": 7}.items():
        setattr(module, name, each)
    assert [target.workflow_class for target in Targets.in_module(module)] == [Pay]


def elsewhere(operation: nexusrpc.Operation[Any, Any] = PaymentService.process) -> Target:
    return external_target(
        service=PaymentService,
        operation=operation,
        workflow_type="GoPayment",
        workflow_id=workflow_id,
        task_queue="go-queue",
    )


def test_a_workflow_that_runs_elsewhere_becomes_a_target() -> None:
    """The workflow has no class here, and its worker does not deliver its outcome."""
    [target] = Targets([elsewhere()])
    assert (target.service, target.operation, target.workflow_type) == ("PaymentService", "process", "GoPayment")
    assert (target.input_type, target.workflow_class, target.task_queue) == (Request, None, "go-queue")
    assert target.check is None
    assert not target.instrumented


def test_a_workflow_that_runs_elsewhere_needs_an_operation_of_its_service() -> None:
    """As one that runs here."""
    with pytest.raises(TypeError, match="not an operation of"):
        elsewhere(RefundService.refund)


def test_a_workflow_that_runs_elsewhere_claims_its_operation() -> None:
    """Also against one that runs here."""
    with pytest.raises(ValueError, match="PaymentService/process is claimed by Pay and GoPayment"):
        Targets([declare()(Pay), elsewhere()])


def test_a_modules_targets_that_run_elsewhere_are_collected() -> None:
    """Each is in the registry once, under its Temporal name. A worker of this process registers no class for them."""
    module = ModuleType("payments")
    target = elsewhere(PaymentService.renamed)
    for name, each in {"Pay": declare()(Pay), "GO": target, "SAME": target}.items():
        setattr(module, name, each)
    targets = Targets.in_module(module)
    assert {each.workflow_type for each in targets} == {"Pay", "GoPayment"}
    assert targets.workflow_classes == [Pay]


def test_a_retry_policy_and_a_worker_without_the_interceptor_are_declared() -> None:
    """The starter needs the one, the sweep both; by default there is neither."""
    policy = RetryPolicy(maximum_attempts=3)
    declaring = emits_callback(
        service=PaymentService,
        operation=PaymentService.process,
        workflow_id=workflow_id,
        retry_policy=policy,
        instrumented=False,
    )
    [target] = Targets([declaring(PayByName)])
    assert (target.retry_policy, target.instrumented) == (policy, False)
    [plain] = Targets([declare()(Pay)])
    assert (plain.retry_policy, plain.instrumented) == (None, True)
