"""The page that holds the reports of `scripts/scale` and `scripts/soak`, and the machine that a run was made on."""

import os
from datetime import UTC, datetime
from pathlib import Path

from scripts.environment.progress import say
from scripts.scale_run.report import placed

PAGE = "scale.md"


def machine() -> str:
    """What the figures depend on, as a part of a sentence."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f} before the run, {datetime.now(UTC):%d %B %Y}"


def write_report(folder: Path, name: str, report: str) -> None:
    """Replace the report *name* in the page in *folder*, or make the page. The rest of the page stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    page.write_text(placed(page.read_text() if page.exists() else "", name, report))
    say(f"report: {page}")
