"""Does the harm of a schedule to the processes of a running stack."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.chaos_run.clocks import Clocks
from scripts.chaos_run.disks import Disks
from scripts.chaos_run.disturbed_orders import REFUSALS
from scripts.chaos_run.fault_proxy import FaultProxy
from scripts.chaos_run.key_rotation import rotate
from scripts.chaos_run.load import AGAIN_S
from scripts.chaos_run.payment_worker import WITHOUT_PLUGIN
from scripts.chaos_run.schedule import Harm, HarmKind
from scripts.chaos_run.verdict import HarmDone
from scripts.environment.processes import stop_process
from scripts.environment.stack import Stack, StackOptions, start_process

_AMBUSH_S = 1.0
"""How long a callback is held while its sender is killed."""
_AMBUSH_PATIENCE_S = 10.0
"""Longest wait for that callback."""


class Equipment:
    """What the processes need from their start on, so that their clocks, disks and plugins can be disturbed."""

    def __init__(self, *, library: Path | None, disks: Disks | None) -> None:
        """*library* is libfaketime. Without one of the two, the harm that needs it is left out."""
        self._library = library
        self.disks = disks
        self.without_plugin: set[str] = set()
        """The payment workers that have no plugin when they start."""
        self.pids: set[int] = set()
        """Ids of all processes that were started."""

    @property
    def lacking(self) -> set[HarmKind]:
        """The harm that cannot be done."""
        needed = {HarmKind.MOVE_CLOCK: self._library, HarmKind.FILL_DISK: self.disks}
        return {kind for kind, tool in needed.items() if tool is None}

    def clocks(self, folder: Path) -> Clocks | None:
        """Return the clocks of the processes whose stack has *folder*."""
        return None if self._library is None else Clocks(self._library, folder)

    def environment(self, folder: Path, _side: str, name: str) -> dict[str, str]:
        """Return the environment with which process *name* must be started."""
        clocks = self.clocks(folder)
        return {
            **({} if clocks is None else clocks.environment(name)),
            **({} if self.disks is None else self.disks.environment(folder, name)),
            **({WITHOUT_PLUGIN: "1"} if name in self.without_plugin else {}),
        }


class Disturbance:
    """Does the harm of a schedule to a running stack, and starts the killed processes again."""

    def __init__(self, stack: Stack, options: StackOptions, callbacks: FaultProxy, equipment: Equipment) -> None:
        self._stack = stack
        self._options = options
        self._callbacks = callbacks
        self._equipment = equipment
        self._busy = {name: asyncio.Lock() for name in stack.processes}
        self._rotating = asyncio.Lock()
        self.done: list[HarmDone] = []
        equipment.pids.update(process.pid for process in stack.processes.values())
        self.killed = 0
        """Processes that were killed, the server not included."""
        self.died: list[str] = []
        """Processes that ended by themselves, or could not be started again."""

    async def carry_out(self, harms: Sequence[Harm]) -> None:
        """Do every harm at its time. Return when all processes run again."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, harm in enumerate(sorted(harms, key=lambda harm: harm.at)):
                await asyncio.sleep(max(0.0, began + harm.at - time.monotonic()))
                group.create_task(self._do(harm, number))
        await asyncio.gather(*(self._mend(name) for name in self._stack.processes))
        for name, part in self._stack.servers["caller"].parts.items():
            if part.exit_code is not None:
                self.died.append(f"{name} with code {part.exit_code}")

    async def _do(self, harm: Harm, number: int) -> None:
        began = time.time()
        clocks, disks = self._equipment.clocks(self._stack.folder), self._equipment.disks
        match harm.kind:
            case HarmKind.RESTART_SERVER | HarmKind.KILL_SERVER_NODE | HarmKind.KILL_DATABASE:
                parts = self._stack.servers["caller"].parts
                await asyncio.gather(*(parts[name].restart(harm.down_s) for name in harm.victims))
            case HarmKind.REFUSE_DECODES:
                refusals = self._stack.folder / REFUSALS
                refusals.write_text(str(harm.amount))
                await asyncio.sleep(harm.down_s)
                refusals.write_text("0")
            case HarmKind.MOVE_CLOCK:
                assert clocks is not None
                await self._for_a_time(
                    harm, lambda name: clocks.set(name, harm.amount), lambda name: clocks.set(name, 0)
                )
            case HarmKind.FILL_DISK:
                assert disks is not None
                await self._for_a_time(harm, disks.fill, disks.empty)
            case HarmKind.ROTATE_KEYS:
                async with self._rotating:
                    await rotate(self._stack.folder, f"k{number + 2}", harm.down_s)
            case HarmKind.REMOVE_PLUGIN:
                await asyncio.gather(*(self._run_without_plugin(name, harm.down_s) for name in harm.victims))
            case _:
                if harm.kind is HarmKind.KILL_AT_CALLBACK:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._callbacks.ambush(_AMBUSH_S), _AMBUSH_PATIENCE_S)
                await asyncio.gather(*(self._kill(name, harm.down_s) for name in harm.victims))
        self.done.append(HarmDone(name=harm.kind.value, began=began, ended=time.time()))

    async def _for_a_time(self, harm: Harm, begin: Callable[[str], None], end: Callable[[str], None]) -> None:
        for name in harm.victims:
            begin(name)
        await asyncio.sleep(harm.down_s)
        for name in harm.victims:
            end(name)

    async def _run_without_plugin(self, name: str, time_s: float) -> None:
        """Stop process *name* in order, run it without its plugin for *time_s*, then with the plugin again."""
        self._equipment.without_plugin.add(name)
        await self._roll(name)
        await asyncio.sleep(time_s)
        self._equipment.without_plugin.discard(name)
        await self._roll(name)

    async def _roll(self, name: str) -> None:
        async with self._busy[name]:
            if not self._has_died(name):
                await stop_process(self._stack.processes[name])
            await self._start(name)

    async def _kill(self, name: str, down_s: float) -> None:
        # A process that is being started is killed when it runs.
        async with self._busy[name]:
            if not self._has_died(name):
                process = self._stack.processes[name]
                process.kill()
                await process.wait()
                self.killed += 1
            await asyncio.sleep(down_s)
            await self._start(name)

    async def _mend(self, name: str) -> None:
        async with self._busy[name]:
            if self._has_died(name):
                await self._start(name)

    def _has_died(self, name: str) -> bool:
        """Whether process *name* has ended by itself. If it has, it is recorded."""
        code = self._stack.processes[name].returncode
        if code is not None:
            self.died.append(f"{name} with code {code}")
        return code is not None

    async def _start(self, name: str) -> None:
        """Start process *name*, again until it runs. Without the server it ends at once."""
        for _ in range(60):
            try:
                await start_process(self._stack, self._options, name)
            except (RuntimeError, TimeoutError):
                await asyncio.sleep(AGAIN_S)
            else:
                return
            finally:
                self._equipment.pids.add(self._stack.processes[name].pid)
        self.died.append(f"{name} does not start any more")
