"""What the answer to an echo shows, or the error in its place: the lowest rung that does not hold, and what to do."""

import asyncio
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network

import pytest
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import BridgeError, DestinationRefusedError, RemoteProtocolError, TransportError, UnsignedAnswerError
from bridge.http.peer_check import RUNGS, EchoProbe, check_peers, first_problem
from bridge.http.route import Route
from bridge.protocol.echo import Echo
from scripts.environment.server import free_ports
from tests.support.helpers import key_set

NOW = datetime(2027, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("result", "rung", "says"),
    [
        (
            TransportError("cannot connect: gaierror", layer="address"),
            "address",
            "gaierror: is the peer up, and is the",
        ),
        (TransportError("cannot connect: refused", layer="connection"), "connection", "is the peer up"),
        (TransportError("cannot connect: SSLError", layer="TLS"), "TLS", "is the URL in the settings right"),
        (TransportError("no answer in time"), "signed answer", "no answer in time"),
        (DestinationRefusedError("address refused"), "address", "address refused"),
        (UnsignedAnswerError("answered 401, compare keys"), "signed answer", "compare keys"),
        (RemoteProtocolError("unreadable"), "signed answer", "unreadable"),
        (HandlerError("not now", type=HandlerErrorType.UNAVAILABLE), "signed answer", "not now"),
        (Echo(version=2, callback_problem="x"), "version", "it speaks version 2 of the protocol, we 1"),
        (Echo(version=2, time=NOW + timedelta(minutes=10)), "version", "update the older side"),
        (Echo(name="payments", time=NOW + timedelta(minutes=10)), "clock", "payments differs from ours by +600 s"),
        (Echo(time=NOW - timedelta(minutes=2), callback_problem="x"), "clock", "-120 s: set both by NTP"),
        (
            Echo(time=NOW, callback_problem="refused"),
            "way back",
            "the handler service could not reach the receiver: refused",
        ),
    ],
)
def test_the_lowest_rung_that_does_not_hold_is_named(
    result: Echo | HandlerError | BridgeError, rung: str, says: str
) -> None:
    """With its cause and a remedy."""
    found, problem = first_problem(result, now=NOW)
    assert found == rung
    assert found in RUNGS
    assert problem is not None
    assert says in problem


@pytest.mark.parametrize("result", [Echo(), Echo(time=NOW + timedelta(seconds=59))])
def test_an_echo_without_a_problem_holds_every_rung(result: Echo) -> None:
    """A peer need not send its time."""
    assert first_problem(result, now=NOW) == (None, None)


@pytest.mark.parametrize(
    "probe",
    [
        EchoProbe(name="p", url="http://127.0.0.1:1", key_set=None),
        EchoProbe(name="p", url="http://127.0.0.1:1", key_set=key_set(), answers="unsigned"),
    ],
    ids=["no keys", "unsigned answers"],
)
async def test_a_peer_whose_answer_proves_nothing_is_not_asked(probe: EchoProbe) -> None:
    """Nothing is claimed about it."""
    [finding] = await check_peers([probe], clock=lambda: NOW)
    assert (finding.state, finding.rung) == ("not known", "p")


async def test_a_proxy_that_speaks_no_tls_is_found_also_on_the_way_to_a_plain_url() -> None:
    """The rung is the proxy's own TLS."""

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    [port] = free_ports(1)
    route = Route(networks=(ip_network("127.0.0.0/8"),), proxy=f"https://127.0.0.1:{port}")
    probe = EchoProbe(name="p", url="http://payments.example", key_set=key_set(), route=route)
    async with await asyncio.start_server(hang_up, "127.0.0.1", port):
        found = await check_peers([probe], clock=lambda: NOW)
    assert [each.rung for each in found if each.state == "wrong"] == ["p: TLS"]
