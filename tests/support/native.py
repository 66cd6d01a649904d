"""A caller without the bridge: Temporal's own Nexus client, on a worker without plugins."""

from dataclasses import dataclass, field
from datetime import timedelta

from temporalio import workflow

from tests.support.targets import Ask, Reply


@dataclass(frozen=True)
class NativePlan:
    """The options of the workflow's call."""

    endpoint: str
    operation: str = "ProbeService/probe"
    deadline: float = 60.0
    headers: dict[str, str] = field(default_factory=dict)


@workflow.defn
class NativeCaller:
    @workflow.run
    async def run(self, ask: Ask, plan: NativePlan) -> Reply:
        service, _, operation = plan.operation.partition("/")
        client = workflow.create_nexus_client(service=service, endpoint=plan.endpoint)
        reply: Reply = await client.execute_operation(
            operation,
            ask,
            output_type=Reply,
            schedule_to_close_timeout=timedelta(seconds=plan.deadline),
            headers=plan.headers,
        )
        return reply
