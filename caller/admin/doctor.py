"""The command `callback-bridge receiver doctor`: what keeps the caller's side from working, and what to do."""

from datetime import UTC, datetime

from bridge.admin.doctor import check_side, report
from bridge.admin.output import JsonOutput
from bridge.runtime.peer_check import EchoProbe, check_peers
from caller.settings import CallerSettings
from caller.startup_check import endpoint_probes


async def doctor(*, task_queue: str | None = None, peer: str | None = None, as_json: JsonOutput = False) -> None:
    """Check this side from below, from where it runs: settings, Temporal, workers, receiver, and every endpoint.

    Nothing is started or completed. Exit code 1 if a check failed.

    Args:
        task_queue: Task queue of the workflows that make calls, to check its workers.
        peer: Check only this handler, in both directions.
    """
    queues: dict[str, str | None] = {} if task_queue is None else {task_queue: "CallerPlugin"}
    findings, settings, client = await check_side(CallerSettings, lambda _: queues)
    if settings is not None:
        namespace = settings.namespace if client is None else client.namespace
        probes = [*endpoint_probes(settings, namespace, peer)]
        if settings.receiver is not None:
            url = settings.receiver.echo_url(namespace)
            probes += [
                EchoProbe(name="our receiver", url=f"{url}{'&' if '?' in url else '?'}handler={name}", key_set=keys)
                for name, keys in ((name, each.completion_keys) for name, each in settings.handlers.items())
                if peer in {None, name}
            ]
        findings += await check_peers(probes, clock=lambda: datetime.now(UTC))
    report(findings, as_json=as_json)
