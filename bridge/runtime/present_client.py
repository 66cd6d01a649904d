"""The worker's present client, for parts that were made before the worker was.

A team replaces the client of a running worker (`worker.client = …`) to change certificates or API keys. What was bound
to the first client would go on with credentials that no longer hold.
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
    """A stand-in for the client of the worker whose activity or Nexus operation runs; *first* outside of both."""
    return cast("Client", _PresentClient(first))
