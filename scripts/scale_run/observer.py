"""Reads a running stack: its processes, the logs of its services, and the server's metrics."""

import asyncio
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import psutil
from temporalio.client import Client
from temporalio.service import RPCError

from handler.delivery.workflow import DELIVERY_WORKFLOW
from scripts.chaos_run.load import OPEN, connect_both, count
from scripts.environment.stack import Stack, port_of
from scripts.scale_run.readings import Interval, Process, Reading, Requests, frontend_rpcs
from scripts.scale_run.results import Queues

_SERVICES = ("receiver", "handler")
_SETTLING_S = 3.0
"""What a call does after its end is charged to it, too."""


class Observer:
    """Reads one stack again and again."""

    def __init__(self, stack: Stack, clients: Sequence[Client]) -> None:
        self.stack, self.caller, self.handler = stack, clients[0], clients[1]
        self.requests = Requests()
        self._read_to = dict.fromkeys(_SERVICES, 0)

    @classmethod
    async def of(cls, stack: Stack) -> "Observer":
        """Connect to the server of *stack*."""
        return cls(stack, await connect_both(stack.servers["caller"].address))

    @property
    def clients(self) -> list[Client]:
        """Of the caller's and of the handler's namespace."""
        return [self.caller, self.handler]

    def calls_started(self) -> int:
        """Read the new lines of the logs. Return how many calls the handler service has answered."""
        for name in _SERVICES:
            path: Path = self.stack.folder / f"{name}.log"
            with path.open("rb") as log:
                log.seek(self._read_to[name])
                for line in log:
                    if line.endswith(b"\n"):
                        self.requests.add(line)
                        self._read_to[name] += len(line)
        return len(self.requests.calls)

    def processes(self) -> dict[str, Process]:
        """Every process that runs now."""
        parts = self.stack.servers["caller"].parts
        pids = {name: part.pid for name, part in parts.items()}
        pids |= {name: process.pid for name, process in self.stack.processes.items()}
        found = {}
        for name, pid in pids.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                times = process.cpu_times()
                found[name] = Process(
                    memory_mb=process.memory_info().rss / 1e6,
                    descriptors=process.num_fds(),
                    threads=process.num_threads(),
                    cpu_s=times.user + times.system,
                )
        return found

    async def read(self) -> Reading:
        """Read everything now."""
        texts = [await asyncio.to_thread(_fetch, url) for url in self.stack.servers["caller"].metrics]
        calls = self.calls_started()
        return Reading(
            at=time.monotonic(),
            processes=self.processes(),
            starts=self.requests.starts,
            completions=self.requests.completions,
            calls=calls,
            limited=self.requests.limited,
            refused=self.requests.refused,
            rpcs=frontend_rpcs("\n".join(texts)),
        )

    async def settled(self) -> Reading:
        """Read after a pause, in which what was done before has reached the server's metrics."""
        await asyncio.sleep(_SETTLING_S)
        return await self.read()

    async def watch(self, seconds: float) -> Interval:
        """Read, wait, and read again."""
        first = await self.read()
        await asyncio.sleep(seconds)
        return Interval(first=first, last=await self.read())

    def connections(self) -> dict[str, int]:
        """Established connections to each service."""
        urls = {"receiver": self.stack.receiver_url, "handler": self.stack.service_url}
        found = {}
        for name, url in urls.items():
            sockets = psutil.Process(self.stack.processes[name].pid).net_connections(kind="tcp")
            found[name] = sum(
                each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port_of(url) for each in sockets
            )
        return found

    async def queues(self) -> Queues:
        """What waits now."""
        deliveries, waiting = await asyncio.gather(
            count(self.handler, f"ExecutionStatus = 'Running' AND WorkflowType = '{DELIVERY_WORKFLOW}'"),
            count(self.caller, OPEN),
        )
        connections = self.connections()
        return Queues(
            receiver_connections=connections["receiver"],
            handler_connections=connections["handler"],
            deliveries=deliveries,
            pending=waiting,
        )

    @asynccontextmanager
    async def watching_queues(self, every_s: float) -> AsyncIterator[list[Queues]]:
        """Read the queues again and again inside the context. A reading that the server does not answer is left out."""
        found: list[Queues] = []

        async def watch() -> None:
            while True:
                with suppress(RPCError, psutil.NoSuchProcess):
                    found.append(await self.queues())
                await asyncio.sleep(every_s)

        task = asyncio.create_task(watch())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait({task})


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:
        text: str = response.read().decode()
        return text
