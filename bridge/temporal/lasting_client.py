"""Clients that last longer than their certificates and API keys.

A team replaces the client of a running worker (`worker.client = …`). A service replaces its own client when the files
of the connection have changed. An object that keeps the first client would go on with invalid credentials.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from temporalio import activity, nexus
from temporalio.client import Client

from bridge.runtime.metrics import Metrics
from bridge.runtime.reloaded import Alarm, Reloaded
from bridge.temporal.connection import connect_config, connect_files

_PACE_S = 1.0


class _PresentClient:
    def __init__(self, current: Callable[[], Client]) -> None:
        self._current = current

    def __getattr__(self, name: str) -> Any:
        if activity.in_activity():
            return getattr(activity.client(), name)
        return getattr(nexus.client() if nexus.in_operation() else self._current(), name)


def present_client(current: Callable[[], Client]) -> Client:
    """A client that forwards to the client of the running activity or Nexus operation, or else to that of *current*."""
    return cast("Client", _PresentClient(current))


def lasting_client(client: Client, *, replaced: Callable[[Client], None] = lambda _: None) -> Client:
    """A client that forwards to *client*, until files of its connection change and a new client is connected.

    Use it inside one event loop. *replaced* is called with each new client. Calls that run finish on the old one.
    """
    return present_client(_Connection(client, replaced).current)


class _ReadAlarm(Alarm):
    def ended(self) -> None:
        """Say nothing: files that can be read are in use only when a client has connected with them."""


class _Connection:
    """The connection of a service, as the `TEMPORAL_…` variables and their files give it."""

    def __init__(self, client: Client, replaced: Callable[[Client], None]) -> None:
        self._client = client
        self._replaced = replaced
        self._alarm = Alarm("temporal", Metrics.of(client))
        self._used = _read()
        alarm = _ReadAlarm("temporal", Metrics.of(client))
        self._read = Reloaded(self._used, make=_read, files=lambda each: each[1], alarm=alarm)
        self._replacing: asyncio.Task[None] | None = None

    def current(self) -> Client:
        """Return the client, and begin to replace it if files of the connection have changed."""
        if (found := self._read()) != self._used and (self._replacing is None or self._replacing.done()):
            self._replacing = asyncio.create_task(self._replace(found))
        return self._client

    async def _replace(self, found: tuple[dict[str, Any], list[Path]]) -> None:
        old = self._client
        # The namespace is that of this process, also if only the settings name it: a token and a record are of it.
        kept = {"namespace": old.namespace, "data_converter": old.data_converter}
        try:
            self._client = await Client.connect(**(found[0] | kept), runtime=old.service_client.config.runtime)
        except (RuntimeError, ValueError) as error:
            self._alarm.raised(error)
            await asyncio.sleep(_PACE_S)
        else:
            self._used = found
            self._replaced(self._client)
            self._alarm.ended()


def _read() -> tuple[dict[str, Any], list[Path]]:
    return connect_config(), connect_files()
