"""What one signed echo shows about a peer: rungs from the look-up of its address to the way back to us.

The echo is sent when a process starts, and by the command `doctor`. It starts and completes nothing.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_network
from typing import Literal

from nexusrpc import HandlerError
from temporalio.common import MetricMeter

from bridge.errors import BridgeError, DestinationRefusedError, TransportError
from bridge.http.client import HttpClient
from bridge.http.peer_client import PeerClient
from bridge.http.route import Route
from bridge.protocol.answers import Sent
from bridge.protocol.echo import PROTOCOL_VERSION, Echo, decode_echo
from bridge.runtime.metrics import Metrics
from bridge.security.keys import KeySet
from bridge.security.signatures import MessageSigner

RUNGS = ("address", "connection", "TLS", "signed answer", "version", "clock", "way back")
ANYWHERE = Route(networks=(ip_network("0.0.0.0/0"), ip_network("::/0")))
"""The way to a URL of our own, which may lead to every address."""
_TIMEOUT = timedelta(seconds=8)


State = Literal["ok", "wrong", "not known", "not checked"]


@dataclass(frozen=True)
class Finding:
    """What is known about one rung, or about several of a peer."""

    state: State
    """"not checked" if a rung below does not hold."""
    rung: str
    """What was checked."""
    found: str = ""
    """What was seen; for a problem also what to do."""


@dataclass(frozen=True, kw_only=True)
class EchoProbe:
    """An echo to send."""

    name: str
    """What answers it."""
    url: str
    """Where to send it."""
    key_set: KeySet | None
    """Signs it; None if the peer has no keys for signatures."""
    route: Route = ANYWHERE
    """The way to it, as the settings of the peer say."""
    answers: Literal["signed", "unsigned"] = "signed"
    """Whether the peer signs its answers."""
    peer: str = ""
    """The peer's table in the settings."""


EchoResult = Echo | HandlerError | BridgeError


async def ask_peers(probes: Iterable[EchoProbe]) -> list[tuple[EchoProbe, EchoResult | None]]:
    """Send every echo, all at the same time. The result is None for a peer that cannot sign its answers."""
    async with aclosing(HttpClient()) as http:
        peers = PeerClient(http, metrics=Metrics(MetricMeter.noop))
        asked = list(probes)
        return list(zip(asked, await asyncio.gather(*(_ask(peers, each) for each in asked)), strict=True))


async def check_peers(probes: Iterable[EchoProbe], *, clock: Callable[[], datetime]) -> list[Finding]:
    """Send every echo, and return what the answers show."""
    asked = await ask_peers(probes)
    return [finding for probe, result in asked for finding in _findings(probe, result, now=clock())]


async def _ask(peers: PeerClient, probe: EchoProbe) -> EchoResult | None:
    if probe.key_set is None or probe.answers == "unsigned":
        return None
    try:
        answer = await peers.post(
            *(Sent.ECHO, probe.name, probe.url, {}, b""),
            signer=MessageSigner(probe.key_set),
            answers=probe.answers,
            route=probe.route,
            timeout=_TIMEOUT,
        )
        return decode_echo(answer.body) if answer.error is None else answer.error
    except BridgeError as error:
        return error


def _findings(probe: EchoProbe, result: EchoResult | None, *, now: datetime) -> list[Finding]:
    if result is None:
        reason = "not checked: the peer cannot sign its answers, or wants a proof that only its own side has"
        return [Finding("not known", probe.name, reason)]
    rung, problem = first_problem(result, now=now)
    # TLS may also be that of the egress proxy.
    rungs = [each for each in RUNGS if each != "TLS" or rung == "TLS" or probe.url.startswith("https:")]
    height = rungs.index(rung) if rung is not None else len(rungs)
    parts: tuple[tuple[State, list[str], str], ...] = (
        ("ok", rungs[:height], ""),
        ("wrong", rungs[height : height + 1], problem or ""),
        ("not checked", rungs[height + 1 :], ""),
    )
    return [Finding(state, f"{probe.name}: {', '.join(names)}", found) for state, names, found in parts if names]


def first_problem(result: EchoResult, *, now: datetime) -> tuple[str | None, str | None]:
    """Return the lowest of the `RUNGS` that does not hold and what to do, by the answer to an echo; else None twice."""
    match result:
        case TransportError():
            return result.layer, f"{result}: is the peer up, and is the URL in the settings right?"
        case DestinationRefusedError():
            return "address", str(result)
        case Echo() if result.version != PROTOCOL_VERSION:
            versions = f"version {result.version} of the protocol, we {PROTOCOL_VERSION}"
            return "version", f"it speaks {versions}: update the older side"
        case Echo():
            if (skew := result.clock_problem(now)) is not None:
                return "clock", skew
            if result.callback_problem is not None:
                return "way back", f"the handler service could not reach the receiver: {result.callback_problem}"
            return None, None
        case _:
            return "signed answer", str(result)
