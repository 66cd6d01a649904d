"""The console: server-rendered pages for the operators of one service, on a listener of its own.

Off unless the settings have it. Only then jinja2 is imported, which the extra `console` installs.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from bridge.http.peer_exchanges import PeerExchanges
from bridge.runtime.settings import ConsoleSettings


@dataclass(frozen=True, kw_only=True)
class Pages:
    """What one side shows. The readers are those of the command line."""

    title: str
    """Name of this side in its settings."""
    template: Path
    """Template of the side's pages. It shows the values that *read* returns."""
    read: Callable[[Mapping[str, str]], Awaitable[dict[str, Any]]]
    """Returns the values of the page that a query asks for."""
    redeliver: Callable[[str], Awaitable[str]] | None = None
    """Runs a delivery again and returns the run's id. None on a side without deliveries."""


@asynccontextmanager
async def serving_console(
    settings: ConsoleSettings | None, pages: Pages, peers: PeerExchanges, *, clock: Callable[[], datetime]
) -> AsyncIterator[None]:
    """Serve the console if there are settings for it.

    Raises:
        bridge.runtime.settings.SettingsError: jinja2 is not installed.
        OSError: The address cannot be used.
    """
    if settings is None:
        yield
        return
    from bridge.console.application import Console  # noqa: PLC0415 - it needs the extra

    async with Console(settings, pages, peers, clock=clock).serving():
        yield
