"""Make honest calls while strangers and one bad peer attack the services, and compare them with calls in a quiet time.

The command starts the example as separate processes, with 1 024 descriptors for each service, and one attack after the
other. It exits with 1 if an honest order was not paid, if the slowest percent took longer than twice the quiet one and
100 ms, or if a process kept more than a fifth of additional memory. Everything is on the loopback, and each attack ends
by itself. Attackers run with a lower priority, because in production they use CPU of their own.
"""

import argparse
import asyncio
import contextlib
import json
import resource
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from temporalio.client import Client

from bridge.security.keys import new_key
from examples.payments.contract import PaymentResponse
from examples.payments.order import Order
from examples.payments.orders import ORDER_QUEUE, OrderWorkflow
from scripts.attack_run.attackers import ATTACKS, CALLED_BY_WORKFLOWS, Aim
from scripts.attack_run.calls import BAD, BadOrderWorkflow
from scripts.attack_run.targets import SHARED_ID, SharedWorkflow
from scripts.benchmark.results import percentile
from scripts.chaos_run.load import connect_both
from scripts.environment import temporal_cli
from scripts.environment.command_end import end, until_stopped
from scripts.environment.progress import say
from scripts.environment.server import free_ports
from scripts.environment.stack import Stack, StackOptions, running_stack
from scripts.scale_run.observer import Observer
from scripts.scale_run.results import CACHED

DESCRIPTORS = 1024
_OURS = ("receiver", "handler", "order-worker")
_SETTLING_S = 30.0
"""Longest time after an attack until the memory is read."""
_CALLS_SETTLE_S = 20.0
_PATIENCE_S = 60.0
"""After it an order counts as lost."""
_MEMORY_ALLOWANCE = 1.2


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What honest orders met in one attack, or in a quiet time."""

    name: str
    orders: int
    paid: int
    p50_ms: float
    p99_ms: float
    sent: dict[str, int]
    """What the attacker counted."""
    before_mb: dict[str, float]
    """Resident memory by process: before the attack, at most during it, and after it."""
    peak_mb: dict[str, float]
    after_mb: dict[str, float]
    cpu_s: dict[str, float]
    """CPU time by process while the orders were made, Temporal's server included."""

    def faults(self, quiet: "Phase") -> list[str]:
        """What went wrong, in comparison with a *quiet* phase."""
        found = []
        if self.paid < self.orders:
            found.append(f"{self.orders - self.paid} orders were not paid")
        if self.p99_ms > 2 * quiet.p99_ms + 100:
            found.append("p99 is over its limit")
        kept = [name for name in _OURS if self.after_mb[name] > _MEMORY_ALLOWANCE * quiet.after_mb[name]]
        return found + [f"{name} kept memory" for name in kept]


