"""What `callback-bridge keys` needs of the handler's side."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from nexusrpc import HandlerError

from bridge.admin.keys import SharedKeys
from bridge.errors import BridgeError
from bridge.runtime.http_client import HttpClient
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from handler.delivery.callback_client import CallbackClient
from handler.settings import HandlerSettings

SETTINGS = HandlerSettings


async def shared_keys(
    settings: HandlerSettings, keys: LiveKeys, http: HttpClient, metrics: Metrics
) -> AsyncIterator[SharedKeys]:
    """Ask the receiver at each destination of each caller that verifies and signs."""
    callbacks = CallbackClient(settings, keys=keys, http=http, metrics=metrics, clock=lambda: datetime.now(UTC))
    for name, peer in settings.callers.items():
        ours = keys.fingerprints(f"callers.{name}")
        for destination in peer.callbacks if "completion_keys" in ours and peer.answers == "signed" else ():
            try:
                yield (destination.url, ours, (await callbacks.echo(name, destination.url)).keys)
            except (BridgeError, HandlerError) as error:
                yield (destination.url, ours, str(error))
