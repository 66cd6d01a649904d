"""The worker's present client, for objects that exist before the worker.

A team replaces the client of a running worker (`worker.client = …`) to change certificates or API keys. An object that
keeps the first client would go on with invalid credentials.
"""

from typing import Any, cast

from temporalio import activity, nexus
from temporalio.client import Client


class _PresentClient:
    def __init__(self, first: Client) -> None:
        self._first = first

    def __getattr__(self, name: str) -> Any:
        if activity.in_activity():
            return getattr(activity.client(), name)
        return getattr(nexus.client() if nexus.in_operation() else self._first, name)


def present_client(first: Client) -> Client:
    """A client that forwards to the client of the running activity or Nexus operation, or else to *first*."""
    return cast("Client", _PresentClient(first))
