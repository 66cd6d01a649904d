"""The pictures of the documents are those of a real run: a browser clicks through Temporal's UI and both consoles."""

from pathlib import Path

import pytest

from scripts.commands.pictures import FOLDER, NAMES, take_pictures
from scripts.environment.stack import ROOT

MAX_BYTES = 200_000


@pytest.mark.part("pictures")
@pytest.mark.timeout(400)
async def test_a_browser_clicks_from_the_order_to_its_payment_and_back_and_uses_both_consoles(tmp_path: Path) -> None:
    """Each page shows what it has to show, otherwise no picture is taken. The outcome that failed is delivered."""
    await take_pictures(tmp_path)
    assert sorted(each.stem for each in tmp_path.glob("*.png")) == sorted(NAMES)


def test_every_picture_is_small_and_is_shown_by_a_document() -> None:
    """A page with pictures loads fast."""
    pages = [ROOT / "README.md", ROOT / "docs" / "observability.md"]
    for name in NAMES:
        path = FOLDER / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < MAX_BYTES
        assert any(f"pictures/{name}.png)" in page.read_text() for page in pages), name
