"""What `callback-bridge keys` needs of the caller's side."""

from collections.abc import Iterator

from bridge.http.peer_check import EchoProbe
from caller.settings import CallerSettings
from caller.startup_check import endpoint_probes

SETTINGS = CallerSettings


def key_probes(settings: CallerSettings) -> Iterator[EchoProbe]:
    """The echo of the handler service behind each endpoint."""
    return endpoint_probes(settings, None)
