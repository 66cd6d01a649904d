"""The order team's worker with a codec that fails at times, and with interceptors that change all activities.

`python -m scripts.chaos_run.disturbed_orders` replaces the worker of the example. The share of the refused decodes is
in a file in the folder of the settings, because the share changes while the worker runs.
"""

# ruff: noqa: A002, ARG002 - parameters are those of the SDK

import asyncio
import dataclasses
import json
import os
import random
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from temporalio import workflow
from temporalio.api.common.v1 import Payload
from temporalio.common import RetryPolicy
from temporalio.converter import DataConverter, PayloadCodec
from temporalio.exceptions import ApplicationError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    StartActivityInput,
    StartLocalActivityInput,
    Worker,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)

from bridge.admin import command
from bridge.http.listener import stop_on_signals
from bridge.runtime.event_log import configure_logging
from bridge.runtime.settings import load
from bridge.temporal.connection import connect
from caller import CallerPlugin
from caller.settings import CallerSettings
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow

REFUSALS = "refused-decodes"
"""Name of the file with the share of the decodes that the codec refuses, in the folder of the settings."""


class FailingCodec(PayloadCodec):
    """Passes payloads unchanged, and refuses to decode some of them, as if a key service were unavailable."""

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Return the payloads as they are, so that the verdict can read the histories."""
        return list(payloads)

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Return the payloads as they are.

        Raises:
            RuntimeError: The share in the file applies to this decode.
        """
        refusals = Path(os.environ["BRIDGE_CONFIG"]).with_name(REFUSALS)
        if refusals.exists() and random.random() < float(refusals.read_text() or 0):
            message = "the key service is unavailable"
            raise RuntimeError(message)
        return list(payloads)


CONVERTER = DataConverter(payload_codec=FailingCodec())


class TeamInterceptor(Interceptor):
    """Limits the time of all activities, maps all errors, and sets timeouts and retries for all activities."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Return the interceptor around an activity."""
        return _Around(next)

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:
        """Return the interceptor of a workflow."""
        return _Inside


class _Around(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:
        try:
            async with asyncio.timeout(0.05):
                return await self.next.execute_activity(input)
        except BaseException as error:
            raise ApplicationError(str(error), type="Mapped", non_retryable=True) from error


class _Commands(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        return self.next.start_activity(_hurried(input))

    def start_local_activity(self, input: StartLocalActivityInput) -> workflow.ActivityHandle[Any]:
        return self.next.start_local_activity(_hurried(input))


def _hurried(input: Any) -> Any:
    return dataclasses.replace(
        input,
        retry_policy=RetryPolicy(maximum_attempts=2),
        start_to_close_timeout=timedelta(seconds=1),
        schedule_to_close_timeout=timedelta(seconds=3),
    )


class _Inside(WorkflowInboundInterceptor):
    def init(self, outbound: WorkflowOutboundInterceptor) -> None:
        super().init(_Commands(outbound))


async def run_worker() -> None:
    """Run the worker until it is asked to stop."""
    configure_logging("info")
    settings = load(CallerSettings, data_converter=f"{__package__}.disturbed_orders:CONVERTER")
    client = await connect(settings)
    stop = stop_on_signals()
    options: dict[str, Any] = {"plugins": [CallerPlugin(settings)], "interceptors": [TeamInterceptor()]}
    async with Worker(client, task_queue=ORDER_QUEUE, workflows=[OrderWorkflow], **options):
        print(json.dumps({"worker": "orders", "pid": os.getpid()}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    command.run(run_worker, name="python -m scripts.chaos_run.disturbed_orders")
