"""The containers' files, as far as tests without containers can verify them."""

import asyncio
import os
import re
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from bridge.runtime.settings import load
from bridge.security.egress import allowed_destination
from caller.settings import CallerSettings
from examples.payments.orders import ORDER_QUEUE
from examples.payments.payments import PAYMENT_QUEUE
from handler.settings import HandlerSettings
from scripts.environment import temporal_cli
from scripts.environment.server import Server
from scripts.environment.stack import ROOT
from tests.support.world import World

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("callback-bridge:")}


@pytest.fixture(scope="module", name="secrets")
def secrets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the documented command makes."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    subprocess.run([sys.executable, ROOT / "deploy" / "new_secrets.py", folder], check=True)
    return folder


@pytest.fixture(name="settings")
def both_sides(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CallerSettings, HandlerSettings]:
    monkeypatch.setenv("BRIDGE_CONFIG", str(secrets / "caller.toml"))
    caller = load(CallerSettings)
    monkeypatch.setenv("BRIDGE_CONFIG", str(secrets / "handler.toml"))
    return caller, load(HandlerSettings)


def test_the_settings_load_with_fresh_keys_and_fit_each_other(
    settings: tuple[CallerSettings, HandlerSettings],
) -> None:
    """The real classes refuse a weak or shared key; the two sides agree on keys, names and addresses."""
    caller, handler = settings
    ours, theirs = handler.callers[caller.name], caller.handlers[handler.name]
    assert (ours.start_keys, ours.completion_keys) == (theirs.start_keys, theirs.completion_keys)
    assert caller.receiver is not None
    allowed_destination(f"{caller.receiver.url}/callbacks/{'c' * 22}?sig=token", ours.callbacks)
    endpoint = caller.endpoints["payments"]
    assert endpoint.url == f"{handler.service.url}/c/{caller.name}"
    assert handler.task_queue == PAYMENT_QUEUE
    assert {caller.receiver.port, handler.service.port} == {8080}
    [subnet] = [each["subnet"] for each in COMPOSE["networks"]["bridge"]["ipam"]["config"]]
    assert [str(network) for network in (*endpoint.networks, *ours.callbacks[0].networks)] == [subnet, subnet]


def test_secrets_are_never_overwritten(secrets: Path) -> None:
    """A lost key would break every waiting call."""
    before = {path.name: path.read_text() for path in secrets.iterdir()}
    again = subprocess.run([sys.executable, ROOT / "deploy" / "new_secrets.py", secrets], check=False)
    assert again.returncode != 0
    assert before == {path.name: path.read_text() for path in secrets.iterdir()}
    assert secrets.stat().st_mode & 0o777 == 0o700


def test_every_secret_is_made_and_only_mounted_where_it_belongs(secrets: Path) -> None:
    """No side sees the other's secrets; version control and images contain no secret."""
    assert {Path(each["file"]).name for each in COMPOSE["secrets"].values()} == {
        each.name for each in secrets.iterdir()
    }
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(f"{Path(each['file']).parent}/" in ignored for each in COMPOSE["secrets"].values())
    for service in OURS.values():
        [secret] = service["secrets"]
        assert service["environment"]["BRIDGE_CONFIG"] == f"/run/secrets/{secret}"
        side = "order-prod" if secret == "caller.toml" else "payment-prod"
        assert service["environment"]["TEMPORAL_NAMESPACE"] == side
    named = (ROOT / ".dockerignore").read_text().splitlines()
    assert named[0] == "*"
    assert not any("secrets" in line for line in named)


