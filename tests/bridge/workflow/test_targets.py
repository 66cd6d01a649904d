"""The contract side of the handler: a mismatch stops the import, and nothing undeclared can be started."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import nexusrpc
import pytest
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
    """None may be taken or left out."""
    [target] = Targets([declare(PaymentService.ping)(workflow_class)])
    assert target.input_type is type(None)


def test_a_workflow_that_tells_no_output_is_taken_at_its_word() -> None:
    """Nothing is known that could differ."""
    [target] = Targets([declare()(UntypedOutput)])
    assert target.workflow_class is UntypedOutput


@pytest.mark.parametrize(
    ("workflow_class", "complaint"),
    [
        pytest.param(TakesText, "TakesText.run takes", id="other input"),
        pytest.param(TakesTwo, "TakesTwo.run takes", id="two inputs"),
        pytest.param(TakesNothing, "TakesNothing.run takes", id="no input"),
        pytest.param(UntypedInput, "UntypedInput.run takes", id="input that would arrive as a plain dict"),
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
    """Even before a workflow is named."""
    with pytest.raises(TypeError, match=complaint):
        declare(operation, service)


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
    assert targets.has_service("PaymentService")
    assert not targets.has_service("paymentservice")
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
    """It has no class here, and nobody there tells its outcome."""
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
    """By the names that they have there, each once; a worker of ours has none of their classes."""
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
