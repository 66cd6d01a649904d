"""Waiting for facts, paused processes, and settings with fresh keys."""

import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from multidict import CIMultiDict
from temporalio.api.workflowservice.v1 import SetWorkerDeploymentCurrentVersionRequest
from temporalio.client import Client
from temporalio.common import WorkerDeploymentVersion
from temporalio.service import RPCError
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from bridge.security.keys import KeySet, new_key
from caller.settings import CallerSettings
from handler.settings import HandlerSettings

T = TypeVar("T")

CALLER, HANDLER = "order-prod", "payment-prod"


async def assert_eventually(check: Callable[[], Awaitable[T]], *, within: float = 20.0) -> T:
    """Repeat *check* until its assertions hold; after *within*, raise the last failed assertion."""
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(AssertionError),
        stop=stop_after_delay(timedelta(seconds=within)),
        wait=wait_fixed(0.05),
        reraise=True,
    )
    return await retrying(check)


@asynccontextmanager
async def paused(pid: int | None) -> AsyncIterator[None]:
    """Pause a process: it keeps its connections and answers nothing. `kill` returns before all its threads stand."""
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)

    async def stands() -> None:
        states = [each.read_text().rpartition(")")[2].split()[0] for each in Path(f"/proc/{pid}/task").glob("*/stat")]
        assert set(states) == {"T"}

    try:
        await assert_eventually(stands)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def key_set(key: str | None = None) -> KeySet:
    return KeySet.model_validate({"signing": "k1", "keys": {"k1": key or new_key()}})


class Keys:
    """The keys of one caller and one handler."""

    def __init__(self) -> None:
        self.callback, self.start, self.completion = (key_set() for _ in range(3))
        self.hash = new_key()


def caller_settings(
    keys: Keys, *, receiver_url: str, endpoint_url: str, endpoint: dict[str, Any] | None = None, **changes: Any
) -> CallerSettings:
    return CallerSettings.model_validate(
        {
            "name": CALLER,
            "receiver": {"url": receiver_url, "allow_insecure": True},
            "callback_keys": keys.callback,
            "handlers": {HANDLER: {"start_keys": keys.start, "completion_keys": keys.completion}},
            "endpoints": {
                "payments": {
                    "url": f"{endpoint_url}/c/{CALLER}",
                    "handler": HANDLER,
                    "networks": ["127.0.0.0/8"],
                    "allow_insecure": True,
                    **(endpoint or {}),
                }
            },
        }
        | changes
    )


def handler_settings(
    keys: Keys, *, receiver_url: str, service_url: str, caller: dict[str, Any] | None = None, **changes: Any
) -> HandlerSettings:
    return HandlerSettings.model_validate(
        {
            "name": HANDLER,
            "task_queue": "unset",
            "service": {"url": service_url, "allow_insecure": True},
            "hash_key": keys.hash,
            "callers": {
                CALLER: {
                    "operations": ["PaymentService/*", "ProbeService/*", "QuoteService/*"],
                    "start_keys": keys.start,
                    "completion_keys": keys.completion,
                    "callbacks": [
                        {"url": f"{receiver_url}/callbacks", "networks": ["127.0.0.0/8"], "allow_insecure": True}
                    ],
                    **(caller or {}),
                }
            },
        }
        | changes
    )


def multi(headers: dict[str, str]) -> CIMultiDict[str]:
    return CIMultiDict(headers)


async def make_current(client: Client, version: WorkerDeploymentVersion) -> None:
    """Route new workflows to *version*, as soon as a worker of that version polls."""
    request = SetWorkerDeploymentCurrentVersionRequest(
        namespace=client.namespace,
        deployment_name=version.deployment_name,
        build_id=version.build_id,
        ignore_missing_task_queues=True,
    )

    async def done() -> None:
        try:
            await client.workflow_service.set_worker_deployment_current_version(request)
        except RPCError as error:
            raise AssertionError(error.message) from error

    await assert_eventually(done)
