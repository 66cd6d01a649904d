"""The command `callback-bridge handler doctor`: what keeps the handler's side from working, and what to do."""

from collections.abc import Iterator
from urllib.parse import quote

from bridge.admin.doctor import examine
from bridge.admin.output import JsonOutput
from bridge.http.peer_check import EchoProbe
from bridge.runtime.user_modules import import_module
from handler.service import Served
from handler.settings import HandlerSettings
from handler.task_queues import PLUGIN, task_queues


async def doctor(*, module: str | None = None, peer: str | None = None, as_json: JsonOutput = False) -> None:
    """Check this side where it runs, step by step: settings, Temporal, namespace, limits, workers, service for callers.

    The service tries the caller's receiver. Nothing is started or completed. Exit code 1 if a check failed.

    Args:
        module: Dotted name of the module that the service serves, to check the task queues of its targets. By default
            only the task queue in the settings is checked.
        peer: Check only this caller, in both directions.
    """

    def queues(settings: HandlerSettings) -> dict[str, str | None]:
        if module is None:
            return {settings.task_queue: PLUGIN}
        return task_queues(Served.by(import_module(module)).targets, settings)

    def probes(settings: HandlerSettings, _: str | None) -> Iterator[EchoProbe]:
        for name, caller in settings.callers.items():
            # For a caller without callbacks, the query is empty.
            for back in [f"?callback={quote(each.url, safe='')}" for each in caller.callbacks] or [""]:
                if peer in {None, name}:
                    # A client certificate is the caller's alone.
                    key_set = None if caller.san is not None else caller.start_keys
                    yield EchoProbe(name=name, url=f"{settings.service.url}/c/{name}{back}", key_set=key_set)

    await examine(HandlerSettings, queues=queues, probes=probes, as_json=as_json)
