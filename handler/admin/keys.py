"""What `callback-bridge keys` needs of the handler's side."""

from collections.abc import Iterator

from bridge.http.peer_check import EchoProbe
from bridge.http.route import Route
from handler.settings import HandlerSettings

SETTINGS = HandlerSettings


def key_probes(settings: HandlerSettings) -> Iterator[EchoProbe]:
    """The echo of the receiver at each destination of each caller."""
    for name, caller in settings.callers.items():
        for destination in caller.callbacks:
            yield EchoProbe(
                name=name,
                url=f"{destination.url}?handler={settings.name}",
                key_set=caller.completion_keys,
                route=Route(networks=destination.networks, tls=caller.tls, proxy=caller.proxy),
                answers=caller.answers,
                peer=f"callers.{name}",
            )
