"""The machine that a run was made on, as a report names it."""

import os
from datetime import UTC, datetime


def machine() -> str:
    """What the figures depend on, as a part of a sentence."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} before the run, {datetime.now(UTC):%d %B %Y}"
