"""Tools for tests of callers and handlers. Production code never imports this package.

`FakeEndpoints` answers the calls of a caller's workflows by contract, without a handler. `Pair` runs both sides on real
sockets: with its client a test of a handler needs no caller, and with its faults messages are lost, late or repeated.
"""

from bridge.testing.fakes import FakeEndpoints, FakeOperation, RecordedCall
from bridge.testing.pair import Fault, Pair, PairService

__all__ = ["FakeEndpoints", "FakeOperation", "Fault", "Pair", "PairService", "RecordedCall"]
