"""The pytest plugin of the callback bridge, found by its entry point.

It imports the testing kit only when a test asks for it: both sides and their servers are part of the kit.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bridge.testing import FakeEndpoints


@pytest.fixture
def fake_endpoints() -> "Iterator[FakeEndpoints]":
    """Fakes for the worker of a caller. The test fails if a call comes that it did not expect."""
    from bridge.testing import FakeEndpoints  # noqa: PLC0415 - imported when a test asks for it

    with FakeEndpoints() as fakes:
        yield fakes
