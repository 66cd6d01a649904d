"""Links between the two namespaces: each names the workflow that a message comes from.

No decision depends on a link, therefore an unreadable one is left out. The SDK converts between URL and link.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self
from urllib.parse import quote

import nexusrpc
from temporalio.api.common.v1 import Link
from temporalio.api.enums.v1 import EventType
from temporalio.nexus import _link_conversion

_LINK = re.compile(r'\s*<([^<>\s]+)>\s*(?:;(?!\s*type=)[^;]*)*;\s*type=("?)([A-Za-z0-9_./]+)\2\s*(?:;.*)?')
_PCT = r"%[0-9A-Fa-f]{2}"
_URI = re.compile(
    rf"[A-Za-z][A-Za-z0-9+.\-]*://(?:[A-Za-z0-9\-._~]*(?::[0-9]{{1,5}})?)(?:/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|{_PCT})*+)?"
    # Go refuses a semicolon in a query.
    rf"(?:\?(?:[A-Za-z0-9\-._~!$&'()*+,=:@/?]|{_PCT})*+)?(?:#(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|{_PCT})*+)?"
)
_TYPE = re.compile(r"[A-Za-z0-9_./]+")
_MAX_LINKS = 10


@dataclass(frozen=True, kw_only=True)
class WorkflowRef:
    """One run of a workflow, in either namespace."""

    namespace: str
    """Name of the namespace."""
    workflow_id: str
    """Id of the workflow."""
    run_id: str
    """Id of the run."""

    @classmethod
    def from_links(cls, links: Iterable[nexusrpc.Link]) -> Self | None:
        """The run that the first readable workflow link points at."""
        for link in links:
            temporal = to_temporal_link(link)
            if temporal is not None:
                event = temporal.workflow_event
                return cls(namespace=event.namespace, workflow_id=event.workflow_id, run_id=event.run_id)
        return None

    def ui_url(self, base: str) -> str:
        """The page of this run in the Temporal UI at *base*. Every id is percent-encoded."""
        names = (quote(each, safe="") for each in (self.namespace, self.workflow_id, self.run_id))
        return "{}/namespaces/{}/workflows/{}/{}/history".format(base, *names)

    def to_link(self) -> nexusrpc.Link:
        """A link to the first event of this run."""
        event = Link.WorkflowEvent(
            namespace=self.namespace,
            workflow_id=self.workflow_id,
            run_id=self.run_id,
            event_ref=Link.WorkflowEvent.EventReference(
                event_id=1, event_type=EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED
            ),
        )
        return _link_conversion.workflow_event_to_nexus_link(event)


def to_temporal_link(link: nexusrpc.Link) -> Link | None:
    """*link* as Temporal's own type; None if it is unreadable, or no link to an event of a workflow.

    Older servers refuse a message with a link of another type. The SDK would also log each one that it does not know.
    """
    if link.type != Link.WorkflowEvent.DESCRIPTOR.full_name:
        return None
    try:
        return _link_conversion.nexus_link_to_temporal_link(link)
    except Exception:  # noqa: BLE001 - a private parser reads a peer's text: any error only drops the link
        return None


def encode_links(links: Iterable[nexusrpc.Link]) -> str:
    """One header value with those of *links* that every reader accepts; empty if no link is left.

    If Go's parser refuses one link, Temporal's server refuses the whole message. Commas inside a URL are
    percent-encoded, because readers split the header at commas.
    """
    return ", ".join(
        f'<{link.url.replace(",", "%2C")}>; type="{link.type}"'
        for link in links
        if _URI.fullmatch(link.url) and _TYPE.fullmatch(link.type)
    )


def decode_links(values: Iterable[str]) -> list[nexusrpc.Link]:
    """The first ten readable links of the `Nexus-Link` header lines *values*."""
    links = []
    for part in ",".join(values).split(","):
        found = _LINK.fullmatch(part)
        if found:
            links.append(nexusrpc.Link(url=found[1], type=found[3]))
    return links[:_MAX_LINKS]
