"""What `callback-bridge keys` needs of the caller's side."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime

from bridge.admin.keys import SharedKeys
from bridge.runtime.http_client import HttpClient
from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import LiveKeys
from caller.endpoint_client import Endpoints, NotStartedError
from caller.settings import CallerSettings

SETTINGS = CallerSettings


async def shared_keys(
    settings: CallerSettings, keys: LiveKeys, http: HttpClient, metrics: Metrics
) -> AsyncIterator[SharedKeys]:
    """Ask the handler service behind each endpoint."""
    endpoints = Endpoints(settings, keys=keys, http=http, metrics=metrics, clock=lambda: datetime.now(UTC))
    for name, endpoint in settings.endpoints.items():
        ours = keys.fingerprints(f"handlers.{endpoint.handler}")
        try:
            yield (name, ours, (await endpoints.echo(name)).keys)
        except NotStartedError as error:
            yield (name, ours, str(error))
