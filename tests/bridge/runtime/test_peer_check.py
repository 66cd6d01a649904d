"""What the answer to an echo shows, or the error in its place: the lowest rung that does not hold, and what to do."""

from datetime import UTC, datetime, timedelta

import pytest
from nexusrpc import HandlerError, HandlerErrorType

from bridge.errors import BridgeError, DestinationRefusedError, RemoteProtocolError, TransportError, UnsignedAnswerError
from bridge.protocol.echo import Echo
from bridge.runtime.peer_check import RUNGS, first_problem

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
        (UnsignedAnswerError("answered 401, compare keys", status=401), "signed answer", "compare keys"),
        (RemoteProtocolError("unreadable"), "signed answer", "unreadable"),
        (HandlerError("not now", type=HandlerErrorType.UNAVAILABLE), "signed answer", "not now"),
        (Echo(version=2, callback_problem="x"), "version", "it speaks version 2 of the protocol, we 1"),
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
