"""A target with the features that a team's workflow uses. It imports little: the sandbox imports it for every run."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import nexusrpc
from temporalio import activity, workflow
from temporalio.exceptions import ApplicationError

import bridge


@dataclass(frozen=True)
class Case:
    behaviour: str
    run: int = 1


@nexusrpc.service
class CaseService:
    case: nexusrpc.Operation[Case, str]


@activity.defn
async def double(number: int) -> int:
    return 2 * number


@workflow.defn
class CaseChild:
    @workflow.run
    async def run(self, case: Case) -> str:
        return f"child of {case.behaviour}"


@bridge.emits_callback(service=CaseService, operation=CaseService.case, workflow_id=lambda case: case.behaviour)
@workflow.defn
class CaseWorkflow:
    """A workflow with the features that a team uses."""

    @workflow.init
    def __init__(self, case: Case) -> None:
        self._said: list[str] = []
        if case.behaviour == "fails in init":
            message = "no such case"
            raise ApplicationError(message, non_retryable=True)

    @workflow.signal
    def say(self, text: str) -> None:
        if text == "fail":
            message = "failed in a handler"
            raise ApplicationError(message, non_retryable=True)
        self._said.append(text)

    @workflow.update
    async def change(self, text: str) -> str:
        self._said.append(text)
        return text

    @workflow.run
    async def run(self, case: Case) -> str:
        match case.behaviour:
            case "fails" | "retries":
                message = f"attempt {workflow.info().attempt}"
                raise ApplicationError(message)
            case "is canceled" | "fails in a handler" | "is updated" | "is signalled":
                await workflow.wait_condition(lambda: bool(self._said))
            case "continues as new" if case.run == 1:
                workflow.continue_as_new(Case(case.behaviour, 2))
            case "runs activities and a timer":
                await workflow.execute_activity(double, 1, start_to_close_timeout=timedelta(seconds=10))
                await workflow.execute_local_activity(double, 1, start_to_close_timeout=timedelta(seconds=10))
                await asyncio.sleep(0.1)
            case "runs a child":
                child = f"{workflow.info().workflow_id}-child"
                return await workflow.execute_child_workflow(CaseChild.run, case, id=child)
            case _:
                pass
        return " ".join(self._said) or "done"
