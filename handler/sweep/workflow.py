"""The sweep workflow: one activity of endless attempts, each of which is a sweep."""

from dataclasses import replace
from datetime import timedelta

from temporalio import workflow
from temporalio.common import VersioningBehavior
from temporalio.exceptions import ActivityError, is_cancelled_exception

from handler.delivery.records import milliseconds
from handler.delivery.workflow import start_activity
from handler.sweep.place import WINDOW
from handler.sweep.plan import SweepPlan

SWEEP_ACTIVITY = "bridge.sweep"
SWEEP_WORKFLOW = "bridge.Sweep"

HEARTBEAT_TIMEOUT = timedelta(seconds=30)
"""Each attempt heartbeats every few seconds. After a worker was killed, the next attempt begins so late."""


# Not sandboxed, because this is our own code and it only waits.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False)
class SweepWorkflow:
    """Sweeps forever. Each sweep is an attempt of one activity, so that the history stays at five events."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        """Sweep until the workflow is canceled, or a sweep with another plan replaces it."""
        try:
            await start_activity(
                *(SWEEP_ACTIVITY, plan),
                # An attempt takes milliseconds, but after a long outage it may have many runs to handle.
                attempt=timedelta(hours=1),
                heartbeat_timeout=HEARTBEAT_TIMEOUT,
                summary=f"every {plan.interval_s:g} s",
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            # The activity never ends by itself, but the worker fails it if its heartbeat details cannot be decoded. The
            # place is then lost. Continue from an hour ago: the ids of delivery workflows prevent a second delivery.
            # Take the time now, because the codec may fail for longer than an hour.
            since_ms = milliseconds(workflow.now() - timedelta(hours=1))
            await workflow.sleep(WINDOW)
            workflow.continue_as_new(replace(plan, since_ms=since_ms))


# A versioned worker refuses a workflow without a versioning behavior. On an unversioned worker with server 1.29 a
# workflow with a versioning behavior would hang.
@workflow.defn(name=SWEEP_WORKFLOW, sandboxed=False, versioning_behavior=VersioningBehavior.AUTO_UPGRADE)
class VersionedSweepWorkflow(SweepWorkflow):
    """The same workflow, for versioned workers. A new version continues the sweep."""

    @workflow.run
    async def run(self, plan: SweepPlan) -> None:
        """Run as the base class does. The SDK requires a `run` in the decorated class."""
        await super().run(plan)