def test_images_are_pinned_and_ours_does_not_run_as_root() -> None:
    """A pinned version does not move, except for repairs of the image."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    images = [service["image"] for service in SERVICES.values()] + re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert all(re.search(r":\d+\.\d+", image) for image in images), images
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", dockerfile, re.MULTILINE)
    copied = {
        path
        for line in re.findall(r"^COPY (?!--from)(?:--\S+ )?(.*) \S+$", dockerfile, re.MULTILINE)
        for path in line.split()
    }
    assert {f"!{path}" for path in copied} <= set((ROOT / ".dockerignore").read_text().splitlines())
    assert all((ROOT / path).exists() for path in copied)


def test_a_lasting_service_has_a_health_check_and_the_others_wait_for_a_service_that_ends() -> None:
    once = {name for name, service in SERVICES.items() if service["restart"].startswith("on-failure")}
    assert once == {"schema", "namespaces"}
    waited = {
        name: each["condition"] for service in SERVICES.values() for name, each in service.get("depends_on", {}).items()
    }
    assert {name for name, condition in waited.items() if condition == "service_completed_successfully"} == once
    assert all("healthcheck" in service for name, service in SERVICES.items() if name not in once)


def test_the_proxy_reaches_both_copies_of_both_services(settings: tuple[CallerSettings, HandlerSettings]) -> None:
    """The proxy uses the names in the settings, and reaches nothing else."""
    caller, handler = settings
    assert caller.receiver is not None
    text = (ROOT / "deploy" / "Caddyfile").read_text()
    sites = dict(re.findall(r"^(http://\S+) {\n(.*?)^}", text, re.MULTILINE | re.DOTALL))
    assert sites.keys() == {caller.receiver.url, handler.service.url}
    for url, path, copies in (
        (caller.receiver.url, "/callbacks*", ["receiver-1:8080", "receiver-2:8080"]),
        (handler.service.url, "/c/*", ["handler-1:8080", "handler-2:8080"]),
    ):
        assert re.findall(r"handle (\S+)", sites[url]) == [path]
        assert re.findall(r"reverse_proxy (.*) {", sites[url])[0].split() == copies
        assert all(copy.partition(":")[0] in SERVICES for copy in copies)
        assert urlsplit(url).hostname in SERVICES["proxy"]["networks"]["bridge"]["aliases"]


def test_the_example_for_nginx_logs_no_request_of_either_service() -> None:
    """The query of a start and the URL of a completion hold a callback token."""
    text = (ROOT / "deploy" / "tls" / "nginx.conf").read_text()
    servers = re.findall(r"^server {\n(.*?)^}", text, re.MULTILINE | re.DOTALL)
    assert len(servers) == 2
    assert all("access_log off;" in server for server in servers)


@pytest.mark.parametrize("service", OURS.values(), ids=OURS)
async def test_every_command_in_the_compose_file_exists(service: dict[str, Any]) -> None:
    """The image has the program, and the program accepts the arguments."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *_program(service["command"]), "--help"),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert out.lower().startswith(b"usage: ")


def _program(command: list[str]) -> list[str]:
    """What Python runs for *command*: the image's script or a module."""
    if command[0] == "python":
        return command[1:]
    assert f"COPY deploy/{command[0]} /venv/bin/" in (ROOT / "Dockerfile").read_text()
    return [str(ROOT / "deploy" / command[0]), *command[1:]]


async def test_a_worker_is_healthy_while_it_polls_its_queue(world: World) -> None:
    """This is the containers' health check, run here on the worker's host."""

    async def check(queue: str) -> int:
        environment = {**os.environ, "TEMPORAL_ADDRESS": world.server.address, "TEMPORAL_NAMESPACE": "order-prod"}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deploy.worker_health", queue), cwd=ROOT, env=environment
        )
        return await process.wait()

    assert await check(world.order_queue) == 0
    assert await check(f"unpolled-{world.id}") == 1
    checked = {service["healthcheck"]["test"][-1] for name, service in OURS.items() if name.endswith("-worker")}
    assert checked == {ORDER_QUEUE, PAYMENT_QUEUE}


async def test_namespaces_are_made_once(server: Server) -> None:
    """The test runs the container's script with the real command line tool."""
    program = server.program or await temporal_cli.find(temporal_cli.chosen())
    [script] = SERVICES["namespaces"]["command"]
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "TEMPORAL_ADDRESS": server.address,
        "NAMESPACES": f"made-{uuid.uuid4().hex} made-{uuid.uuid4().hex}",
    }
    for _ in range(2):
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-euc", script.replace("$$", "$")), env=environment, stdout=asyncio.subprocess.DEVNULL
        )
        assert await process.wait() == 0


def keys_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from each.values() if name == "keys" else keys_in(each)


def test_no_key_is_in_the_templates() -> None:
    for name in ("caller.toml", "handler.toml"):
        found = list(keys_in(tomllib.loads((ROOT / "deploy" / name).read_text())))
        assert found
        assert all(re.fullmatch(r"KEY-\d", key) for key in found)
