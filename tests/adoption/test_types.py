"""What two type checkers say about a newcomer's project: nothing about right code, and an error for each wrong use."""

import asyncio
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.newcomer import Shell, install, run, write_files

PAGE = "docs/quickstart.md"
PYRIGHT = "pyright@1.1.414"
pytestmark = pytest.mark.part("adoption")
WRONG_USES = [
    pytest.param("orders.py", "ShippingService.ship, parcel", 'ShippingService.ship, "parcel"', id="input"),
    pytest.param("orders.py", "price = await", "price: str = await", id="result"),
    pytest.param("orders.py", "quote, parcel)", "quote, parcel, schedule_to_close_timeout=5)", id="timeout"),
    pytest.param("orders.py", 'endpoint="shipping"', 'endpoint="shipping", region="eu"', id="unknown option"),
    pytest.param("orders.py", "service=ShippingService", "service=ShippingService()", id="no contract"),
    pytest.param("shipping.py", 'f"ship-{parcel.order_id}"', "parcel.weight_kg", id="workflow id"),
]


@dataclass(frozen=True)
class Project:
    """The project of the page, with a command for each type checker."""

    folder: Path
    shell: Shell
    checkers: dict[str, str]


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project, and both type checkers. They find the wheel in the project's own environment."""
    root = tmp_path_factory.mktemp("types")
    folder = root / "project"
    folder.mkdir()
    shell = install(root)
    write_files(PAGE, folder, temporal="localhost:7233")
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed: pyright cannot be had")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(root), PYRIGHT]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 100)
    if process.returncode != 0:
        pytest.skip(f"npm cannot install pyright: {out.decode()[-300:]}")
    python = root / "environment" / "bin" / "python"
    checkers = {
        "mypy": f"{sys.executable} -m mypy --strict --python-executable {python} orders.py shipping.py",
        "pyright": f"{root}/node_modules/.bin/pyright --pythonpath {python} orders.py shipping.py",
    }
    return Project(folder, shell, checkers)


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
async def test_the_code_of_the_page_is_right(made: Project, checker: str) -> None:
    """mypy is strict."""
    checked = await run(made.checkers[checker], folder=made.folder, shell=made.shell)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize(("file", "right", "wrong"), WRONG_USES)
async def test_a_wrong_use_is_an_error_in_its_file(
    made: Project, checker: str, file: str, right: str, wrong: str
) -> None:
    """There is no other error."""
    path = made.folder / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    try:
        checked = await run(made.checkers[checker], folder=made.folder, shell=made.shell)
    finally:
        path.write_text(text)
    assert checked.returncode == 1
    named = set(re.findall(r"(\w+\.py):\d+.*?error", checked.stdout))
    assert named == {file}, checked.stdout
