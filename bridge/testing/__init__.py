"""Tools for tests of callers and handlers. Production code never imports this package.

Tests of a caller use `FakeEndpoints`, which answers by contract in place of the handlers.
"""

from bridge.testing.fakes import FakeEndpoint, FakeEndpoints, FakeOperation, RecordedCall

__all__ = ["FakeEndpoint", "FakeEndpoints", "FakeOperation", "RecordedCall"]