def settings(port: int, keys: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The bad peer in the settings of both sides. It listens on *port*."""

    def key_set(name: str) -> str:
        return f'{{ signing = "k1", keys = {{ k1 = "{keys[name]["keys"]["k1"]}" }} }}'

    where = 'networks = ["127.0.0.0/8"], allow_insecure = true'
    return {
        "caller": f"""
[handlers.{BAD}]
start_keys = {key_set("start")}
completion_keys = {key_set("handler")}

[endpoints.{BAD}]
url = "http://127.0.0.1:{port}/c/order-prod"
handler = "{BAD}"
networks = ["127.0.0.0/8"]
allow_insecure = true
""",
        "handler": f"""
[callers.{BAD}]
operations = ["PaymentService/*", "SharedService/*"]
start_keys = {key_set("start")}
completion_keys = {key_set("completion")}
callbacks = [{{ url = "http://127.0.0.1:{port}/callbacks", {where} }}]
""",
    }


class Run:
    """One run: honest orders during one attack after the other."""

    def __init__(self, stack: Stack, clients: Sequence[Client], aim: Aim, *, seconds: float, rate: float) -> None:
        self._clients, self._aim, self._seconds, self._rate = clients, aim, seconds, rate
        self._observer = Observer(stack, clients)
        self._number = 0

    async def phase(self, name: str) -> Phase:
        """Make honest orders while attack *name* goes on; "quiet" is no attack."""
        before, peak = self._memory(), self._memory()
        watching = asyncio.create_task(self._watch(peak))
        try:
            async with self._attacking(name) as sent:
                used = self._cpu()
                durations, orders = await self._orders()
                cpu = {name: seconds - used[name] for name, seconds in self._cpu().items()}
            after = await self._settled(before)
        finally:
            watching.cancel()
        return Phase(
            name=name,
            orders=orders,
            paid=len(durations),
            p50_ms=percentile(durations, 0.5) if durations else 0.0,
            p99_ms=percentile(durations, 0.99) if durations else 0.0,
            sent=sent,
            before_mb=before,
            peak_mb=peak,
            after_mb=after,
            cpu_s=cpu,
        )

    @contextlib.asynccontextmanager
    async def _attacking(self, name: str) -> AsyncIterator[dict[str, int]]:
        sent: dict[str, int] = {}
        if name not in ATTACKS:
            yield sent
            return
        attacker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "scripts.attack_run.attackers", name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        attacker.stdin.write(json.dumps(asdict(self._aim)).encode() + b"\n")
        calls = [f"{name}-{number}" for number in range(CALLED_BY_WORKFLOWS.get(name, 0))]
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await attacker.stdout.readline()
            for each in calls:
                await self._clients[0].start_workflow(
                    BadOrderWorkflow.run, each, id=f"{BAD}-{each}", task_queue=ORDER_QUEUE
                )
            if calls:
                # Measure the attack, and not the work of starting its workflows.
                await asyncio.sleep(_CALLS_SETTLE_S)
            yield sent
            attacker.stdin.write_eof()
            async with asyncio.timeout(_PATIENCE_S):
                sent.update(json.loads(await attacker.stdout.read()))
        finally:
            if attacker.returncode is None:
                attacker.kill()
                await attacker.wait()
            for each in calls:
                await self._clients[0].get_workflow_handle(f"{BAD}-{each}").terminate("the attack is over")

    async def _orders(self) -> tuple[list[float], int]:
        count = int(self._rate * self._seconds)
        made = [asyncio.create_task(self._order(number / self._rate)) for number in range(count)]
        found = [await each for each in made]
        return [each for each in found if each is not None], count

    async def fill_caches(self) -> None:
        """Make as many orders as a worker keeps workflows, so that memory does not grow by that later."""
        numbers = iter(range(CACHED))

        async def customer() -> None:
            for _ in numbers:
                await self._order(0)

        await asyncio.gather(*(customer() for _ in range(20)))

    async def _order(self, at: float) -> float | None:
        """Milliseconds of one order; None if it was not paid in time."""
        await asyncio.sleep(at)
        self._number += 1
        order, began = Order(order_id=f"honest-{self._number}", amount=10), time.perf_counter()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                receipt = await self._clients[0].execute_workflow(
                    OrderWorkflow.run, order, id=f"order-{order.order_id}", task_queue=ORDER_QUEUE
                )
        except TimeoutError:
            return None
        return (time.perf_counter() - began) * 1000 if receipt.status == "paid" else None

    def _memory(self) -> dict[str, float]:
        found = self._observer.processes()
        return {name: found[name].memory_mb for name in _OURS}

    def _cpu(self) -> dict[str, float]:
        found = self._observer.processes()
        return {name: found[name].cpu_s for name in (*_OURS, *self._observer.stack.servers["caller"].parts)}

    async def _watch(self, peak: dict[str, float]) -> None:
        while True:
            peak.update({name: max(peak[name], size) for name, size in self._memory().items()})
            await asyncio.sleep(0.2)

    async def _settled(self, before: dict[str, float]) -> dict[str, float]:
        until = time.monotonic() + _SETTLING_S
        while any(size > _MEMORY_ALLOWANCE * before[name] for name, size in self._memory().items()):
            if time.monotonic() > until:
                break
            await asyncio.sleep(1)
        return self._memory()

    async def shared_run_ends(self) -> str:
        """Release the run that the calls attached to, and return how it ended."""
        shared = self._clients[1].get_workflow_handle(SHARED_ID, result_type=PaymentResponse)
        await shared.signal(SharedWorkflow.release)
        async with asyncio.timeout(_PATIENCE_S):
            result: PaymentResponse = await shared.result()
            return result.status


async def run_attacks(attacks: Sequence[str], *, seconds: float, rate: float, as_json: bool) -> int:
    """Make one run and return the exit code."""
    [port] = free_ports(1)
    keys = {name: {"signing": "k1", "keys": {"k1": new_key()}} for name in ("start", "completion", "handler")}
    options = StackOptions(
        ui=False,
        separate=True,
        payment_workers=0,
        handlers_with_worker=1,
        payments="scripts.attack_run.targets",
        order_worker=("scripts.attack_run.orders",),
        settings=settings(port, keys),
    )
    async with running_stack(options) as stack:
        for name in ("receiver", "handler"):
            resource.prlimit(stack.processes[name].pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        aim = Aim(
            service_url=stack.service_url,
            receiver_url=stack.receiver_url,
            keys=keys,
            port=port,
        )
        clients = await connect_both(stack.servers["caller"].address)
        run = Run(stack, clients, aim, seconds=seconds, rate=rate)
        say("warming up, until the workers' caches are full")
        await run.fill_caches()
        phases, failures = [], 0
        for name in ("quiet", *attacks):
            phases.append(await run.phase(name))
            faults = phases[-1].faults(phases[0])
            failures += len(faults)
            say(line(phases[-1], faults))
        if "many_attaches" in attacks:
            say(f"the shared run: {await run.shared_run_ends()}")
    if as_json:
        print(json.dumps({"phases": [asdict(each) for each in phases]}), flush=True)
    return 1 if failures else 0


def line(phase: Phase, faults: Sequence[str]) -> str:
    """One phase for a person."""
    sent = ", ".join(f"{count} {what}" for what, count in sorted(phase.sent.items()))
    memory = ", ".join(
        f"{name} {phase.before_mb[name]:.0f} → {phase.peak_mb[name]:.0f} → {phase.after_mb[name]:.0f} MB"
        for name in _OURS
    )
    cpu = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phase.cpu_s.items())
    return (
        f"{phase.name:<18} {phase.paid} of {phase.orders} paid, p50 {phase.p50_ms:.0f} ms, p99 {phase.p99_ms:.0f} ms; "
        f"{memory}; CPU {cpu}; {sent or 'nothing sent'}; {', '.join(faults) or 'right'}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/attack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attacks",
        type=lambda text: text.split(","),
        default=list(ATTACKS),
        metavar="A,B",
        help=f"carry out only these of: {', '.join(ATTACKS)}",
    )
    parser.add_argument("--seconds", type=float, default=25.0, metavar="S", help="of each attack, default %(default)s")
    parser.add_argument(
        "--rate", type=float, default=4.0, metavar="N", help="honest orders a second, default %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object, the last line")
    temporal_cli.add_server_option(parser)
    return parser


def main() -> NoReturn:
    """Parse the command line, attack and report."""
    parser = _parser()
    arguments = parser.parse_args()
    unknown = [name for name in arguments.attacks if name not in ATTACKS]
    if unknown:
        parser.error(f"no attack {', '.join(unknown)}; there are: {', '.join(ATTACKS)}")
    if not 5 <= arguments.seconds <= 120 or not 0 < arguments.rate <= 20:
        parser.error("--seconds is 5 to 120, --rate at most 20")
    temporal_cli.choose(arguments.server)
    work = run_attacks(arguments.attacks, seconds=arguments.seconds, rate=arguments.rate, as_json=arguments.json)
    end(until_stopped(lambda: work))


if __name__ == "__main__":
    main()
