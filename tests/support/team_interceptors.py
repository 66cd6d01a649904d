"""Interceptors as teams write them for all of their activities, on both sides of a command."""

# ruff: noqa: A002 - parameters are named as the SDK names them

import asyncio
import dataclasses
from datetime import timedelta
from typing import Any

import temporalio.client
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    StartActivityInput,
    StartLocalActivityInput,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
    WorkflowOutboundInterceptor,
)


class Inbound(Interceptor, temporalio.client.Interceptor):
    """Base of the interceptors around the execution of an activity."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        outer = self

        class Around(ActivityInboundInterceptor):
            async def execute_activity(self, input: ExecuteActivityInput) -> Any:
                return await outer.around(self.next, input)

        return Around(next)

    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        raise NotImplementedError


class MapsErrors(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        try:
            return await inner.execute_activity(input)
        except Exception as error:
            raise ApplicationError(str(error), type="Mapped", non_retryable=True) from error


class MapsEverything(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        try:
            return await inner.execute_activity(input)
        except BaseException as error:
            raise ApplicationError(str(error), type="Mapped", non_retryable=True) from error


class FallsBack(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        try:
            return await inner.execute_activity(input)
        except BaseException:  # noqa: BLE001 - as teams write it
            return {"text": "fallback", "blob": ""}


class Reports(Inbound):
    """An error reporter: it records the exception and raises it again."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        try:
            return await inner.execute_activity(input)
        except Exception as error:
            self.seen.append(repr(error))
            raise


class RetriesInside(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        for _ in range(2):
            try:
                return await inner.execute_activity(input)
            except BaseException:  # noqa: BLE001 - as teams write it
                await asyncio.sleep(0)
        return await inner.execute_activity(input)


class TimesOut(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        return await asyncio.wait_for(inner.execute_activity(input), 0.001)


class TimesOutInPlace(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        async with asyncio.timeout(0.001):
            return await inner.execute_activity(input)


class WrapsResults(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        return {"result": await inner.execute_activity(input)}


class Refuses(Inbound):
    """Prevents every activity from running."""

    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        raise ApplicationError("not during maintenance", non_retryable=True)


class RunsAsTask(Inbound):
    async def around(self, inner: ActivityInboundInterceptor, input: ExecuteActivityInput) -> Any:
        return await asyncio.create_task(inner.execute_activity(input))


class Outbound(Interceptor, temporalio.client.Interceptor):
    """Base of the interceptors around the commands of a workflow."""

    outbound: type[WorkflowOutboundInterceptor]

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:
        outbound = self.outbound

        class Inner(WorkflowInboundInterceptor):
            def init(self, out: WorkflowOutboundInterceptor) -> None:
                super().init(outbound(out))

        return Inner


class _SetsRetries(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        return self.next.start_activity(dataclasses.replace(input, retry_policy=RetryPolicy(maximum_attempts=2)))

    def start_local_activity(self, input: StartLocalActivityInput) -> workflow.ActivityHandle[Any]:
        return self.next.start_local_activity(dataclasses.replace(input, retry_policy=RetryPolicy(maximum_attempts=5)))


class SetsRetries(Outbound):
    outbound = _SetsRetries


class _SetsTimeouts(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        second = timedelta(seconds=1)
        input.start_to_close_timeout = input.schedule_to_close_timeout = second
        input.schedule_to_start_timeout = input.heartbeat_timeout = second / 2
        return self.next.start_activity(input)

    def start_local_activity(self, input: StartLocalActivityInput) -> workflow.ActivityHandle[Any]:
        input.schedule_to_close_timeout = input.start_to_close_timeout = timedelta(milliseconds=1)
        return self.next.start_local_activity(input)


class SetsTimeouts(Outbound):
    outbound = _SetsTimeouts


class _Renames(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        return self.next.start_activity(
            dataclasses.replace(input, activity_id=None, task_queue="elsewhere", args=[*input.args, "audit"])
        )


class Renames(Outbound):
    outbound = _Renames


class _WrapsHandles(WorkflowOutboundInterceptor):
    def start_activity(self, input: StartActivityInput) -> workflow.ActivityHandle[Any]:
        handle = self.next.start_activity(input)

        async def mapped() -> Any:
            try:
                return await handle
            except ActivityError as error:
                raise ApplicationError("mapped", type="Mapped") from error

        return asyncio.create_task(mapped())  # type: ignore[return-value] # as teams write it


class WrapsHandles(Outbound):
    outbound = _WrapsHandles


INBOUND = [
    MapsErrors,
    MapsEverything,
    FallsBack,
    Reports,
    RetriesInside,
    TimesOut,
    TimesOutInPlace,
    WrapsResults,
    Refuses,
    RunsAsTask,
]
OUTBOUND = [SetsRetries, SetsTimeouts, Renames, WrapsHandles]
CATCHES_ALL = [MapsEverything, FallsBack, RetriesInside, TimesOut, TimesOutInPlace, WrapsResults, Refuses]
"""Interceptors that change even an activity that ends asynchronously, or prevent it from running."""
