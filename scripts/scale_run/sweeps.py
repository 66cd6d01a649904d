"""Reads the sweeps of one type of target from the pending activity of the sweep's workflow."""

from contextlib import suppress
from dataclasses import dataclass

from temporalio.client import Client
from temporalio.service import RPCError

from handler.sweep.place import SweepPlace
from scripts.environment.stack import PAYMENT_QUEUE
from scripts.scale_run.patience import PATIENCE_S, until_all

SWEEP_ID = f"bridge-sweep:{PAYMENT_QUEUE}:PaymentWorkflow"
"""Id of the workflow that sweeps for the example's targets."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep that has ended."""

    until_ms: int
    """Its place, which is the instant of its schedule: Unix time in milliseconds. No two sweeps have the same."""
    took_ms: float
    """Time from its schedule to its end."""


async def latest_sweep(client: Client, workflow_id: str) -> Sweep | None:
    """The latest sweep. None while the first one is not done, and between the heartbeat of a sweep and its end."""
    with suppress(RPCError):
        described = await client.get_workflow_handle(workflow_id).describe()
        for pending in described.raw_description.pending_activities:
            if pending.heartbeat_details.payloads and pending.HasField("last_attempt_complete_time"):
                [text] = await client.data_converter.decode(pending.heartbeat_details.payloads, [str])
                until_ms = SweepPlace.read(text).until_ms
                took_ms = pending.last_attempt_complete_time.ToNanoseconds() / 1e6 - until_ms
                # The end of the sweep before is earlier than the place of one that still runs.
                return Sweep(until_ms=until_ms, took_ms=took_ms) if took_ms >= 0 else None
    return None


async def next_sweeps_ms(
    client: Client, workflow_id: str, number: int, *, pause_s: float, patience_s: float = PATIENCE_S
) -> list[float]:
    """Wait for *number* further sweeps, and return the time of each. *pause_s* is shorter than their interval.

    Raises:
        NoProgressError: No sweep ended for longer than the patience.
    """
    before, found = await latest_sweep(client, workflow_id), dict[int, float]()

    async def read() -> int:
        latest = await latest_sweep(client, workflow_id)
        if latest is not None and (before is None or latest.until_ms != before.until_ms):
            found[latest.until_ms] = latest.took_ms
        return len(found)

    await until_all("sweeps", number, read, pause_s=pause_s, patience_s=patience_s)
    return list(found.values())
