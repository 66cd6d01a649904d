"""A workflow that imports the workflow-safe modules inside its sandbox and returns the names of the imported ones."""

import sys

from temporalio import workflow

import bridge
import bridge.workflow.call
import bridge.workflow.client
import bridge.workflow.progress
import bridge.workflow.targets


@workflow.defn
class ImportingWorkflow:
    @workflow.run
    async def run(self) -> dict[str, int]:
        assert bridge.create_client is bridge.workflow.client.create_client
        own = {
            each.__name__: id(each)
            for each in (
                bridge,
                bridge.workflow.call,
                bridge.workflow.targets,
                bridge.workflow.progress,
                bridge.workflow.client,
            )
        }
        seen = {name: 0 for name in list(sys.modules) if name.startswith(("bridge", "aiohttp", "tenacity", "itsda"))}
        return seen | own
