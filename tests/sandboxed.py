"""A workflow that imports the workflow-safe modules inside its sandbox and tells which modules it sees."""

import sys

from temporalio import workflow

import bridge
import bridge.calls
import bridge.operations
import bridge.progress
import bridge.workflow


@workflow.defn
class ImportingWorkflow:
    @workflow.run
    async def run(self) -> dict[str, int]:
        assert bridge.create_client is bridge.workflow.create_client
        own = {
            each.__name__: id(each)
            for each in (bridge, bridge.calls, bridge.operations, bridge.progress, bridge.workflow)
        }
        seen = {name: 0 for name in list(sys.modules) if name.startswith(("bridge", "aiohttp", "tenacity", "itsda"))}
        return seen | own
